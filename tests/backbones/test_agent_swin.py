"""Agent-Swin as timm's users know models: sizes, features, image sizes, released weights."""

import re

import pytest
import timm
import torch
from agent_golden import golden

import vision_attn.backbones  # noqa: F401 - registers the names
from vision_attn.backbones.agent_attention import WindowAgentAttention
from vision_attn.backbones.agent_swin import AgentSwinTransformer, checkpoint_filter_fn

TINY = {
    "img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4),
    "agents": (9, 4, 4, 1), "agent_blocks": (1, 1, 0, 0),
}  # fmt: skip


def resizes_tables(test):
    """timm resizes Swin's tables of relative positions in a way that torch warns of, twice."""
    for message in ("Using a non-tuple sequence for multidimensional indexing", "torch.searchsorted"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


def tiny(**changes):
    torch.manual_seed(0)
    return AgentSwinTransformer(**{"num_classes": 10, **TINY, **changes})


def kinds(model):
    return [[isinstance(block.attn, WindowAgentAttention) for block in stage.blocks] for stage in model.layers]


def test_agents_see_whole_maps_and_windows_stay_shifted():
    model = tiny()
    assert kinds(model) == [[True], [True, False], [False, False], [False]]
    assert model.layers[0].blocks[0].window_size == (16, 16)
    assert model.layers[1].blocks[0].window_size == (8, 8)
    assert model.layers[1].blocks[1].window_size == (2, 2)
    assert model.layers[1].blocks[1].shift_size == (1, 1)


def test_base_has_agents_in_its_first_two_blocks_of_stage_three():
    with torch.device("meta"):
        model = timm.create_model("va_agent_swin_base")
    assert [sum(stage) for stage in kinds(model)] == [2, 2, 2, 0]
    assert [len(stage) for stage in kinds(model)] == [2, 2, 18, 2]


def test_a_block_without_shift_is_the_released_block():
    """The released block shifts and lets agents see across; ours refuses that, and equals its parts without shift."""
    weights = golden("swin_block_shift")[0]
    model = tiny(embed_dim=16, num_heads=(2, 2, 2, 4), img_size=32)
    block = model.layers[0].blocks[0].eval()
    block.load_state_dict({name: value for name, value in weights.items() if name != "attn_mask"})
    x = torch.randn(1, 8, 8, 16)
    expected = x + block.attn(block.norm1(x).flatten(1, 2)).view_as(x)
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)


@resizes_tables
def test_other_image_sizes_and_features():
    model = tiny().eval()
    model.set_input_size(img_size=(64, 96))
    assert model.layers[0].blocks[0].window_size == (16, 24)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 10)
    small = {key: value for key, value in TINY.items() if key != "img_size"}
    model = timm.create_model("va_agent_swin_tiny", features_only=True, out_indices=(0, 2), img_size=(64, 96), **small)
    assert [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))] == [(1, 16, 24, 16), (1, 4, 6, 64)]


def test_training_reaches_every_parameter():
    model = tiny(drop_path_rate=0.0)
    model.set_grad_checkpointing()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def released_names(state_dict):
    """As the released weights spell them: a stage ends with its downsampling, and the head is no module."""
    names = {name: re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
             for name in state_dict}  # fmt: skip
    return {names[name].replace("head.fc.", "head."): value for name, value in state_dict.items()}


def test_released_weights_are_taken_whole():
    model = tiny().eval()
    released = released_names(model.state_dict())
    assert "layers.0.downsample.reduction.weight" in released
    assert "head.weight" in released
    released["layers.1.blocks.1.attn_mask"] = torch.zeros(4, 4, 4)
    other = tiny(img_size=64).eval()
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(checkpoint_filter_fn({"model": released}, other))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))


@resizes_tables
def test_released_weights_are_resized():
    released = released_names(tiny().state_dict())
    model = tiny(img_size=(96, 64), window_size=3)
    filtered = checkpoint_filter_fn(released, model)
    model.load_state_dict(filtered)
    assert filtered["layers.0.blocks.0.attn.ah_bias"].shape == (1, 1, 9, 24, 1)
    assert filtered["layers.0.blocks.0.attn.wa_bias"].shape == (1, 1, 1, 16, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dynamic_img_size": True}, "dynamic_img_size must be left out, agents see whole maps: use set_input_size"),
        ({"strict_img_size": False}, "strict_img_size=False must be left out"),
        ({"agents": (9, 9)}, r"agents must be one per stage, 4, got \(9, 9\)"),
        ({"agent_blocks": (1, 3, 0, 0)}, r"agent_blocks must be at most \[1, 2, 2, 1\], got \(1, 3, 0, 0\)"),
        ({"agents": (9, 100, 4, 1)}, r"agents must be at most 64 for a map of \(8, 8\) tokens, got 100"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
