"""What `patch` routes, what it leaves alone, and that removal is exact."""

import copy
import dataclasses
import re

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from probe_operators import Disc, Whole
from tiny_models import FLUX, QWEN, SD3, SDXL, TINY, UNET, WAN, Tiny

import vision_attn as va


def processors(model: torch.nn.Module) -> dict[str, object]:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def assert_stock(model: torch.nn.Module, stock: dict[str, object]) -> None:
    now = processors(model)
    assert now.keys() == stock.keys()
    assert all(now[name] is stock[name] for name in stock)
    assert all("layer" not in vars(processor) for processor in now.values())
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    assert not hooks
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
def test_a_patch_is_exact_and_is_undone_exactly(tiny: Tiny):
    model = tiny.model()
    stock, keys, output = processors(model), list(model.state_dict()), tiny.run(model)
    with va.patch(model, va.Dense()) as patch:
        assert torch.equal(tiny.run(model), output)
        assert patch.routed
        assert {call.kind for calls in patch.calls.values() for call in calls} == {"operator"}
        assert set(patch.calls) == {layer.name for layer in patch.routed}
        assert list(model.state_dict()) == keys
    assert_stock(model, stock)
    with va.patch(model, Whole()):
        assert torch.equal(tiny.run(model), output)
    with va.patch(model, Disc(2)) as patch:
        local = tiny.run(model)
        assert not torch.allclose(local, output, atol=1e-4)
    with va.patch(model, va.Clear(radius=2)):
        torch.testing.assert_close(tiny.run(model), local, atol=1e-5, rtol=1e-5)
    assert torch.equal(tiny.run(model), output)
    assert_stock(model, stock)


def test_report_names_what_is_routed_and_why_the_rest_is_not():
    model = WAN.model()
    patch = va.patch(model, va.Clear(radius=2))
    assert [layer.name for layer in patch.routed] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert all(layer.operator == va.Clear(radius=2) for layer in patch.routed)
    assert [layer.name for layer in patch.skipped] == ["blocks.0.attn2", "blocks.1.attn2"]
    assert all("cross-attention" in layer.reason for layer in patch.skipped)
    assert patch.calls == {}
    WAN.run(model)
    assert patch.calls["blocks.0.attn1"][0].layout == va.TokenLayout((3, 4, 5))
    assert [call.kind for call in patch.calls["blocks.0.attn1"]] == ["operator"]
    assert repr(patch) == "<Patch: 2 layers routed, 2 skipped>"
    text = str(patch)
    assert re.search(r"blocks\.0\.attn1 +clear\(radius=2\) +operator", text)
    assert re.search(r"blocks\.1\.attn2 +- +cross-attention", text)


def test_layouts_of_both_streams():
    for tiny, layout in (
        (FLUX, va.TokenLayout((5, 7), text_before=5)),
        (SD3, va.TokenLayout((5, 7), text_after=5)),
        (QWEN, va.TokenLayout((5, 7), text_before=5)),
    ):
        model = tiny.model()
        with va.patch(model, va.Clear(radius=2)) as patch:
            tiny.run(model)
            assert {call.layout for calls in patch.calls.values() for call in calls} == {layout}


