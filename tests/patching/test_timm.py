"""Swapping attention in timm's vision transformers."""

import copy
import io
import pickle

import pytest
import timm
import torch

import vision_attn as va

MODELS = {
    "class token": ("vit_tiny_patch16_224", {"img_size": (80, 112)}),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {"img_size": (80, 112)}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (70, 98), "init_values": 1.0}),
    "rope": ("eva02_tiny_patch14_224", {"img_size": (70, 98)}),
    "rope and registers": ("vit_small_patch16_dinov3", {"img_size": (80, 112), "init_values": 1.0}),
    "pooling attention": ("vit_base_patch16_siglip_224", {"img_size": (80, 112), "embed_dim": 96, "num_heads": 4}),
    "no class token": ("vit_base_patch16_gap_224", {"img_size": (80, 112), "embed_dim": 96, "num_heads": 4}),
    "attention in the block": ("vit_base_patch16_xp_224", {"img_size": (80, 112), "embed_dim": 96, "num_heads": 4}),
}
PREFIX = {
    "class token": 1,
    "two class tokens": 2,
    "registers": 5,
    "rope": 1,
    "rope and registers": 5,
    "attention in the block": 1,
}


def make(kind):
    torch.manual_seed(0)
    name, changes = MODELS[kind]
    model = timm.create_model(name, depth=2, num_classes=5, **changes).eval()
    for parameter in model.blocks.parameters():  # as far from uniform attention as in a trained model
        parameter.data += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model, torch.randn(2, 3, *changes["img_size"])


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_swap_and_back(kind):
    model, x = make(kind)
    stock, classes = model(x), {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    with va.patch(model, va.Neighborhood(99)) as patch:
        assert (model(x) - stock).abs().max() <= 2e-5 * stock.abs().max()
        assert list(model.state_dict()) == keys
        assert len(patch.routed) == 2
        for calls in patch.calls.values():
            assert [call.kind for call in calls] == ["operator"]
            assert calls[0].layout == va.TokenLayout((5, 7), text_before=PREFIX.get(kind, 0))
    with va.patch(model, va.Neighborhood(3)):
        assert (model(x) - stock).abs().max() > 1e-2 * stock.abs().max()
    assert torch.equal(model(x), stock)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not any("_vision_attn_layer" in vars(module) for module in model.modules())


@torch.no_grad()
def test_a_window_in_every_layer_is_masked_attention(monkeypatch):
    """Against timm's own code with a mask given to it."""
    model, x = make("class token")
    op = va.Neighborhood((3, 5))
    mask = op.mask(va.TokenLayout((5, 7), text_before=1))
    with va.patch(model, op):
        ours = model(x)
    for block in model.blocks:
        plain = block.attn.forward
        monkeypatch.setattr(block.attn, "forward", lambda y, attn_mask=None, is_causal=False, f=plain: f(y, mask))
    torch.testing.assert_close(ours, model(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dynamic_image_sizes_and_every_way_in():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True, num_classes=5).eval()
    with va.patch(model, va.Clear(99)) as patch:
        for size in ((96, 160), (64, 48)):
            x = torch.randn(1, 3, *size)
            results = model(x), model.forward_features(x), model.forward_intermediates(x, indices=1)[0]
            assert patch.calls["blocks.0.attn"][-1].layout.grid == (size[0] // 16, size[1] // 16)
            patch.remove()
            expected = model(x), model.forward_features(x), model.forward_intermediates(x, indices=1)[0]
            for a, b in zip(results, expected, strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
            patch = va.patch(model, va.Clear(99))
        patch.remove()


@torch.no_grad()
def test_features_only():
    model = timm.create_model("vit_tiny_patch16_224", depth=3, features_only=True, img_size=(80, 112)).eval()
    x = torch.randn(1, 3, 80, 112)
    stock = model(x)
    with va.patch(model, va.Neighborhood(99)) as patch:
        assert [layer.name for layer in patch.routed] == [f"model.blocks.{i}.attn" for i in range(3)]
        for a, b in zip(model(x), stock, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
        assert patch.calls
    for a, b in zip(model(x), stock, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_layers_and_dicts_of_operators():
    model, x = make("class token")
    with va.patch(model, layers={"blocks.0.*": va.Agent(9), "*": va.LSDA(2)}) as patch:
        model(x)
        assert {layer.name: str(layer.operator) for layer in patch.routed} == {
            "blocks.0.attn": "agent(agents=9)",
            "blocks.1.attn": "lsda(group=2)",
        }
    with va.patch(model, va.Halo(2, 1), layers="blocks.1.*") as patch:
        assert [(s.name, s.reason) for s in patch.skipped] == [("blocks.0.attn", "not selected by layers")]
        with pytest.raises(
            va.PatchError, match=r"each layer must be patched once, got 'blocks.1.attn', which has halo"
        ):
            va.patch(model, va.Halo(2, 1))
        with va.patch(model, va.HiLo(), layers="blocks.0.*"):
            model(x)
    va.patch(model, va.Dense())
    va.unpatch(model)
    va.unpatch(model)
    assert type(model.blocks[0].attn).__dict__.get("stock_class") is None


def test_training_with_checkpointing_gives_the_same_gradients():
    model, x = make("class token")

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    with va.patch(model, va.Neighborhood(3)):
        plain = gradients()
        model.set_grad_checkpointing()
        for a, b in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(a, b)


def test_grids_of_the_same_length_are_not_confused_in_checkpoints():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True, num_classes=5)
    model.set_grad_checkpointing()
    with va.patch(model, va.Neighborhood(3)):
        loss = model(torch.randn(1, 3, 64, 64)).sum() + model(torch.randn(1, 3, 32, 128)).sum()
        with pytest.raises(va.PatchError, match="call backward before the next forward"):
            loss.backward()
        model(torch.randn(1, 3, 64, 64)).sum().backward()
        model(torch.randn(1, 3, 32, 128)).sum().backward()


@torch.no_grad()
def test_copies_are_patched_and_pickles_are_stock():
    model, x = make("class token")
    stock = model(x)
    with va.patch(model, va.Neighborhood(3)):
        patched = model(x)
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        assert b"vision_attn" not in pickle.dumps(model.blocks[0].attn)
    assert torch.equal(twin(x), patched)
    va.unpatch(twin)
    assert torch.equal(twin(x), stock)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), stock)


@torch.no_grad()
def test_full_graph_compile():
    torch._dynamo.reset()
    model, x = make("class token")
    with va.patch(model, va.Neighborhood(3)):
        eager = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(x), eager)


def test_unfused_attention_is_named():
    model, _ = make("class token")
    model.blocks[0].attn.fused_attn = False
    with va.patch(model, va.Dense()) as patch:
        assert patch.skipped[0].name == "blocks.0.attn"
        assert "fused_attn is False" in patch.skipped[0].reason
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(va.PatchError, match=r"at least one attention to route, got none: blocks.0.attn: fused_attn is"):
        va.patch(model, va.Dense())


@torch.no_grad()
def test_attention_without_a_call_is_listed():
    import vision_attn.backbones.agent_deit as agent_deit

    model = agent_deit.AgentVisionTransformer(img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=3, agents=9,
                                              agent_blocks=1).eval()  # fmt: skip
    with va.patch(model, va.Neighborhood(3)) as patch:
        model(torch.randn(1, 3, 32, 32))
        assert [layer.name for layer in patch.routed] == ["blocks.1.attn"]
        reason = "AgentAttention makes no attention call that can be routed"
        assert [(s.name, s.reason) for s in patch.skipped] == [("blocks.0.attn", reason)]


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "swinv2_tiny_window8_256",
        "levit_128s",
        "mvitv2_tiny",
        "coat_tiny",
        "efficientvit_b0",
        "nest_tiny",
        "twins_svt_small",
        "sam2_hiera_tiny",
    ],
)
def test_other_families_are_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(va.PatchError, match=f"got {type(model).__name__}, whose attention tells no map of tokens"):
        va.patch(model, va.Neighborhood(3), layers=lambda layer: True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("beit_base_patch16_224", {"init_values": 1.0}),
        ("vit_relpos_base_patch16_224", {"init_values": 1.0}),
        ("vit_relpos_base_patch16_clsgap_224", {"init_values": 1.0}),
    ],
)
def test_a_window_under_a_bias_per_head(monkeypatch, name, changes):
    """Against timm's own code with every mask of an attention call changed on its way."""
    model = timm.create_model(name, depth=2, embed_dim=96, num_heads=4, img_size=(80, 112), **changes).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2 * parameter.std().nan_to_num(1).clamp(min=0.1)
    x = torch.randn(2, 3, 80, 112)
    prefix = model.num_prefix_tokens
    op = va.Neighborhood((3, 5))
    with va.patch(model, op) as patch:
        ours = model(x)
        for layer, calls in patch.calls.items():
            assert [(call.kind, call.layout.text_before) for call in calls] == [("operator", prefix)], layer
            assert "as a mask on dense attention, exact but no faster: Neighborhood: attn_mask" in calls[0].reason
        assert "exact but no faster" in str(patch)
    window = torch.ones(35 + prefix, 35 + prefix, dtype=torch.bool)
    window[prefix:, prefix:] = op.mask(va.TokenLayout((5, 7)))
    genuine = torch.nn.functional.scaled_dot_product_attention

    def windowed(query, key, value, attn_mask=None, **others):
        return genuine(query, key, value, attn_mask=attn_mask.masked_fill(~window, -torch.inf), **others)

    stock = model(x)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", windowed)
    torch.testing.assert_close(ours, model(x), atol=1e-5, rtol=1e-4)
    assert (ours - stock).abs().max() > 1e-2 * stock.abs().max()


