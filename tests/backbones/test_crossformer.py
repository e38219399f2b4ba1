"""CrossFormer: its groups against a mask with biases, and the models as timm's users know them."""

import math

import pytest
import timm
import torch
from model_checks import check_classifier, check_order_of_groups, check_saved_weights
from torch.nn.functional import layer_norm

import vision_attn as va
from vision_attn.backbones.crossformer import (
    CrossFormer,
    CrossScaleEmbedding,
    CrossScaleMerging,
    GroupAttention,
    checkpoint_filter_fn,
)

TINY = {"embed_dim": 32, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "mlp_ratio": 2.0, "group_size": 3}
SIZES = {
    "tiny": (64, (1, 1, 8, 6), (2, 4, 8, 16), 27.8),
    "small": (96, (2, 2, 6, 2), (3, 6, 12, 24), 30.7),
    "base": (96, (2, 2, 18, 2), (3, 6, 12, 24), 52.0),
    "large": (128, (2, 2, 18, 2), (4, 8, 16, 32), 92.0),
}


def tiny(**changes):
    torch.manual_seed(0)
    return CrossFormer(**{"num_classes": 10, **TINY, **changes})


def group_and_place(length, size, long):
    """Of each token on an axis."""
    token, size = torch.arange(length), min(size, length)
    interval = math.ceil(length / size)
    return (token % interval, token // interval) if long else (token // size, token % size)


def bias_of(network, steps):
    """A linear layer, then three times norm, ReLU and a linear layer."""
    x = steps @ network.pos_proj.weight.T + network.pos_proj.bias
    for norm, _, linear in (network.pos1, network.pos2, network.pos3):
        x = layer_norm(x, x.shape[-1:], norm.weight, norm.bias).clamp(min=0) @ linear.weight.T + linear.bias
    return x


def truth(module, x):
    """Dense attention under a mask of groups, with a bias by the places in the group of query and key."""
    rows, columns = x.shape[1:3]
    (row_group, row_place), (column_group, column_place) = (
        group_and_place(length, module.group_size, module.long) for length in (rows, columns)
    )
    group = (row_group[:, None] * 1000 + column_group).flatten()
    place = torch.stack([row_place.repeat_interleave(columns), column_place.repeat(rows)], -1).double()
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits + bias_of(module.pos, place[:, None] - place).permute(2, 0, 1)
    output = logits.masked_fill(group[:, None] != group, float("-inf")).softmax(-1) @ v
    return module.proj(output.transpose(1, 2).flatten(2)).view(x.shape)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((6, 9), 3), ((7, 10), 3), ((5, 8), 7), ((3, 2), 7), ((4, 6), 1)])
def test_attention(shape, size, long):
    module = GroupAttention(64, 2, size, long).double()
    torch.nn.init.normal_(module.pos.pos3[2].weight)
    x = torch.randn(2, *shape, 64, dtype=torch.float64)
    torch.testing.assert_close(module(x), truth(module, x))


@pytest.mark.parametrize(("long", "interval"), [(False, 1), (True, (4, 2))])
def test_without_biases_it_is_the_operator(long, interval):
    module = GroupAttention(32, 2, 3, long)
    torch.nn.init.zeros_(module.pos.pos3[2].weight)
    torch.nn.init.zeros_(module.pos.pos3[2].bias)
    x = torch.randn(2, 12, 6, 32)
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 16)).unbind(2)
    attended = va.LSDA(3, interval)(q, k, v, va.TokenLayout((12, 6)))
    torch.testing.assert_close(module(x), module.proj(attended.flatten(2)).view(x.shape), atol=1e-5, rtol=1e-4)


def seen(conv, x, token):
    """First and last row and column of `x` `[1, C, Y, X]` that a token of a convolution depends on."""
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(conv(x)[0, :, token[0], token[1]].sum(), x)
    return [(int(hit.min()), int(hit.max())) for hit in gradient[0].abs().sum(0).nonzero().unbind(1)]


