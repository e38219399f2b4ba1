"""Attention maps against softmax by hand, their gradient, and what a forward is left with."""

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vision_attn.guidance import AttentionCapture

SAMPLE, TEXT, TOKENS = (10, 14), 7, [[2], [4, 5]]


def unet(**changes):
    torch.manual_seed(0)
    levels = {
        "block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2,
        "cross_attention_dim": 16, "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**levels, **changes}).eval()


def inputs(batch=2, **changes):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, *SAMPLE, generator=generator)
    text = torch.randn(batch, TEXT, 16, generator=generator)
    return {"sample": sample, "timestep": 5, "encoder_hidden_states": text, **changes}


def by_hand(model, calls):
    """Mean over heads and the layers of 3 x 4 tokens of softmax(q k), from the inputs of the attention modules."""
    seen = []

    def hook(module, args, kwargs):
        x, text = args[0], kwargs["encoder_hidden_states"]
        q, k = (
            p(t).unflatten(-1, (module.heads, -1)).transpose(1, 2) for p, t in ((module.to_q, x), (module.to_k, text))
        )
        if x.shape[1] == 12:
            seen.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1))

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2")
    ]
    model(**calls)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).mean(0).unflatten(1, (3, 4)), len(seen)


def test_maps_are_softmax_by_hand():
    model = unet()
    expected, layers = by_hand(model, inputs())
    stock = model(**inputs()).sample
    with AttentionCapture(model, tokens=TOKENS) as capture:
        assert torch.equal(model(**inputs()).sample, stock)
    assert len(capture.names) == layers == 4
    torch.testing.assert_close(capture.probabilities, expected)
    torch.testing.assert_close(capture.probabilities.sum(-1), torch.ones(2, 3, 4))
    torch.testing.assert_close(capture.maps[:, 0], expected[..., 2])
    torch.testing.assert_close(capture.maps[:, 1], (expected[..., 4] + expected[..., 5]) / 2)


