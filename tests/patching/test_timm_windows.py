"""Swapping attention in timm's models of windows, pyramids and unrolled tokens: each module tells its own grid."""

import copy
import dataclasses
import io

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm_families import CASES, MAXVIT, SMALLER, rows

import vision_attn as va
from vision_attn.patching.report import Call

KINDS = pytest.mark.parametrize("kind", CASES)
FEW = pytest.mark.parametrize("kind", ["swin", "maxvit", "davit", "pvt", "hiera"])


def masked_stock(monkeypatch, case, model, op):
    """Let the stock model compute masked attention: scores, bias, mask and softmax by hand in float64."""
    seen = []

    def attention(query, key, value, attn_mask=None, dropout_p=0.0):
        scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
        if attn_mask is not None:
            scores = scores + attn_mask.double()
        told = case.places(model, query, key)
        if told is not None:
            places, grid = told
            mask = op.mask(va.TokenLayout(grid))
            scores = scores.masked_fill(~mask[places[..., :, None], places[..., None, :]], -torch.inf)
        seen.append(told is not None)
        return (scores.softmax(-1) @ value.double()).to(value.dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    return seen


@torch.no_grad()
@KINDS
def test_report_and_removal(kind):
    case = CASES[kind]
    model, x = case.build(), case.image()
    stock, classes, keys = model(x), [type(module) for module in model.modules()], list(model.state_dict())
    with va.patch(model, va.Dense()) as patch:
        assert torch.equal(model(x), stock)
        assert list(model.state_dict()) == keys
        assert patch.calls == {
            layer: [Call("operator", "", va.TokenLayout(grid))] for layer, grid in case.grids.items()
        }
        assert {skipped.name: skipped.reason for skipped in patch.skipped} == case.skipped
    assert torch.equal(model(x), stock)
    assert [type(module) for module in model.modules()] == classes
    for module in model.modules():
        assert "_vision_attn_layer" not in vars(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@torch.no_grad()
@KINDS
@pytest.mark.parametrize("op", [va.Neighborhood((3, 2)), va.Clear(1.5)], ids=str)
def test_a_window_is_masked_attention(monkeypatch, kind, op):
    case = CASES[kind]
    model, x = case.build(), case.image()
    stock = model(x)
    with va.patch(model, op) as patch:
        ours = model(x)
        reasons = {call.reason[:28] for calls in patch.calls.values() for call in calls}
        assert all(call.kind == "operator" for calls in patch.calls.values() for call in calls)
    assert reasons == ({"as a mask on dense attention"} if case.biased else {""})
    seen = masked_stock(monkeypatch, case, model, op)
    expected = model(x)
    assert seen.count(True) == len(case.grids)
    torch.testing.assert_close(ours, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4)
    assert (ours - stock).abs().max() > 1e-2 * stock.abs().max()


@torch.no_grad()
@FEW
def test_operators_that_are_no_mask(kind):
    case = CASES[kind]
    model, x = case.build(), case.image()
    stock = model(x)
    if case.biased:
        with (
            va.patch(model, va.HiLo(0.5, 2)),
            pytest.raises(va.PatchError, match=r"cannot honour the call of .*attn_mask"),
        ):
            model(x)
        with va.patch(model, va.HiLo(0.5, 2), strict=False) as patch:
            assert torch.equal(model(x), stock)
            assert {call.kind for calls in patch.calls.values() for call in calls} == {"dense"}
        return
    with va.patch(model, va.HiLo(0.5, 2)) as patch:
        assert (model(x) - stock).abs().max() > 1e-3 * stock.abs().max()
        assert {call.kind for calls in patch.calls.values() for call in calls} == {"operator"}


@FEW
def test_gradients_with_and_without_checkpointing(monkeypatch, kind):
    case = CASES[kind]
    model, x, op = case.build(), case.image(), va.Neighborhood((3, 2))

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with va.patch(model, op):
        plain = gradients()
        model.set_grad_checkpointing()
        again = gradients()
        model.set_grad_checkpointing(False)
    masked_stock(monkeypatch, case, model, op)
    expected = gradients()
    assert plain.keys() == again.keys() == expected.keys()
    for name in plain:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(again[name], plain[name], msg=name)
        torch.testing.assert_close(plain[name], expected[name], atol=1e-4 * scale, rtol=1e-3, msg=name)


def test_grids_of_the_same_length_are_not_confused_in_checkpoints():
    """Unlike where one embedding tells the grid: modules that tell their own do so in the recomputation too."""
    model = CASES["pvt"].build()
    high, wide = torch.randn(1, 3, 160, 96), torch.randn(1, 3, 96, 160)

    def gradients():
        model.zero_grad()
        (model(high) + model(wide)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with va.patch(model, va.Neighborhood((3, 1))):
        plain = gradients()
        model.set_grad_checkpointing()
        for a, b in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["swin", "maxvit", "pvt", "hiera"])
def test_full_graph_compile(kind):
    torch._dynamo.reset()
    case = CASES[kind]
    model, x = case.build(), case.image()
    with va.patch(model, va.Neighborhood((3, 2))):
        eager = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(x), eager)


@torch.no_grad()
@FEW
def test_copies_are_patched_and_pickles_are_stock(kind):
    case = CASES[kind]
    model, x = case.build(), case.image()
    stock = model(x)
    with va.patch(model, va.Neighborhood((3, 2))):
        patched = model(x)
        twin, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
    assert torch.equal(twin(x), patched)
    va.unpatch(twin)
    assert torch.equal(twin(x), stock)
    assert b"vision_attn" not in file.getvalue()
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), stock)