def test_each_level_of_a_unet_has_its_grid():
    model = UNET.model(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    with va.patch(model, Disc(2)) as patch:
        UNET.run(model)
        grids = {name: calls[0].layout.grid for name, calls in patch.calls.items()}
    assert grids["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == (6, 10)
    assert grids["down_blocks.1.attentions.0.transformer_blocks.0.attn1"] == (3, 5)
    assert grids["mid_block.attentions.0.transformer_blocks.0.attn1"] == (3, 5)
    assert all(layer.name.endswith("attn2") for layer in patch.skipped)


def test_calls_are_those_of_the_last_forward():
    model = SD3.model()
    patch = va.patch(model, va.Clear(radius=2))
    SD3.run(model, 5, 7)
    SD3.run(model, 4, 6)
    assert [call.layout.grid for calls in patch.calls.values() for call in calls] == [(4, 6)] * 2


def test_restored_after_an_exception():
    model = FLUX.model()
    stock = processors(model)
    with pytest.raises(ZeroDivisionError), va.patch(model, va.Dense()):  # noqa: PT012
        FLUX.run(model)
        raise ZeroDivisionError
    assert_stock(model, stock)


def test_remove_and_unpatch_may_be_repeated():
    model = FLUX.model()
    stock = processors(model)
    patch = va.patch(model, va.Dense())
    patch.remove()
    patch.remove()
    assert_stock(model, stock)
    va.patch(model, va.Dense())
    va.unpatch(model)
    va.unpatch(model)
    assert_stock(model, stock)


@pytest.mark.parametrize("first", [0, 1])
def test_disjoint_patches_nest_and_go_in_any_order(first: int):
    model = FLUX.model()
    stock, dense = processors(model), FLUX.run(model)
    patches = [va.patch(model, Disc(2), layers="transformer_blocks.*"), va.patch(model, Disc(3), layers="single*")]
    both = FLUX.run(model)
    patches[first].remove()
    one = FLUX.run(model)
    patches[1 - first].remove()
    assert torch.equal(FLUX.run(model), dense)
    assert len({tuple(t.flatten()[:50].tolist()) for t in (dense, one, both)}) == 3
    assert_stock(model, stock)


def test_a_removed_patch_is_not_entered_again():
    model = FLUX.model()
    patch = va.patch(model, va.Dense())
    patch.remove()
    with pytest.raises(va.PatchError, match="entered before it is removed, got a removed one"):
        patch.__enter__()


def test_an_old_patch_leaves_a_new_one_alone():
    model = FLUX.model()
    old = va.patch(model, Disc(2))
    va.unpatch(model)
    with va.patch(model, Disc(2)) as new:
        local = FLUX.run(model)
        old.remove()
        assert torch.equal(FLUX.run(model), local)
        assert new.calls


def test_unpatch_removes_all_patches():
    model = FLUX.model()
    stock = processors(model)
    va.patch(model, Disc(2), layers="transformer_blocks.*")
    va.patch(model, Disc(3), layers="single*")
    va.unpatch(model)
    assert_stock(model, stock)


def test_a_layer_is_patched_once():
    model = FLUX.model()
    va.patch(model, va.Clear(radius=2), layers="*.1.attn")
    with pytest.raises(
        va.PatchError, match=r"patched once, got 'single_transformer_blocks\.1\.attn', which has clear\(radius=2\)"
    ):
        va.patch(model, va.Dense())
    assert [
        type(p).__mro__[1].__name__ for n, p in processors(model).items() if n != "single_transformer_blocks.1.attn"
    ] == [
        "object",
        "object",
    ]


def test_layers_select_by_glob_list_predicate_and_dict():
    model = FLUX.model()
    names = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]

    def routed(**arguments) -> list[str]:
        with va.patch(model, **arguments) as patch:
            assert {layer.name for layer in patch.routed} | {layer.name for layer in patch.skipped} == set(names)
            assert all(layer.reason == "not selected by layers" for layer in patch.skipped)
            return [f"{layer.name} {layer.operator}" for layer in patch.routed]

    op = va.Dense()
    assert routed(op=op) == [f"{name} dense()" for name in names]
    assert routed(op=op, layers="single*") == [f"{name} dense()" for name in names[1:]]
    assert routed(op=op, layers=["transformer*", "*.1.attn"]) == [f"{name} dense()" for name in (names[0], names[2])]
    assert routed(op=op, layers=lambda name: name.endswith("s.0.attn")) == [f"{name} dense()" for name in names[:2]]
    mixed = routed(layers={"*.1.attn": va.Clear(radius=2), "single*": va.Neighborhood(3)})
    assert mixed == [f"{names[1]} neighborhood(kernel_size=3)", f"{names[2]} clear(radius=2)"]


def test_a_predicate_may_select_depth():
    model = SDXL.model()
    with va.patch(model, Disc(2), layers=lambda name: "up_blocks" in name) as patch:
        assert patch.routed
        assert all(layer.name.startswith("up_blocks") for layer in patch.routed)


def test_other_models_of_the_class_are_untouched():
    patched, other = FLUX.model(), FLUX.model()
    reference = FLUX.run(other)
    va.patch(patched, Disc(2))
    assert torch.equal(FLUX.run(other), reference)
    assert not torch.equal(FLUX.run(patched), reference)


def test_batches_of_classifier_free_guidance_are_independent():
    model = SD3.model()
    inputs = SD3.inputs(5, 7)
    with va.patch(model, Disc(2)), torch.no_grad():
        both = model(**inputs).sample
        halves = [model(**{name: value[i : i + 1] for name, value in inputs.items()}).sample for i in range(2)]
    torch.testing.assert_close(both, torch.cat(halves), atol=1e-5, rtol=1e-5)


def test_locality_at_the_first_layer():
    """With a window of radius 2 in the only layer, a touched token reaches no further than one token on each axis."""
    model = SD3.model(num_layers=1)
    inputs = SD3.inputs(5, 7)
    touched = copy.deepcopy(inputs)
    touched["hidden_states"][:, :, 2 * 1, 2 * 5] += 1.0  # token (1, 5)
    with torch.no_grad():
        model.pos_embed.proj.bias.zero_()
        with va.patch(model, va.Clear(radius=2)):
            difference = model(**touched).sample - model(**inputs).sample
    moved = torch.nn.functional.max_pool2d(difference.abs().amax(1, keepdim=True), 2)[0, 0] > 0
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    assert torch.equal(moved, (rows - 1) ** 2 + (columns - 5) ** 2 < 4)


def test_grid_of_an_unknown_model():
    class Stranger(type(FLUX.model())):
        pass

    model = FLUX.model()
    model.__class__ = Stranger
    with va.patch(model, Disc(2)) as patch:
        FLUX.run(model)
        assert patch.calls["transformer_blocks.0.attn"][0].layout == va.TokenLayout((5, 7), text_before=5)


class Unknown(torch.nn.Module):
    """A model that nobody knows: one FLUX attention over text and image."""

    def __init__(self):
        super().__init__()
        self.attn = FLUX.model().single_transformer_blocks[0].attn

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attn(tokens)


def test_grid_serves_unknown_models():
    torch.manual_seed(1)
    model, tokens = Unknown(), torch.randn(2, 5 + 4 * 6, 32)
    with pytest.raises(va.PatchError, match="Unknown: pass grid="):
        va.patch(model, Disc(2))
    with torch.no_grad():
        with va.patch(model, Disc(2), grid=(4, 6)) as patch:
            last = model(tokens)
            assert patch.calls["attn"][0].layout == va.TokenLayout((4, 6), text_before=5)
        with va.patch(model, Disc(2), grid=va.TokenLayout((4, 6), text_after=5)) as patch:
            first = model(tokens)
            assert patch.calls["attn"][0].layout == va.TokenLayout((4, 6), text_after=5)
        with (
            va.patch(model, Disc(2), grid=(7, 6)),
            pytest.raises(va.PatchError, match=r"got 29 query and 29 key tokens"),
        ):
            model(tokens)
    assert not torch.allclose(first, last, atol=1e-4)


@pytest.mark.parametrize("grid", [(5, 7), (1, 5, 7)])
def test_grid_of_a_known_model_is_its_own(grid):
    model = FLUX.model()
    with va.patch(model, Disc(2), grid=grid) as patch:
        FLUX.run(model)
        assert patch.calls["transformer_blocks.0.attn"][0].layout == va.TokenLayout(grid, text_before=5)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((6, 6), r"grid must have the 35 image tokens of this call, got \(6, 6\)"),
        ((7, 5), r"grid must be the model's own \(5, 7\) in this call, got \(7, 5\): leave grid out"),
    ],
)
def test_another_grid_than_that_of_a_known_model(grid, message):
    model = FLUX.model()
    with va.patch(model, Disc(2), grid=grid), pytest.raises(va.PatchError, match=message):
        FLUX.run(model)


