"""BiFormer: its attention against the paper's formula, released weights, and the models as timm's users know them."""

import pytest
import timm
import torch
from model_checks import check_classifier, check_order_of_groups, check_released_file, check_released_file_for_others
from torch.nn.functional import conv2d, gelu, layer_norm, linear

import vision_attn as va
from vision_attn.backbones.biformer import BiFormer, BiLevelRoutingAttention, ConvolvedAttention

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "head_dim": 4, "num_heads": 2, "mlp_ratio": 2}
ROUTES = {"regions": 2, "topks": (1, 2, 3, None)}
SIZES = {
    "tiny": {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 8, 2), "mlp_ratio": 3},
    "small": {"embed_dims": (64, 128, 256, 512), "depths": (4, 4, 18, 4), "mlp_ratio": 3},
    "base": {"embed_dims": (96, 192, 384, 768), "depths": (4, 4, 18, 4), "mlp_ratio": 3},
}


def tiny(**changes):
    torch.manual_seed(0)
    return BiFormer(**{"num_classes": 10, **TINY, **ROUTES, **changes})


def released(embed_dims, depths, mlp_ratio, classes=1000, **unused):
    """Names and shapes of the released weights, by the rules of their code."""
    shapes = {}

    def add(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def add_batch_norm(name, dim):
        add(name, dim)
        shapes.update(
            {f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,), f"{name}.num_batches_tracked": ()}
        )

    half = embed_dims[0] // 2
    add("downsample_layers.0.0", half, 3, 3, 3)
    add_batch_norm("downsample_layers.0.1", half)
    add("downsample_layers.0.3", embed_dims[0], half, 3, 3)
    add_batch_norm("downsample_layers.0.4", embed_dims[0])
    for stage, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
        if stage > 0:
            add(f"downsample_layers.{stage}.0", dim, embed_dims[stage - 1], 3, 3)
            add_batch_norm(f"downsample_layers.{stage}.1", dim)
        for block in (f"stages.{stage}.{place}" for place in range(depth)):
            add(f"{block}.pos_embed", dim, 1, 3, 3)
            add(f"{block}.norm1", dim)
            add(f"{block}.attn.lepe", dim, 1, 5, 5)
            if stage < 3:
                add(f"{block}.attn.qkv.qkv", 3 * dim, dim)
                add(f"{block}.attn.wo", dim, dim)
            else:
                add(f"{block}.attn.qkv", 3 * dim, dim, bias=False)
                add(f"{block}.attn.proj", dim, dim)
            add(f"{block}.norm2", dim)
            add(f"{block}.mlp.0", mlp_ratio * dim, dim)
            add(f"{block}.mlp.3", dim, mlp_ratio * dim)
    add_batch_norm("norm", embed_dims[-1])
    add("head", classes, embed_dims[-1])
    return shapes


