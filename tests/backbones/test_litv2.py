"""LITv2: its attention and its token merging against their formulas, released weights, and the models as timm's users
know them."""

import math

import pytest
import timm
import torch
from model_checks import check_classifier, check_order_of_groups, check_released_file, check_released_file_for_others
from torch.nn.functional import conv2d, gelu, layer_norm, linear

import vision_attn as va
from vision_attn.backbones.litv2 import DeformableConvolution, HiLoAttention, LITv2

TINY = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 2), "alpha": 0.5, "mlp_ratio": 2.0}
SIZES = {
    "small": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "alpha": 0.9, "mlp_ratio": 4.0},
    "medium": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "alpha": 0.9, "mlp_ratio": 4.0},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "alpha": 0.9, "mlp_ratio": 4.0},
}


def tiny(**changes):
    torch.manual_seed(0)
    return LITv2(**{"num_classes": 10, **TINY, **changes})


def released(embed_dim, depths, num_heads, alpha, mlp_ratio, classes=1000):
    """Names and shapes of the released weights, by the rules of their code."""
    shapes = {}

    def add(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    add("patch_embed.proj", embed_dim, 3, 4, 4)
    add("patch_embed.norm", embed_dim)
    for stage, depth in enumerate(depths):
        dim = embed_dim * 2**stage
        hidden = int(mlp_ratio * dim)
        for block in (f"layers.{stage}.blocks.{place}" for place in range(depth)):
            if stage >= 2:
                lo = num_heads[stage] if stage == 3 else int(alpha * num_heads[stage])
                lo_dim, hi_dim = (heads * dim // num_heads[stage] for heads in (lo, num_heads[stage] - lo))
                add(f"{block}.norm1", dim)
                add(f"{block}.attn.l_q", lo_dim, dim)
                add(f"{block}.attn.l_kv", 2 * lo_dim, dim)
                add(f"{block}.attn.l_proj", lo_dim, lo_dim)
                if hi_dim:
                    add(f"{block}.attn.h_qkv", 3 * hi_dim, dim)
                    add(f"{block}.attn.h_proj", hi_dim, hi_dim)
            add(f"{block}.norm2", dim)
            add(f"{block}.mlp.fc1", hidden, dim)
            add(f"{block}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
            add(f"{block}.mlp.fc2", dim, hidden)
        if stage < 3:
            merging = f"layers.{stage}.downsample"
            add(f"{merging}.dconv", 2 * dim, dim, 2, 2)
            add(f"{merging}.dconv.conv_offset", 8, dim, 2, 2)
            add(f"{merging}.norm_layer", 2 * dim)
            shapes |= {f"{merging}.norm_layer.running_{kind}": (2 * dim,) for kind in ("mean", "var")}
            shapes[f"{merging}.norm_layer.num_batches_tracked"] = ()
    add("norm", 8 * embed_dim)
    add("head", classes, 8 * embed_dim)
    return shapes


def truth(module, x):
    """Section 3 of the paper with masks: hi heads see their window, lo heads the means of all windows."""
    batch, rows, columns, dim = x.shape
    s, size = module.window, dim // (module.hi_heads + module.lo_heads)
    y, col = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)

    def attend(q, k, v, visible, heads):
        q, k, v = (t.reshape(batch, -1, heads, size).transpose(1, 2) for t in (q, k, v))
        logits = (q @ k.mT / math.sqrt(size)).masked_fill(~visible, float("-inf"))
        return (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, rows, columns, -1)

    outputs = []
    if module.hi_heads:
        first_y, first_x = (y // s * s).clamp(max=max(rows - s, 0)), (col // s * s).clamp(max=max(columns - s, 0))
        below, right = y - first_y[:, None], col - first_x[:, None]
        visible = (below >= 0) & (below < s) & (right >= 0) & (right < s)
        outputs.append(module.h_proj(attend(*module.h_qkv(x).chunk(3, -1), visible, module.hi_heads)))
    if module.lo_heads:
        means = [x[:, top : top + s, left : left + s].mean((1, 2)) for top in range(0, rows, s)
                 for left in range(0, columns, s)]  # fmt: skip
        key, value = module.l_kv(torch.stack(means, 1)).chunk(2, -1)
        everything = torch.ones(rows * columns, len(means), dtype=torch.bool)
        outputs.append(module.l_proj(attend(module.l_q(x), key, value, everything, module.lo_heads)))
    return torch.cat(outputs, -1)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 3)])