class SelfAndCross(torch.nn.Module):
    """A model that nobody knows: image tokens attend to themselves, then to text."""

    def __init__(self):
        super().__init__()
        self.attn1 = Attention(16, heads=2, dim_head=8)
        self.attn2 = Attention(16, cross_attention_dim=16, heads=2, dim_head=8)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attn1(hidden_states)
        return hidden_states + self.attn2(hidden_states, encoder_hidden_states)


@pytest.mark.parametrize("text", [9, 40])
def test_cross_attention_of_an_unknown_model_stays_dense(text: int):
    """Also to more text than there are image tokens: the text is not taken for tokens before the image."""
    model, image, words = SelfAndCross().eval(), torch.randn(2, 4 * 6, 16), torch.randn(2, text, 16)
    with va.patch(model, Disc(2), grid=(4, 6)) as patch, torch.no_grad():
        output = model(image, words)
    (first,), (second,) = patch.calls["attn1"], patch.calls["attn2"]
    assert (first.kind, first.layout) == ("operator", va.TokenLayout((4, 6)))
    assert (second.kind, second.layout) == ("dense", None)
    assert f"got 24 query and {text} key tokens" in second.reason
    with va.patch(model, Disc(2), grid=(4, 6), layers="attn1"), torch.no_grad():
        assert torch.equal(model(image, words), output)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_a_second_self_attention_is_served():
    model = diffusers.models.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=1,
        norm_num_groups=4,
        double_self_attention=True,
    )
    with va.patch(model, Disc(2)) as patch, torch.no_grad():
        model(torch.randn(2, 16, 4, 6))
    assert [call.kind for call in patch.calls["transformer_blocks.0.attn2"]] == ["operator"]
    assert patch.skipped == []


