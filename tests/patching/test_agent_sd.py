"""AgentSD in UNets: the released block, levels, block inputs, and operators that take turns over the steps."""

import copy
import pathlib

import diffusers
import numpy as np
import pytest
import timm
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from zoo_unet import DOWN, LEVELS, UNET, UP, ZOO_UNET, unet_inputs

import vision_attn as va

GOLDEN = {
    name: torch.from_numpy(array)
    for name, array in np.load(pathlib.Path(__file__).parents[1] / "golden/agent.npz").items()
    if name.startswith("sd.")
}
RENAMED = {"ff.0.": "ff.net.0.proj.", "ff.2.": "ff.net.2."}


class Block(nn.Module):
    """A model of one transformer block with the golden weights."""

    def __init__(self):
        super().__init__()
        self.block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24, activation_fn="gelu", ff_inner_dim=64)
        weights = {name.removeprefix("sd.w.block."): x for name, x in GOLDEN.items() if name.startswith("sd.w.")}
        for old, new in RENAMED.items():
            weights = {name.replace(old, new): x for name, x in weights.items()}
        self.block.load_state_dict(weights)

    def forward(self, sample, context):
        tokens = self.block(sample.flatten(2).transpose(1, 2), encoder_hidden_states=context)
        return tokens.transpose(1, 2).unflatten(2, sample.shape[2:])


@pytest.mark.parametrize(
    ("op", "sample", "output"),
    [
        (va.Dense(), "x", "unpatched"),
        (va.AgentSD(0.4, 0.95, sx=4, sy=4), "x", "early"),
        (va.AgentSD(0.4, 0.95, sx=4, sy=4, k_scale2=1, k_shortcut=0), "x_smooth", "early_k0"),
        (va.AgentSD(0.5, None, sx=2, sy=2), "x_smooth", "defaults_norand"),
    ],
)
@torch.no_grad()
def test_released_block(op, sample, output):
    model = Block()
    with va.patch(model, op, grid=(16, 16), layers="*.attn1"):
        ours = model(GOLDEN[f"sd.in.{sample}"], GOLDEN["sd.in.context"])
    torch.testing.assert_close(ours, GOLDEN[f"sd.out.{output}"], atol=1e-5, rtol=0)


def unet(levels=2, first=0, **changes):
    """A UNet that attends from level `first` on."""
    torch.manual_seed(0)
    down = [DOWN[0] if level >= first else DOWN[1] for level in range(levels)]
    config = UNET | LEVELS | {
        "block_out_channels": (8, 16, 16)[:levels],
        "down_block_types": tuple(down),
        "up_block_types": tuple(UP[1] if kind == DOWN[0] else UP[0] for kind in down[::-1]),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**config, **changes}).eval()


def shares(patch):
    """The parts of a model that a patch serves, and those that it leaves out as too coarse."""
    served = {layer.name.split(".attentions")[0] for layer in patch.routed}
    coarse = {left.name.split(".attentions")[0]: left.reason for left in patch.skipped if "coarser" in left.reason}
    return served, coarse


def test_the_finest_attended_maps_are_served_and_coarser_ones_listed():
    served, coarse = shares(va.patch(unet(3), va.AgentSD()))
    assert served == {"down_blocks.0", "up_blocks.2"}
    assert coarse == {
        "down_blocks.1": "its maps are 2 times coarser, max_downsample is 1",
        "up_blocks.1": "its maps are 2 times coarser, max_downsample is 1",
        "down_blocks.2": "its maps are 4 times coarser, max_downsample is 1",
        "mid_block": "its maps are 4 times coarser, max_downsample is 1",
        "up_blocks.0": "its maps are 4 times coarser, max_downsample is 1",
    }
    assert shares(va.patch(unet(3), va.AgentSD(max_downsample=2)))[0] == {
        "down_blocks.0", "up_blocks.2", "down_blocks.1", "up_blocks.1",
    }  # fmt: skip
    # As SDXL, whose finest level attends nothing.
    assert shares(va.patch(unet(3, first=1), va.AgentSD()))[0] == {"down_blocks.1", "up_blocks.1"}