@torch.no_grad()
@FEW
def test_verify(kind):
    report = va.verify(CASES[kind].build(), inputs={"x": CASES[kind].image(1)})
    assert report.passed
    assert f"{len(CASES[kind].grids)} of {len(CASES[kind].grids)} layers by the operator" in str(report)


@pytest.mark.parametrize("kind", ["swin", "maxvit", "coatnet", "davit", "pvt", "hiera"])
def test_verify_makes_up_an_image(kind):
    assert va.verify(CASES[kind].build()).passed


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # timm's resizing of bias
def test_sizes_that_change_after_the_patch(monkeypatch):
    """The map of a pyramid is that of each image; a window is what `set_input_size` makes of it."""
    model = CASES["pvt"].build()
    with va.patch(model, va.Neighborhood(3)) as patch:
        for size, grid in (((96, 160), (3, 5)), ((128, 64), (4, 2))):
            model(torch.randn(1, 3, *size))
            assert patch.calls["stages.3.blocks.0.attn"][0].layout.grid == grid
    case = CASES["swin"]
    model, op = case.build(), va.Neighborhood((3, 2))
    with va.patch(model, op) as patch:
        model.set_input_size(img_size=(96, 64), window_size=(6, 4))
        x = torch.randn(2, 3, 96, 64)
        ours = model(x)
        assert patch.calls["layers.0.blocks.1.attn"][0].layout.grid == (6, 4)
    masked_stock(monkeypatch, dataclasses.replace(case, places=rows((6, 4))), model, op)
    torch.testing.assert_close(ours, model(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_features_only_and_every_way_in():
    model = CASES["swin"].build(features_only=True)
    x = CASES["swin"].image()
    stock = model(x)
    with va.patch(model, va.Dense()) as patch:
        assert [layer.name for layer in patch.routed] == [f"layers_{i}.blocks.{j}.attn" for i in (0, 1) for j in (0, 1)]
        assert all(torch.equal(a, b) for a, b in zip(model(x), stock, strict=True))
        assert patch.calls
    case = CASES["hiera"]
    model, x = case.build(), case.image()
    with va.patch(model, va.Neighborhood(3)):
        patched = model.forward_features(x), model.forward_intermediates(x, indices=[1, 3])[1][-1]
    with va.patch(model, va.Neighborhood(99)):
        dense = model.forward_features(x), model.forward_intermediates(x, indices=[1, 3])[1][-1]
    expected = model.forward_features(x), model.forward_intermediates(x, indices=[1, 3])[1][-1]
    for a, b, c in zip(patched, dense, expected, strict=True):
        torch.testing.assert_close(b, c, atol=1e-4, rtol=1e-4)
        assert (a - c).abs().max() > 1e-2 * c.abs().max()


@torch.no_grad()
def test_dropped_mask_units_are_no_map():
    """Windows inside of units go on; attention of what is left of the whole map has no grid."""
    case = CASES["hiera"]
    model, x = case.build(), case.image()
    keep = torch.tensor([[True, False, True, True, False, True]] * 2)

    def run():
        return model.forward_intermediates(x, mask=keep, indices=[3], output_fmt="NHWC")[0]

    stock = run()
    with va.patch(model, va.Neighborhood(99), strict=False) as patch:
        torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)
        calls = patch.calls
        assert calls["blocks.0.attn"][0].kind == calls["blocks.3.attn"][0].kind == "operator"
        assert (calls["blocks.5.attn"][0].kind, calls["blocks.7.attn"][0].kind) == ("dense", "dense")
        assert calls["blocks.5.attn"][0].reason == (
            "got 16 query and 16 key tokens where the layout has 24 (0 before, grid (6, 4), 0 after)"
        )


@torch.no_grad()
def test_layers_by_name():
    model, x = CASES["maxvit"].build(), CASES["maxvit"].image()
    with va.patch(model, layers={"*.attn_block.*": va.Neighborhood(3), "stages.3.*": va.Clear(2)}) as patch:
        model(x)
        assert {layer.name: str(layer.operator) for layer in patch.routed} == {
            name: "neighborhood(kernel_size=3)" for name in MAXVIT if "attn_block" in name
        } | {"stages.3.blocks.0.attn_grid.attn": "clear(radius=2)"}
        with pytest.raises(
            va.PatchError, match=r"must be patched once, got 'stages.0.blocks.0.attn_block.attn', which"
        ):
            va.patch(model, va.Dense())


def test_unfused_attention_is_named():
    for switch, name in ((True, "swin_tiny_patch4_window7_224"), (False, "test_maxvit")):
        set_fused_attn(switch)
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        finally:
            set_fused_attn(True)
        with pytest.raises(va.PatchError, match=r"to route, got none: .* fused_attn is False.*experimental=True"):
            va.patch(model, va.Neighborhood(3))


def test_nothing_to_serve_is_named():
    block = CASES["hiera"].build().blocks[0]
    with pytest.raises(
        va.PatchError, match="to route, got none: attn: it is outside of a Hiera, which tells the order"
    ):
        va.patch(block, va.Neighborhood(3))
    with torch.device("meta"):
        model = timm.create_model("pvt_v2_b2_li", depths=(1, 1, 1, 1))
    with pytest.raises(va.PatchError, match=f"to route, got none: stages.0.blocks.0.attn: {SMALLER}"):
        va.patch(model, va.Neighborhood(3))
    model = timm.create_model(
        "hiera_tiny_224", img_size=64, mask_unit_size=(3, 3), mask_unit_attn=(True,) * 4, q_pool=0
    )
    with pytest.raises(va.PatchError, match=r"its mask unit of .* tokens is no product of strides"):
        va.patch(model, va.Neighborhood(3))