@torch.no_grad()
def test_a_bias_per_head_is_refused_or_listed_where_the_operator_is_no_mask():
    model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=96, num_heads=4, img_size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    stock = model(x)
    with (
        va.patch(model, va.HiLo()),
        pytest.raises(va.PatchError, match=r"cannot honour the call of 'blocks.0.attn': .* the same for all heads"),
    ):
        model(x)
    with va.patch(model, va.HiLo(), strict=False) as patch:
        assert torch.equal(model(x), stock)
        assert [call.kind for call in patch.calls["blocks.0.attn"]] == ["dense"]


@pytest.mark.parametrize(("name", "value"), [("grid", (5, 7)), ("steps", range(3)), ("trainable", True)])
def test_arguments_without_meaning_are_named(name, value):
    model, _ = make("class token")
    with pytest.raises(va.PatchError, match=rf"{name} must be left out for the timm model VisionTransformer, got"):
        va.patch(model, va.Dense(), **{name: value})


@pytest.mark.parametrize("kind", ["registers", "rope", "no class token"])
def test_verify(kind):
    report = va.verify(make(kind)[0])
    assert report.passed
    moved = next(check for check in report.checks if check.name == "a pixel moves its token")
    assert moved.passed
    assert f"grid (5, 7), {PREFIX.get(kind, 0)} before" in moved.detail


