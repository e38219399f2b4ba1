"""Agent-CSWin: stripes against a mask, and the models as timm's users know them."""

import math

import pytest
import timm
import torch
from model_checks import check_classifier, check_order_of_groups, check_saved_weights
from torch.nn.functional import pad

import vision_attn.backbones  # noqa: F401 - registers the names
from vision_attn.backbones.agent_attention import StripeAgentAttention
from vision_attn.backbones.agent_cswin import (
    AgentCSWinTransformer,
    CrossShapedBlock,
    StripeAttention,
    checkpoint_filter_fn,
)

TINY = {"img_size": 64, "embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 4), "mlp_ratio": 2.0,
        "agents": (9, 4, None, None), "stripes": (None, None, 2, None)}  # fmt: skip
SIZES = {
    "tiny": (64, (2, 4, 18, 1), (2, 4, 8, 16), 20.46),
    "small": (64, (3, 6, 29, 2), (2, 4, 8, 16), 32.81),
    "base": (96, (3, 6, 29, 2), (4, 8, 16, 32), 73.25),
}


def tiny(**changes):
    torch.manual_seed(0)
    return AgentCSWinTransformer(**{"num_classes": 10, **TINY, **changes})


def stripe_of(grid, stripe):
    """`[Y * X]`: the number of each token's stripe."""
    y, x = torch.arange(grid[0]) // stripe[0], torch.arange(grid[1]) // stripe[1]
    return (y[:, None] * 1000 + x).flatten()


def truth(module, qkv):
    """Dense attention under a mask of stripes, and a convolution that sees zeros beyond the token's stripe."""
    (rows, columns), number = module.grid, stripe_of(module.grid, module.stripe)
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in qkv)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    output = logits.masked_fill(number[:, None] != number, float("-inf")).softmax(-1) @ v
    output = output.transpose(1, 2).flatten(2) + module.get_v.bias
    values, numbers = (pad(x, (1, 1, 1, 1), value=-1) for x in (
        qkv[2].transpose(1, 2).unflatten(2, module.grid), number.view(rows, columns)))  # fmt: skip
    for dy in range(3):
        for dx in range(3):
            window = slice(dy, dy + rows), slice(dx, dx + columns)
            same = numbers[window].flatten()[:, None] == number[:, None]
            shifted = values[:, :, window[0], window[1]].flatten(2).transpose(1, 2)
            output = output + torch.where(same, shifted, 0) * module.get_v.weight[:, 0, dy, dx]
    return output


@pytest.mark.parametrize("stripe", [(6, 2), (3, 8), (2, 4), (6, 8)])
def test_stripes(stripe):
    module = StripeAttention(8, (6, 8), stripe, 2).double()
    qkv = torch.randn(3, 2, 48, 8, dtype=torch.float64)
    torch.testing.assert_close(module(qkv), truth(module, qkv))


def test_halves_of_a_block_have_upright_and_level_stripes():
    block = CrossShapedBlock(16, (6, 4), 2, 4, None, 2.0, 0.0).double()
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    assert [attn.stripe for attn in block.attns] == [(6, 2), (2, 4)]
    qkv = block.qkv(block.norm1(x)).chunk(3, -1)
    halves = [truth(attn, [t[..., 8 * i : 8 * i + 8] for t in qkv]) for i, attn in enumerate(block.attns)]
    expected = x + block.proj(torch.cat(halves, -1))
    torch.testing.assert_close(block(x), expected + block.mlp(block.norm2(expected)))