@pytest.mark.parametrize(("window", "alpha"), [(2, 0.9), (2, 0.0), (2, 1.0), (3, 0.5), (1, 0.5)])
def test_attention(shape, window, alpha):
    module = HiLoAttention(12, 3, window, alpha).double()
    x = torch.randn(2, *shape, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), truth(module, x))


def test_attention_is_the_operator_between_projections():
    module = HiLoAttention(12, 3, 2, 0.9)
    x = torch.randn(2, 5, 6, 12)
    hi = module.h_qkv(x).chunk(3, -1)
    lo = (module.l_q(x), *module.l_kv(x).chunk(2, -1))
    q, k, v = (torch.cat(pair, -1).flatten(1, 2).unflatten(-1, (3, 4)) for pair in zip(hi, lo, strict=True))
    output = va.HiLo(alpha=0.9, window=2)(q, k, v, va.TokenLayout((5, 6))).flatten(2)
    expected = torch.cat([module.h_proj(output[..., :4]), module.l_proj(output[..., 4:])], -1).view(x.shape)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


def bilinear(image, y, x):
    """`[C, Y, X]` at a real place, zero outside."""
    total, top, left = torch.zeros_like(image[:, 0, 0]), math.floor(y), math.floor(x)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total = total + (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return total


def test_deformable_convolution():
    layer = DeformableConvolution(3, 4).double()
    torch.nn.init.normal_(layer.conv_offset.weight)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    offsets = layer.conv_offset(x).detach()
    expected = layer.bias[:, None, None].expand(2, 4, 2, 3).clone()
    for b in range(2):
        for y in range(2):
            for column in range(3):
                for tap in range(4):
                    down, right = offsets[b, 2 * tap : 2 * tap + 2, y, column].tolist()
                    seen = bilinear(x[b], 2 * y + tap // 2 + down, 2 * column + tap % 2 + right)
                    expected[b, :, y, column] += layer.weight[:, :, tap // 2, tap % 2] @ seen
    torch.testing.assert_close(layer(x), expected)


def test_deformable_convolution_starts_as_a_convolution():
    layer, x = DeformableConvolution(3, 4), torch.randn(2, 3, 5, 6)
    expected = conv2d(x, layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)


def test_order_of_layers():
    """Every layer but attention and deformable convolution, from the weights by their released names."""
    model = tiny().double().eval()
    w = {name: torch.randn(v.shape, dtype=v.dtype).abs() if v.ndim else v for name, v in model.state_dict().items()}
    w = {name: v - 0.7 if name.endswith("weight") else v for name, v in w.items()}  # variances stay positive
    model.load_state_dict(w)

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def mlp(x, name):
        x = linear(x, w[f"{name}.fc1.weight"], w[f"{name}.fc1.bias"]).permute(0, 3, 1, 2)
        x = conv2d(x, w[f"{name}.dwconv.dwconv.weight"], w[f"{name}.dwconv.dwconv.bias"], padding=1, groups=x.shape[1])
        return linear(gelu(x.permute(0, 2, 3, 1)), w[f"{name}.fc2.weight"], w[f"{name}.fc2.bias"])

    def merged(x, name):
        x = model.get_submodule(f"{name}.dconv")(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mean, variance, weight, bias = (
            w[f"{name}.norm_layer.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return gelu((x - mean) / (variance + 1e-5).sqrt() * weight + bias)

    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    x = conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    for stage, depth in enumerate(TINY["depths"]):
        for block in (f"layers.{stage}.blocks.{place}" for place in range(depth)):
            if stage >= 2:
                x = x + model.get_submodule(f"{block}.attn")(norm(x, f"{block}.norm1"))
            x = x + mlp(norm(x, f"{block}.norm2"), f"{block}.mlp")
        if stage < 3:
            x = merged(x, f"layers.{stage}.downsample")
    expected = linear(norm(x, "norm").mean((1, 2)), w["head.weight"], w["head.bias"])
    torch.testing.assert_close(model(image), expected)


@pytest.mark.parametrize("size", [(64, 64), (97, 70), (32, 61), (29, 32)])
def test_any_image_size(size):
    output = tiny().eval()(torch.randn(2, 3, *size))
    assert output.shape == (2, 10)
    assert output.isfinite().all()


def test_a_cut_patch_is_padded_with_zeros():
    model, x = tiny().eval(), torch.randn(2, 3, 62, 65)
    padded = torch.zeros(2, 3, 64, 68)
    padded[:, :, :62, :65] = x
    torch.testing.assert_close(model(x), model(padded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = tiny().eval(), torch.randn(2, 3, 64, 64)
    expected, output = model(x), model.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)


def test_windows_and_norms_are_the_released_ones():
    with torch.device("meta"):
        model = timm.create_model("va_litv2_base")
    attentions = [[block.attn for block in level.blocks] for level in model.layers]
    assert attentions[:2] == [[None] * 2] * 2
    assert {(a.window, a.hi_heads, a.lo_heads) for a in attentions[2]} == {(2, 2, 14)}
    assert {(a.window, a.hi_heads, a.lo_heads) for a in attentions[3]} == {(1, 0, 32)}
    assert {layer.eps for layer in model.modules() if isinstance(layer, torch.nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_the_released_ones(size):
    with torch.device("meta"):
        model = timm.create_model(f"va_litv2_{size}")
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == released(**SIZES[size])


def test_released_file_and_round_trip(tmp_path):
    check_released_file("va_litv2_small", released(**TINY), TINY, tmp_path)


def test_released_file_for_other_classes_and_channels(tmp_path):
    check_released_file_for_others("va_litv2_small", released(**TINY), TINY, tmp_path)


def test_training_reaches_every_parameter():
    model = tiny(drop_path_rate=0.1, proj_drop_rate=0.1, drop_rate=0.1)
    model.set_grad_checkpointing()
    model(torch.randn(4, 3, 64, 96)).square().sum().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_features_classifier_and_groups():
    model = timm.create_model("va_litv2_small", features_only=True, out_indices=(0, 2), **TINY)
    assert [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))] == [(1, 16, 16, 24), (1, 64, 4, 6)]
    assert model.feature_info.reduction() == [4, 16]
    check_classifier(tiny, 128)
    model = tiny()
    assert model.no_weight_decay() == set()
    firsts = ["patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.weight", "layers.0.downsample.dconv.weight",
              "layers.1.blocks.0.mlp.fc1.weight", "layers.2.blocks.1.attn.l_q.weight", "norm.weight"]  # fmt: skip
    check_order_of_groups(model, firsts)


def test_full_graph_compile():
    torch._dynamo.reset()
    model = tiny().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((64, 64), (96, 64)):  # the second one is compiled with symbolic sizes
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": (1, 2, 3, 2)}, "HiLoAttention: num_heads must divide dim=64, got 3"),
        ({"num_heads": (1, 2, 0, 2)}, "HiLoAttention: num_heads must divide dim=64, got 0"),
        ({"num_heads": (1, 2)}, r"LITv2: num_heads must have 4 values, got \(1, 2\)"),
        ({"windows": (0, 2)}, r"LITv2: windows must have 4 values, got \(0, 2\)"),
        ({"windows": (0, 0, -1, 1)}, "HiLo: window must be at least 1, got -1"),
        ({"alpha": 1.5}, "HiLo: alpha must be 0 to 1, got 1.5"),
        ({"global_pool": "max"}, "LITv2: global_pool must be 'avg' or '', got 'max'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_an_image_too_small_is_named():
    with pytest.raises(
        ValueError, match=r"TokenMerging: x must have at least 2 rows and columns, got \(1, 4\): use la"
    ):
        tiny().eval()(torch.randn(1, 3, 28, 64))