def test_patches_of_all_sizes_share_their_centres():
    convs = CrossScaleEmbedding(3, 32).projs
    assert [conv.out_channels for conv in convs] == [16, 8, 4, 4]
    for conv, side in zip(convs, (4, 8, 16, 32), strict=True):
        found = seen(conv, torch.randn(1, 3, 48, 64), (5, 7))  # their centres are 22 and 30
        assert found == [(22 - side // 2, 21 + side // 2), (30 - side // 2, 29 + side // 2)]
    convs = CrossScaleMerging(32).reductions
    assert [conv.out_channels for conv in convs] == [32, 32]
    for conv, side in zip(convs, (2, 4), strict=True):
        found = seen(conv, torch.randn(1, 32, 8, 10), (2, 3))
        assert found == [(5 - side // 2, 4 + side // 2), (7 - side // 2, 6 + side // 2)]


def test_every_second_block_is_long():
    with torch.device("meta"):
        model = timm.create_model("va_crossformer_tiny")
    found = [[block.attn.long for block in layer.blocks] for layer in model.layers]
    assert found == [[False], [False], 4 * [False, True], 3 * [False, True]]


@pytest.mark.parametrize("size", [(64, 64), (97, 70), (32, 44)])
def test_any_image_size(size):
    output = tiny().eval()(torch.randn(2, 3, *size))
    assert output.shape == (2, 10)
    assert output.isfinite().all()


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def released_shapes(dim, depths, heads, classes=1000, ratio=4):
    """Names and shapes of the released weights, without tables of positions."""
    shapes = affine("patch_embed.norm", dim) | affine("norm", 8 * dim) | affine("head", classes, 8 * dim)
    for index, side in enumerate((4, 8, 16, 32)):
        shapes |= affine(f"patch_embed.projs.{index}", dim // min(2 ** (index + 1), 8), 3, side, side)
    for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        c = dim * 2**stage
        for block in (f"layers.{stage}.blocks.{i}" for i in range(depth)):
            shapes |= affine(f"{block}.norm1", c) | affine(f"{block}.norm2", c)
            shapes |= affine(f"{block}.attn.qkv", 3 * c, c) | affine(f"{block}.attn.proj", c, c)
            shapes |= affine(f"{block}.mlp.fc1", ratio * c, c) | affine(f"{block}.mlp.fc2", c, ratio * c)
            pos, hidden = f"{block}.attn.pos", c // 4 // 4
            shapes |= affine(f"{pos}.pos_proj", hidden, 2)
            for index, out in enumerate((hidden, hidden, head), 1):
                shapes |= affine(f"{pos}.pos{index}.0", hidden) | affine(f"{pos}.pos{index}.2", out, hidden)
        if stage < 3:
            merge = f"layers.{stage}.downsample"
            shapes |= affine(f"{merge}.norm", c)
            shapes |= affine(f"{merge}.reductions.0", c, c, 2, 2) | affine(f"{merge}.reductions.1", c, c, 4, 4)
    return shapes


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_the_released_ones(size):
    *numbers, millions = SIZES[size]
    with torch.device("meta"):
        model = timm.create_model(f"va_crossformer_{size}")
    expected = released_shapes(*numbers)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert round(sum(map(math.prod, expected.values())) / 1e6, 1) == millions


@pytest.mark.parametrize("wrapped", [True, False])
def test_released_weights_are_taken_whole(wrapped):
    shapes = released_shapes(32, TINY["depths"], TINY["num_heads"], 10, 2)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    tables = {"layers.1.blocks.1.attn.biases": torch.zeros(25, 2),
              "layers.1.blocks.1.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.long)}  # fmt: skip
    released, model = {**weights, **tables}, tiny()
    model.load_state_dict(checkpoint_filter_fn({"model": released} if wrapped else released, model))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_saved_weights_give_the_same_output(tmp_path):
    check_saved_weights(tiny, torch.randn(2, 3, *(64, 96)), tmp_path)


@pytest.mark.parametrize("size", [(64, 64), (70, 101)])
def test_training_reaches_every_parameter(size):
    model = tiny(embed_dim=64, drop_path_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1)
    model.set_grad_checkpointing()
    model(torch.randn(4, 3, *size)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_features():
    model = timm.create_model("va_crossformer_tiny", features_only=True, out_indices=(0, 2), **TINY)
    assert [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))] == [(1, 32, 16, 24), (1, 128, 4, 6)]
    assert [tuple(x.shape) for x in model(torch.randn(1, 3, 70, 31))] == [(1, 32, 17, 7), (1, 128, 4, 1)]
    assert model.feature_info.reduction() == [4, 16]
    assert not any(name.startswith(("layers.3", "layers.2.downsample", "norm", "head")) for name in model.state_dict())


def test_classifier_channels_and_groups():
    check_classifier(tiny, 256)
    model = tiny()
    first = ("patch_embed.projs.3", "layers.0.blocks.0.attn.qkv", "layers.0.downsample.norm",
             "layers.1.blocks.0.attn.qkv", "layers.1.blocks.1.attn.qkv", "layers.1.downsample.norm",
             "layers.2.blocks.0.attn.qkv", "layers.3.blocks.0.attn.qkv", "norm", "head")  # fmt: skip
    check_order_of_groups(model, [f"{name}.weight" for name in first])
    assert model.no_weight_decay() == set()


def test_bfloat16():
    model, x = tiny().eval(), torch.randn(1, 3, 70, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 24}, "embed_dim must be a multiple of 16, got 24"),
        ({"embed_dim": 0}, "embed_dim must be a multiple of 16, got 0"),
        ({"num_heads": (1, 2)}, r"num_heads must have 4 values, got \(1, 2\)"),
        ({"num_heads": (3, 2, 2, 4)}, "GroupAttention: num_heads must divide dim=32, got 3"),
        ({"group_size": 0}, "GroupAttention: group_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_too_few_channels_or_pixels_are_named():
    with pytest.raises(ValueError, match="GroupAttention: dim must be at least 16, got 8"):
        GroupAttention(8, 2)
    with pytest.raises(ValueError, match=r"CrossFormer: x must have at least 32 rows and columns, got \(64, 31\)"):
        tiny()(torch.randn(1, 3, 64, 31))