def test_attention_is_shared_among_the_text_that_is_wanted():
    model, text = unet(attention_head_dim=1), [[1, 3, 6], [2]]  # one head: nothing is averaged
    every, some = (AttentionCapture(model, layers="mid_block.*", text=own) for own in (None, text))
    for capture in (every, some):
        with torch.no_grad(), capture:
            model(**inputs())
    expected = every.probabilities[0][..., text[0]]
    torch.testing.assert_close(some.probabilities[0][..., text[0]], expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(some.probabilities[1], torch.eye(TEXT)[2].expand(3, 4, TEXT))


def test_resolutions_and_layers():
    model = unet()
    with AttentionCapture(model, resolution=(5, 7)) as capture:
        model(**inputs())
    assert capture.probabilities.shape == (2, 5, 7, TEXT)
    with AttentionCapture(model, layers="down_blocks.2.*") as capture:
        model(**inputs())
    assert capture.names == ["down_blocks.2.attentions.0.transformer_blocks.0.attn2"]
    with AttentionCapture(model, layers=["down_blocks.0.*", "mid_block.*"], resolution=(10, 14)) as capture:
        model(**inputs())
    assert capture.names == ["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]


def gradient(model, stop):
    call = inputs()
    call["sample"].requires_grad_()
    with AttentionCapture(model, tokens=TOKENS, stop=stop) as capture:
        result = model(**call)
        assert (result is None) == stop
        return torch.autograd.grad(capture.maps.square().sum(), call["sample"])[0]


def test_a_stopped_forward_has_the_same_gradient():
    model = unet()
    torch.testing.assert_close(gradient(model, True), gradient(model, False), atol=1e-6, rtol=1e-6)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("stop", [False, True])
def test_gradient_checkpointing_takes_maps_once(stop):
    model = unet()
    expected = gradient(model, stop)
    model.enable_gradient_checkpointing()
    model.train()
    torch.testing.assert_close(gradient(model, stop), expected)


@pytest.mark.parametrize("way", ["wrapped", "in place", "by blocks"])
def test_compiled_models_are_captured_eagerly(way):
    small = {
        "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"), "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    model = unet(**small)
    expected, backend = gradient(model, True), CompileCounter()
    if way == "by blocks":
        model.compile_repeated_blocks(backend=backend)
    elif way == "in place":
        model.compile(backend=backend)
    compiled = torch.compile(model, backend=backend) if way == "wrapped" else model
    with torch.no_grad():
        stock = compiled(**inputs()).sample
    graphs = backend.frame_count
    assert graphs > 0
    assert torch.equal(gradient(compiled, True), expected)
    assert backend.frame_count == graphs
    with torch.no_grad():
        assert torch.equal(compiled(**inputs()).sample, stock)
    assert backend.frame_count == graphs


def test_a_stopped_forward_of_the_real_size_saves_what_it_should():
    """SD 1.5 at 512 px: the last of the layers of 16x16 tokens stands in the second block on the way up."""
    with FakeTensorMode():  # shapes alone: weights would need 3.4 GB
        model = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        call = {"sample": torch.empty(1, 4, 64, 64), "encoder_hidden_states": torch.empty(1, 77, 768), "timestep": 5}
        with FlopCounterMode(display=False) as whole, torch.no_grad():
            model(**call)
        with FlopCounterMode(display=False) as stopped, torch.no_grad(), AttentionCapture(model, stop=True) as capture:
            model(**call)
    assert len(capture.names) == 5
    assert {name.split(".attentions")[0] for name in capture.names} == {"down_blocks.2", "up_blocks.1"}
    assert stopped.get_total_flops() < 0.6 * whole.get_total_flops()


def test_nothing_is_left_behind():
    model = unet()
    with pytest.raises(RuntimeError, match="the user's"), AttentionCapture(model, stop=True):
        raise RuntimeError("the user's")
    assert not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model.modules())
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "*.attn3"}, r"layers must name cross-attention, got '\*.attn3': there are 'down_blocks.0"),
        ({"resolution": (16, 16)}, r"resolution must be one of \[\(3, 4\), \(5, 7\), \(10, 14\)\] .* got \(16, 16\)"),
        ({"layers": "down_blocks.*"}, r"resolution must be one of \[\(3, 4\), \(5, 7\), \(10, 14\)\] .* got None"),
        ({"tokens": [[7]]}, r"tokens must hold positions from 0 to 6, got \[7\]"),
        ({"tokens": [[]]}, r"tokens must hold positions from 0 to 6, got \[\]"),
        ({"tokens": [2, 3]}, r"tokens must be lists of positions such as \[\[2\], \[5, 6\]\], got \[2, 3\]"),
        ({"tokens": []}, r"tokens must be lists of positions .* got \[\]"),
        ({"text": [2, 3]}, r"text must be lists of positions .* got \[2, 3\]"),
        ({"resolution": 16}, r"resolution must be rows and columns such as \(16, 16\), got 16"),
        ({"resolution": (5, 7, 1)}, r"resolution must be rows and columns .* got \(5, 7, 1\)"),
        ({}, "tokens must be given for maps, got None"),
    ],
)
def test_mistakes(arguments, message):
    def capture():
        model = unet()
        with AttentionCapture(model, **arguments) as capture:
            model(**inputs())
        return capture.maps

    with pytest.raises(ValueError, match=f"AttentionCapture: {message}"):
        capture()


def test_other_mistakes():
    model = unet()
    with AttentionCapture(model, tokens=TOKENS) as capture:
        pass
    with pytest.raises(ValueError, match="a forward must have run inside of the block, none has"):
        capture.maps  # noqa: B018
    with pytest.raises(ValueError, match="encoder_attention_mask must be None"), AttentionCapture(model):
        model(**inputs(encoder_attention_mask=torch.ones(2, TEXT)))
    with pytest.raises(TypeError, match=r"model must be a UNet or a transformer, got DDIMScheduler: give pipe.unet"):
        AttentionCapture(diffusers.DDIMScheduler())
    model.fuse_qkv_projections()
    with pytest.raises(NotImplementedError, match=r"must have plain .*, got fused projections in 'down_blocks.0"):
        AttentionCapture(model)