def test_verify_with_a_bias_per_head():
    changes = {"embed_dim": 96, "num_heads": 4, "img_size": (80, 112), "init_values": 1.0}
    report = va.verify(timm.create_model("beit_base_patch16_224", depth=2, **changes))
    assert "2 of 2 layers by the operator" in str(report)


def test_verify_refuses_by_name():
    with pytest.raises(va.PatchError, match="got ResNet, whose attention tells no map of tokens"):
        va.verify(timm.create_model("resnet18"))


def test_a_bias_that_learns_from_zero_is_not_left_out():
    """It hides nothing yet, but its gradient must not get lost."""
    model = timm.create_model("beit_base_patch16_224", img_size=64, patch_size=16, embed_dim=16, depth=1, num_heads=2)
    x = torch.randn(1, 3, 64, 64)
    with va.patch(model, va.Neighborhood(3)):
        model(x).sum().backward()
    assert model.blocks[0].attn.relative_position_bias_table.grad.abs().sum() > 0
    for op in (va.AgentSD(sx=2, sy=2), va.Agent(4)):
        with va.patch(model, op), pytest.raises(va.PatchError, match=r"attn_mask .* need.* a gradient"):
            model(x)


def test_our_own_backbones_are_refused_by_name():
    import vision_attn.backbones  # noqa: F401 - registers the names

    model = timm.create_model("va_nat_mini", depths=(1, 1, 1, 1), embed_dim=16)
    with pytest.raises(va.PatchError, match=r"target must be a timm model .* got NeighborhoodTransformer"):
        va.patch(model, va.Neighborhood(3))


def test_verify_sees_through_a_classifier_of_zeros():
    model = timm.create_model("hiera_tiny_224", img_size=64, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)).eval()
    assert not model(torch.randn(1, 3, 64, 64)).any()
    assert va.verify(model).passed