class Recorder(nn.Module):
    """Takes the place of a norm and keeps what it gets."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.seen = norm, []

    def forward(self, x):
        self.seen.append(x)
        return self.norm(x)


@torch.no_grad()
def test_what_enters_the_block_tells_similar_tokens(monkeypatch):
    model, given = unet(), []
    call = va.AgentSD.__call__
    monkeypatch.setattr(
        va.AgentSD, "__call__", lambda *args, **kwargs: given.append(kwargs["block_input"]) or call(*args, **kwargs)
    )
    blocks = [module for module in model.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block.norm1 = Recorder(block.norm1)
    patch = va.patch(model, va.AgentSD(max_downsample=2, sx=2, sy=2, ratio=0.1, agent_ratio=0.9))
    model(**unet_inputs(10, 14))
    seen = {id(x) for block in blocks for x in block.norm1.seen}
    assert len(given) == len(blocks) == len(patch.routed)
    assert all(id(x) in seen for x in given)
    held = [entry.layer.block_input for entry in patch._installations[0].entries]
    assert held == [None] * len(blocks)


def outputs_of_steps(model, steps=4):
    """Outputs of a model over the timesteps of a run."""
    inputs = unet_inputs(16, 20)
    return [model(**{**inputs, "timestep": torch.tensor(900 - 100 * step)}).sample for step in range(steps)]


@torch.no_grad()
def test_operators_take_turns_over_the_steps():
    model = unet()
    stages = {range(1, 2): va.AgentSD(), frozenset({2}): va.AgentSD(0.3, None, 2, 2)}
    stock = outputs_of_steps(model)
    alone = []
    for op in stages.values():
        with va.patch(model, op):
            alone.append(outputs_of_steps(model))
    with va.patch(model, steps=stages) as patch:
        twin = copy.deepcopy(model)
        mixed = outputs_of_steps(model)
        kinds = [(call.kind, call.reason) for call in next(iter(patch.calls.values()))]
        assert "agent_sd() in range(1, 2), agent_sd(ratio=0.3, agent_ratio=None, sx=2, sy=2) in {2}" in str(patch)
    for step, expected in enumerate([stock[0], alone[0][1], alone[1][2], stock[3]]):
        assert torch.equal(mixed[step], expected), step
    assert not torch.equal(alone[0][1], stock[1])
    assert not torch.equal(alone[1][2], stock[2])
    assert kinds == [
        ("dense", "denoising step 0 is not in steps"), ("operator", ""), ("dense", "denoising step 3 is not in steps")
    ]  # fmt: skip
    assert torch.equal(torch.stack(outputs_of_steps(twin)), torch.stack(mixed))
    assert torch.equal(torch.stack(outputs_of_steps(model)), torch.stack(stock))


def test_gradient_checkpointing_groups_again_by_the_same_input():
    gradients = []
    for checkpoints in (False, True):
        model = unet()
        if checkpoints:
            model.enable_gradient_checkpointing()
            model.train()
        with va.patch(model, va.AgentSD(sx=2, sy=2)):
            model(**unet_inputs(16, 20)).sample.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_compiled_blocks_get_their_input():
    torch._dynamo.reset()
    model, inputs = unet(), unet_inputs(16, 20)
    with va.patch(model, va.AgentSD()):
        expected = model(**inputs).sample
        for block in model.modules():
            if isinstance(block, BasicTransformerBlock):
                block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(model(**inputs).sample, expected)


@torch.no_grad()
def test_settings_that_would_do_nothing_are_an_error_or_listed():
    model, op = unet(), va.AgentSD(0.5, 0.8, 2, 2)
    message = r"attn1'.*agents must be less than half of the 160 merged tokens on the grid \(16, 20\), got 80"
    with va.patch(model, op), pytest.raises(va.PatchError, match=message):
        model(**unet_inputs(16, 20))
    with va.patch(model, op, strict=False) as patch:
        model(**unet_inputs(16, 20))
        assert {call.kind for calls in patch.calls.values() for call in calls} == {"dense"}


def test_mistakes_in_stages():
    model = unet()
    with pytest.raises(ValueError, match=r"op and operators in layers must be left out .* got op=agent_sd\(\)"):
        va.patch(model, va.AgentSD(), steps={range(3): va.AgentSD()})
    with pytest.raises(ValueError, match="got a dict as layers"):
        va.patch(model, layers={"*": va.AgentSD()}, steps={range(3): va.AgentSD()})
    with pytest.raises(ValueError, match=r"steps must hold at least one stage, got \{\}"):
        va.patch(model, steps={})
    with pytest.raises(TypeError, match="each operator in steps must be an operator object, got the text 'dense'"):
        va.patch(model, steps={range(3): "dense"})
    with pytest.raises(va.PatchError, match=r"got none: mid_block.* its maps are 2 times coarser, max_downsample is 1"):
        va.patch(unet(), va.AgentSD(), layers="mid_block*")
    with pytest.raises(TypeError, match="steps must hold integers, got"):
        va.patch(model, steps={(0.5,): va.Dense()})
    with pytest.raises(ValueError, match=r"without learned parameters, got clear\(radius=4, down_factor=2\)"):
        va.patch(model, steps={range(3): va.Clear(4, down_factor=2)})


@torch.no_grad()
def test_another_operator_serves_coarse_maps_in_its_steps():
    model = unet()
    coarse = "mid_block.attentions.0.transformer_blocks.0.attn1"
    with va.patch(model, steps={range(1): va.AgentSD(), range(1, 2): va.Neighborhood(3)}) as patch:
        assert not shares(patch)[1]
        outputs_of_steps(model, 2)
        calls = [(call.kind, call.reason) for call in patch.calls[coarse]]
    assert calls == [("dense", "its maps are 2 times coarser, max_downsample is 1"), ("operator", "")]


@pytest.mark.parametrize("steps", [{0}, {range(1): va.AgentSD(sx=2, sy=2), range(1, 2): va.Neighborhood(3)}])
def test_checkpoints_of_several_steps_are_refused(steps):
    """Recomputation knows the operator of the last step only: wrong gradients otherwise."""
    model, inputs = unet(), unet_inputs(16, 20)
    model.enable_gradient_checkpointing()
    model.train()
    op = None if isinstance(steps, dict) else va.AgentSD(sx=2, sy=2)
    with va.patch(model, op, steps=steps):
        outputs = [model(**{**inputs, "timestep": torch.tensor(time)}).sample for time in (900, 800)]
        with pytest.raises(va.PatchError, match="the operator of its forward, got forwards of several grids or steps"):
            sum(outputs).square().sum().backward()
    model.zero_grad()
    with va.patch(model, op, steps=steps):
        for time in (900, 800):
            model(**{**inputs, "timestep": torch.tensor(time)}).sample.square().sum().backward()


@pytest.mark.slow
@torch.no_grad()
def test_inductor_takes_random_cells():
    torch._dynamo.reset()
    model, inputs = unet(), unet_inputs(16, 20)
    with va.patch(model, va.AgentSD(use_rand=True)):
        output = torch.compile(model, fullgraph=True, dynamic=False)(**inputs).sample
    assert output.isfinite().all()


def test_temporal_attention_tells_no_level():
    """As AnimateDiff for SDXL: the finest level has motion modules alone."""
    model = diffusers.UNetMotionModel(
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"), block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2,
    )  # fmt: skip
    patch = va.patch(model, va.AgentSD())
    assert {layer.name.split(".attentions")[0] for layer in patch.routed} == {
        "down_blocks.1", "mid_block", "up_blocks.0",
    }  # fmt: skip


def case(name):
    return next(case for case in ZOO_UNET if case.name == name).build()


def test_a_controlnet_xs_tells_its_levels():
    patch = va.patch(case("controlnet_xs"), va.AgentSD())
    assert {".".join(layer.name.split(".")[:2]) for layer in patch.routed} == {"down_blocks.0", "up_blocks.1"}
    assert any(left.name.startswith("mid_block") and "2 times coarser" in left.reason for left in patch.skipped)


def test_models_that_tell_no_levels_are_refused():
    with pytest.raises(va.PatchError, match=r"max_downsample of agent_sd\(\) must be None for Kandinsky3UNet, whose"):
        va.patch(case("kandinsky3"), va.AgentSD())
    assert va.patch(case("kandinsky3"), va.AgentSD(max_downsample=None)).routed
    pyramid = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).eval()
    with pytest.raises(
        va.PatchError, match=r"max_downsample of agent_sd\(\) must be None for PyramidVisionTransformerV2"
    ):
        va.patch(pyramid, va.AgentSD())
