"""NAT and DiNAT: their attention against a mask with biases, and the models as timm's users know them."""

import pytest
import timm
import torch

import vision_attn as va
from vision_attn.backbones import nat
from vision_attn.backbones.nat import NeighborhoodAttention2d, NeighborhoodTransformer

TINY = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "mlp_ratio": 2.0, "dilations": (1, 2, 1, 1)}


def tiny(**changes):
    torch.manual_seed(0)
    return NeighborhoodTransformer(**{"num_classes": 10, **TINY, **changes})


def truth(module, x):
    """Dense attention under the mask of the operator, with a bias by the steps between query and key."""
    rows, columns = x.shape[1:3]
    op = va.Neighborhood(module.kernel_size, dilation=module.dilation)
    layout = va.TokenLayout((rows, columns))
    y, col = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    dilation_y, dilation_x = op.reach(layout).dilation
    steps_y, steps_x = (y - y[:, None]) // dilation_y, (col - col[:, None]) // dilation_x
    k = module.kernel_size - 1
    bias = module.rpb[:, (steps_y + k).clamp(0, 2 * k), (steps_x + k).clamp(0, 2 * k)]
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    output = logits.masked_fill(~op.mask(layout), float("-inf")).softmax(-1) @ v
    return module.proj(output.transpose(1, 2).flatten(2)).view(x.shape)


@pytest.mark.parametrize(
    ("shape", "kernel", "dilation"),
    [((9, 12), 3, 1), ((11, 9), 5, 2), ((14, 10), 3, 3), ((4, 9), 5, 2), ((3, 3), 7, 8)],
)
def test_attention(shape, kernel, dilation, monkeypatch):
    module = NeighborhoodAttention2d(8, 2, kernel, dilation).double()
    torch.nn.init.normal_(module.rpb)
    x = torch.randn(2, *shape, 8, dtype=torch.float64)
    expected = truth(module, x)
    torch.testing.assert_close(module(x), expected)
    monkeypatch.setattr(nat, "_GATHERED", 1)  # a row at a time
    torch.testing.assert_close(module(x), expected)


def test_without_biases_it_is_na2d():
    module = NeighborhoodAttention2d(8, 2, 5, 2)
    module.rpb.data.zero_()
    x = torch.randn(2, 11, 13, 8)
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, 4)).unbind(3)
    expected = module.proj(va.na2d(q, k, v, 5, dilation=2).flatten(3))
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (97, 70), (32, 32)])
def test_any_image_size(size):
    output = tiny().eval()(torch.randn(2, 3, *size))
    assert output.shape == (2, 10)
    assert output.isfinite().all()


def test_dilations_are_those_of_every_second_block():
    with torch.device("meta"):
        model = timm.create_model("va_dinat_mini")
    found = [[block.attn.dilation for block in level.blocks] for level in model.levels]
    assert found == [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]


def test_names_are_the_released_ones():
    names = set(tiny(layer_scale=1e-5).state_dict())
    block = {"attn.qkv.weight", "attn.rpb", "attn.proj.bias", "norm1.weight", "mlp.fc2.weight", "gamma1", "gamma2"}
    assert {f"levels.1.blocks.1.{name}" for name in block} <= names
    others = {"patch_embed.proj.0.weight", "patch_embed.proj.1.bias", "patch_embed.norm.weight", "norm.bias"}
    assert others | {"levels.0.downsample.reduction.weight", "levels.2.downsample.norm.bias", "head.bias"} <= names
    assert "levels.0.downsample.reduction.bias" not in names
    assert "levels.3.downsample.norm.bias" not in names


def test_training_reaches_every_parameter():
    model = tiny(layer_scale=0.1, drop_path_rate=0.1, attn_drop_rate=0.1)
    model.set_grad_checkpointing()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_features_classifier_and_groups():
    model = timm.create_model("va_nat_mini", features_only=True, out_indices=(0, 2), **TINY)
    assert [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))] == [(1, 16, 16, 24), (1, 64, 4, 6)]
    model = tiny(in_chans=1, num_classes=0)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 128)
    model.reset_classifier(5)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    assert "levels.1.blocks.1.attn.rpb" in model.no_weight_decay()
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd and at least 1, got 4"),
        ({"num_heads": (3, 2, 2, 4)}, "num_heads must divide dim=16, got 3"),
        ({"dilations": (1, 1)}, r"dilations must have 4 values, got \(1, 1\)"),
        ({"dilations": (1, 0, 1, 1)}, "dilation must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