def attention(q, k, v, heads, scale, visible):
    """Dense, `[B, N, C]`, under a mask `[B, N, N]`."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    logits = (scale * q @ k.mT).masked_fill(~visible[:, None], float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def local(convolution, x):
    dim = x.shape[-1]
    return conv2d(x.permute(0, 3, 1, 2), convolution.weight, convolution.bias, padding=2, groups=dim).permute(
        0, 2, 3, 1
    )


def region_of(length, regions):
    """The region of each token on an axis."""
    starts = torch.tensor([index * length // regions for index in range(regions)])
    return (torch.arange(length)[:, None] >= starts).sum(1) - 1


def truth(module, x, regions, topk):
    """Equations 3 to 5 of the paper, the choice of regions as a mask over tokens."""
    batch, rows, columns, dim = x.shape
    down, across = min(regions, rows), min(regions, columns)
    region = (region_of(rows, down)[:, None] * across + region_of(columns, across)).flatten()
    q, k, v = module.qkv.qkv(x).flatten(1, 2).chunk(3, -1)
    mean_q, mean_k = (torch.stack([t[:, region == r].mean(1) for r in range(down * across)], 1) for t in (q, k))
    order = (mean_q @ mean_k.mT).argsort(-1, descending=True)
    chosen = torch.zeros(batch, down * across, down * across, dtype=torch.bool)
    chosen.scatter_(-1, order[..., :topk], True)
    visible = chosen[:, region][:, :, region]
    output = attention(q, k, v, module.num_heads, dim**-0.5, visible).view(x.shape)
    return module.wo(output + local(module.lepe, v.view(x.shape)))


@pytest.mark.parametrize(
    ("shape", "regions", "topk"),
    [((4, 6), 2, 1), ((6, 9), 3, 4), ((7, 11), 3, 2), ((5, 4), 3, 9), ((3, 8), 7, 5), ((1, 2), 7, 16)],
)
def test_attention(shape, regions, topk):
    module = BiLevelRoutingAttention(12, 3, regions, topk).double()
    x = torch.randn(2, *shape, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), truth(module, x, regions, topk))


def test_attention_is_the_operator_between_projections():
    module = BiLevelRoutingAttention(12, 3, 3, 2)
    x = torch.randn(2, 6, 9, 12)
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, 3, 4)).unbind(2)
    output = va.BiLevelRouting(regions=3, topk=2)(q, k, v, va.TokenLayout((6, 9)), 12**-0.5)
    expected = module.wo(output.flatten(2).view(x.shape) + local(module.lepe, v.flatten(2).view(x.shape)))
    torch.testing.assert_close(module(x), expected)


def test_attention_of_the_last_stage():
    """The convolution is of the input, not of the values, and the scale is a head's."""
    module = ConvolvedAttention(12, 3).double()
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    everything = torch.ones(1, 20, 20, dtype=torch.bool)
    output = attention(*module.qkv(x).flatten(1, 2).chunk(3, -1), 3, 0.5, everything).view(x.shape)
    torch.testing.assert_close(module(x), module.proj(output + local(module.lepe, x)))


def test_order_of_layers():
    """Every layer but attention, from the weights by their released names."""
    model = tiny().double().eval()
    w = {name: torch.randn(v.shape, dtype=v.dtype).abs() if v.ndim else v for name, v in model.state_dict().items()}
    w = {name: v - 0.7 if name.endswith("weight") else v for name, v in w.items()}  # variances stay positive
    model.load_state_dict(w)

    def batch_norm(x, name):
        x, mean, variance, weight, bias = (t if t.ndim == 4 else t[:, None, None] for t in (
            x, *(w[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))))  # fmt: skip
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def halved(x, stage, place):
        name = f"downsample_layers.{stage}.{place}"
        x = conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)
        return batch_norm(x, f"downsample_layers.{stage}.{place + 1}")

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    image = x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for stage, depth in enumerate(TINY["depths"]):
        x = halved(gelu(halved(x, 0, 0)), 0, 3) if stage == 0 else halved(x, stage, 0)
        for place in range(depth):
            block = f"stages.{stage}.{place}"
            position = conv2d(
                x, w[f"{block}.pos_embed.weight"], w[f"{block}.pos_embed.bias"], padding=1, groups=x.shape[1]
            )
            x = (x + position).permute(0, 2, 3, 1)
            x = x + model.get_submodule(f"{block}.attn")(norm(x, f"{block}.norm1"))
            hidden = gelu(linear(norm(x, f"{block}.norm2"), w[f"{block}.mlp.0.weight"], w[f"{block}.mlp.0.bias"]))
            x = x + linear(hidden, w[f"{block}.mlp.3.weight"], w[f"{block}.mlp.3.bias"])
            x = x.permute(0, 3, 1, 2)
    expected = linear(batch_norm(x, "norm").mean((2, 3)), w["head.weight"], w["head.bias"])
    torch.testing.assert_close(model(image), expected)


@pytest.mark.parametrize("size", [(64, 64), (97, 70), (32, 61), (7, 9)])
def test_any_image_size(size):
    output = tiny(regions=7).eval()(torch.randn(2, 3, *size))
    assert output.shape == (2, 10)
    assert output.isfinite().all()


def test_half_precision():
    model, x = tiny(topks=(4, 4, 4, None)).eval(), torch.randn(2, 3, 64, 64)  # all regions: rounding chooses no other
    expected, output = model(x), model.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)