def test_agents_see_whole_maps_of_the_first_stages():
    with torch.device("meta"):
        model = timm.create_model("va_agent_cswin_small")
    found = [[(type(attn), attn.grid, attn.stripe) for attn in getattr(model, f"stage{i}")[-1].attns]
             for i in range(1, 5)]  # fmt: skip
    agents, softmax = StripeAgentAttention, StripeAttention
    assert found == [
        [(agents, (56, 56), (56, 56))],
        [(agents, (28, 28), (28, 28))],
        [(softmax, (14, 14), (14, 7)), (softmax, (14, 14), (7, 14))],
        [(softmax, (7, 7), (7, 7))],
    ]
    assert [model.stage1[0].attns[0].side ** 2, model.stage2[0].attns[0].side ** 2] == [9, 16]


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def released_shapes(dim, depths, heads, grids, agents=(9, 16), classes=1000, ratio=4):
    """Names and shapes of the released weights, agents in two stages and halves in the third."""
    shapes = affine("stage1_conv_embed.0", dim, 3, 7, 7) | affine("stage1_conv_embed.2", dim)
    for stage, (depth, head, (y, x)) in enumerate(zip(depths, heads, grids, strict=True)):
        c = dim * 2**stage
        if stage:
            shapes |= affine(f"merge{stage}.conv", c, c // 2, 3, 3) | affine(f"merge{stage}.norm", c)
        for block in (f"stage{stage + 1}.{i}" for i in range(depth)):
            shapes |= affine(f"{block}.norm1", c) | affine(f"{block}.norm2", c)
            shapes |= affine(f"{block}.qkv", 3 * c, c) | affine(f"{block}.proj", c, c)
            shapes |= affine(f"{block}.mlp.fc1", ratio * c, c) | affine(f"{block}.mlp.fc2", c, ratio * c)
            halves = 2 if stage == 2 else 1
            for half in range(halves):
                shapes |= affine(f"{block}.attns.{half}.get_v", c // halves, 1, 3, 3)
            if stage < 2:
                n, attn = agents[stage], f"{block}.attns.0"
                shapes |= {f"{attn}.{name}": (head, n, 7, 7) for name in ("an_bias", "na_bias")}
                shapes |= {f"{attn}.ah_bias": (1, head, n, y, 1), f"{attn}.aw_bias": (1, head, n, 1, x)}
                shapes |= {f"{attn}.ha_bias": (1, head, y, 1, n), f"{attn}.wa_bias": (1, head, 1, x, n)}
    return shapes | affine("norm", 8 * dim) | affine("head", classes, 8 * dim)


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_the_released_ones(size):
    dim, depths, heads, millions = SIZES[size]
    with torch.device("meta"):
        model = timm.create_model(f"va_agent_cswin_{size}")
    expected = released_shapes(dim, depths, heads, [(56, 56), (28, 28), (14, 14), (7, 7)])
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert round(sum(map(math.prod, expected.values())) / 1e6, 2) == millions


@pytest.mark.parametrize("wrapper", ["model", "state_dict_ema", None])
def test_released_weights_are_taken_whole(wrapper):
    grids = [(16, 16), (8, 8), (4, 4), (2, 2)]
    shapes = released_shapes(8, TINY["depths"], TINY["num_heads"], grids, (9, 4), 10, 2)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    other = {"model": {}} if wrapper == "state_dict_ema" else {}
    model = tiny()
    model.load_state_dict(checkpoint_filter_fn({**other, wrapper: weights} if wrapper else weights, model))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_saved_weights_give_the_same_output(tmp_path):
    check_saved_weights(tiny, torch.randn(2, 3, *(64, 64)), tmp_path)


@pytest.mark.parametrize("size", [(64, 96), (61, 95)])
def test_another_size_equals_resized_weights(size):
    """Interpolated at load time, or in the forward pass."""
    model, other = tiny().eval(), tiny(img_size=size).eval()
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    model.set_input_size(size)
    x = torch.randn(2, 3, *size)
    assert other(x).shape == (2, 10)
    torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=1e-4)


def test_stripes_of_another_width():
    model = tiny()
    model.set_input_size((96, 192), (None, None, 3, None))
    assert [attn.stripe for attn in model.stage3[1].attns] == [(6, 3), (3, 12)]
    assert model(torch.randn(1, 3, 96, 192)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((80,), r"stripes must divide the map \(5, 5\) of stage 3 for img_size=\(80, 80\), got 2: .* of 16 \* width"),
        ((16, (None, None, 1, None)), r"agents must be at most 4 for a map of \(2, 2\) tokens, got 9"),
        ((None, (2, None, 2, None)), r"stripes must be None where they are in \(None, None, 2, None\), got \(2, None"),
    ],
)
def test_sizes_that_do_not_fit_change_nothing(arguments, message):
    model, x = tiny(agents=(4, 9, None, None)).eval(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        model.set_input_size(*arguments)
    assert torch.equal(model(x), expected)


def test_images_of_another_size_are_named():
    with pytest.raises(ValueError, match=r"x must have \(64, 64\) rows and columns, got \(64, 96\): call set_input"):
        tiny()(torch.randn(1, 3, 64, 96))


def test_training_reaches_every_parameter():
    model = tiny(stripes=(8, None, 2, None), num_heads=(2, 2, 4, 4), drop_path_rate=0.1, proj_drop_rate=0.1,
                 attn_drop_rate=0.1)  # fmt: skip
    model.set_grad_checkpointing()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_features():
    arguments = {**TINY, "img_size": (64, 96)}
    model = timm.create_model("va_agent_cswin_tiny", features_only=True, out_indices=(0, 2), **arguments)
    assert [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))] == [(1, 8, 16, 24), (1, 32, 4, 6)]
    assert model.feature_info.reduction() == [4, 16]
    assert not any(name.startswith(("stage4", "merge3", "norm", "head")) for name in model.state_dict())


def test_classifier_channels_and_groups():
    check_classifier(tiny, 64)
    model = tiny()
    first = ("stage1_conv_embed.0", "stage1.0.qkv", "merge1.conv", "stage2.0.qkv", "stage2.1.qkv", "merge2.conv",
             "stage3.0.qkv", "merge3.conv", "stage4.0.qkv", "norm", "head")  # fmt: skip
    check_order_of_groups(model, [f"{name}.weight" for name in first])
    assert "stage1.0.attns.0.an_bias" in model.no_weight_decay()
    assert "stage3.0.attns.0.get_v.weight" not in model.no_weight_decay()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agents": (9, 4)}, r"agents must have 4 values, got \(9, 4\)"),
        ({"stripes": (None, None, 3, None)}, r"stripes must divide the map \(4, 4\) of stage 3 .* got 3"),
        ({"stripes": (None, None, 0, None)}, r"stripes must divide the map \(4, 4\) of stage 3 .* got 0"),
        ({"num_heads": (1, 2, 3, 4)}, "CrossShapedBlock: num_heads must be even with stripes, got 3"),
        ({"num_heads": (1, 2, 4, 3)}, "StripeAttention: num_heads must divide dim=64, got 3"),
        ({"agents": (9, 100, None, None)}, r"agents must be at most 64 for a map of \(8, 8\) tokens, got 100"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_stripes_that_do_not_divide_the_map_are_named():
    with pytest.raises(ValueError, match=r"StripeAttention: stripe must divide grid=\(6, 8\), got \(6, 3\)"):
        StripeAttention(8, (6, 8), (6, 3), 2)
    with pytest.raises(ValueError, match=r"StripeAgentAttention: stripe must divide grid=\(6, 8\), got \(4, 8\)"):
        StripeAgentAttention(8, (6, 8), (4, 8), 2, agents=4)


def test_resized_models_are_saved_under_their_size(tmp_path):
    model = timm.create_model("va_agent_cswin_tiny", num_classes=3, **TINY).eval()
    model.set_input_size((96, 64))
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.img_size == (96, 64)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