def test_unpatch_reaches_patches_of_parts():
    model = UNET.model()
    stock, dense = processors(model), UNET.run(model)
    va.patch(model.mid_block.attentions[0], Disc(2))
    assert not torch.equal(UNET.run(model), dense)
    va.unpatch(model)
    assert_stock(model, stock)
    assert torch.equal(UNET.run(model), dense)


@dataclasses.dataclass(frozen=True)
class Quiet:
    """Compares equal whatever its radius."""

    radius: float = dataclasses.field(default=2, compare=False)

    def __call__(self, query, key, value, layout, scale=None):
        return Disc(self.radius)(query, key, value, layout, scale)


@dataclasses.dataclass(frozen=True)
class Weighted:
    weight: torch.Tensor

    def __call__(self, query, key, value, layout, scale=None):
        return value * self.weight


@pytest.mark.parametrize("ops", [(Quiet(1), Quiet(9)), (Weighted(torch.ones(8)), Weighted(torch.zeros(8)))], ids=repr)
def test_operators_that_differ_keep_apart(ops):
    model = SD3.model()
    both = {"transformer_blocks.0.*": ops[0], "transformer_blocks.1.*": ops[1]}
    with va.patch(model, layers=both) as patch:
        assert all(layer.operator is op for layer, op in zip(patch.routed, ops, strict=True))
        mixed = SD3.run(model)
    with va.patch(model, ops[0]):
        assert not torch.equal(SD3.run(model), mixed)


@pytest.mark.parametrize("called_before", [False, True])
def test_forward_without_the_hooks(called_before: bool):
    """`model.forward(...)` tells no layout, and that of an earlier call must not be taken for it."""
    model = SD3.model()
    dense = SD3.run(model, 4, 6)
    for strict in (True, False):
        with va.patch(model, Disc(2), strict=strict) as patch, torch.no_grad():
            if called_before:
                SD3.run(model, 6, 4)
            if strict:
                message = (
                    r"'transformer_blocks\.0\.attn' must run in a forward of its model, got a call while no forward"
                )
                with pytest.raises(va.PatchError, match=message):
                    model.forward(**SD3.inputs(4, 6))
            else:
                assert torch.equal(model.forward(**SD3.inputs(4, 6)).sample, dense)
                call = patch.calls["transformer_blocks.0.attn"][-1]
                assert (call.kind, call.reason) == ("dense", "no forward of the model is running")


def test_a_forward_that_fails_is_over():
    model = SD3.model()
    with va.patch(model, Disc(2)):
        local = SD3.run(model)
        handle = model.transformer_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            SD3.run(model)
        handle.remove()
        with pytest.raises(va.PatchError, match=r"must run in a forward of its model"), torch.no_grad():
            model.forward(**SD3.inputs(5, 7))
        assert torch.equal(SD3.run(model), local)