def test_regions_heads_scales_and_norms_are_the_released_ones():
    with torch.device("meta"):
        model = timm.create_model("va_biformer_base")
    routing = [stage[-1].attn for stage in model.stages[:3]]
    assert [(a.routing.regions, a.routing.topk, a.num_heads) for a in routing] == [(7, 1, 3), (7, 4, 6), (7, 16, 12)]
    assert [a.scale for a in routing] == [96**-0.5, 192**-0.5, 384**-0.5]
    assert model.stages[3][0].attn.num_heads == 8
    assert {layer.eps for layer in model.modules() if isinstance(layer, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_the_released_ones(size):
    with torch.device("meta"):
        model = timm.create_model(f"va_biformer_{size}")
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == released(**SIZES[size])


def test_released_file_and_round_trip(tmp_path):
    check_released_file("va_biformer_tiny", released(**TINY), TINY | ROUTES, tmp_path)


def test_released_file_for_other_classes_and_channels(tmp_path):
    check_released_file_for_others("va_biformer_tiny", released(**TINY), TINY, tmp_path)


def test_training_reaches_every_parameter():
    """Also those of queries and keys, by the attention within the chosen regions."""
    model = tiny(drop_path_rate=0.1, drop_rate=0.1)
    model.set_grad_checkpointing()
    model(torch.randn(4, 3, 64, 96)).square().sum().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for name in ("stages.0.0.attn.qkv.qkv.weight", "stages.2.0.attn.qkv.qkv.weight"):
        assert all(part.any() for part in model.get_parameter(name).grad.chunk(3))


def test_checkpointing_changes_no_gradient():
    model, gradients = tiny(), []
    x = torch.randn(2, 3, 64, 96)
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_features_classifier_and_groups():
    model = timm.create_model("va_biformer_tiny", features_only=True, out_indices=(0, 2), **TINY, **ROUTES)
    assert [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))] == [(1, 8, 16, 24), (1, 24, 4, 6)]
    assert model.feature_info.reduction() == [4, 16]
    check_classifier(tiny, 32)
    model = tiny()
    assert model.no_weight_decay() == set()
    firsts = ["downsample_layers.0.0.weight", "stages.0.0.pos_embed.weight", "downsample_layers.1.0.weight",
              "stages.1.0.attn.wo.weight", "stages.1.1.attn.wo.weight", "stages.3.0.attn.proj.weight",
              "norm.weight"]  # fmt: skip
    check_order_of_groups(model, firsts)


def test_full_graph_compile():
    torch._dynamo.reset()
    model = tiny().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((64, 64), (96, 64)):  # the second one is compiled with symbolic sizes
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head_dim": 3}, ValueError, r"BiFormer: head_dim must divide embed_dims=\(8, 16, 24, 32\), got 3"),
        ({"head_dim": 0}, ValueError, r"BiFormer: head_dim must divide embed_dims=\(8, 16, 24, 32\), got 0"),
        ({"num_heads": 5}, ValueError, "ConvolvedAttention: num_heads must divide dim=32, got 5"),
        ({"topks": (1, 2)}, ValueError, r"BiFormer: topks must have 4 values, got \(1, 2\)"),
        ({"embed_dims": (8, 16)}, ValueError, r"BiFormer: embed_dims must have 4 values, got \(8, 16\)"),
        ({"topks": (1, 0, 3, None)}, ValueError, "BiLevelRouting: topk must be at least 1, got 0"),
        ({"topks": (1, 2.5, 3, None)}, TypeError, "BiLevelRouting: topk must be an integer, got 2.5"),
        ({"regions": 0}, ValueError, "BiLevelRouting: regions must be .* got 0"),
        ({"global_pool": "max"}, ValueError, "BiFormer: global_pool must be 'avg' or '', got 'max'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny(**arguments)


def test_heads_of_routing_attention():
    with pytest.raises(ValueError, match="BiLevelRoutingAttention: num_heads must divide dim=8, got 3"):
        BiLevelRoutingAttention(8, 3, 7, 1)
