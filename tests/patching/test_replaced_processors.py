"""diffusers and users replace processors: the patch comes back by itself or says so, never silently dense."""

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from probe_operators import Disc
from tiny_models import FLUX, SD3, UNET, WAN, randn

import vision_attn as va


def kinds(patch: va.Patch) -> set[str]:
    return {call.kind for calls in patch.calls.values() for call in calls}


@pytest.mark.parametrize("tiny", [FLUX, WAN], ids=lambda tiny: tiny.name)
def test_fused_projections_of_the_new_style(tiny):
    model = tiny.model()
    with va.patch(model, Disc(2)) as patch:
        local = tiny.run(model)
        model.fuse_qkv_projections()
        torch.testing.assert_close(tiny.run(model), local, atol=1e-5, rtol=1e-5)
        assert kinds(patch) == {"operator"}
        model.unfuse_qkv_projections()
        assert torch.equal(tiny.run(model), local)


@pytest.mark.parametrize("tiny", [SD3, UNET], ids=lambda tiny: tiny.name)
def test_fused_projections_of_the_old_style_after_the_patch(tiny):
    model = tiny.model()
    stock = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    patch = va.patch(model, Disc(2))
    local = tiny.run(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(tiny.run(model), local, atol=1e-5, rtol=1e-5)
    assert kinds(patch) == {"operator"}
    assert all(layer.name in patch.calls for layer in patch.routed)
    model.unfuse_qkv_projections()
    assert torch.equal(tiny.run(model), local)
    patch.remove()
    assert all(module.processor is stock[name] for name, module in model.named_modules() if name in stock)


@pytest.mark.parametrize("run_between", [True, False])
def test_patch_removed_while_fused(run_between: bool):
    model = UNET.model()
    stock = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    dense = UNET.run(model)
    patch = va.patch(model, Disc(2))
    model.fuse_qkv_projections()
    if run_between:
        UNET.run(model)
    patch.remove()
    torch.testing.assert_close(UNET.run(model), dense, atol=1e-5, rtol=1e-5)
    model.unfuse_qkv_projections()
    assert all(module.processor is stock[name] for name, module in model.named_modules() if name in stock)
    assert torch.equal(UNET.run(model), dense)


def test_patch_after_old_style_fuse_and_unfused_under_the_patch():
    model = UNET.model()
    with va.patch(model, Disc(2)):
        local = UNET.run(model)
    model.fuse_qkv_projections()
    patch = va.patch(model, Disc(2))
    torch.testing.assert_close(UNET.run(model), local, atol=1e-5, rtol=1e-5)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(UNET.run(model), local, atol=1e-5, rtol=1e-5)
    assert kinds(patch) == {"operator"}


@pytest.mark.parametrize(
    ("tiny", "processor", "name"),
    [(FLUX, FluxAttnProcessor, "transformer_blocks.0.attn"), (SD3, JointAttnProcessor2_0, "transformer_blocks.0.attn")],
    ids=["flux", "sd3"],
)
def test_processors_set_back_by_the_user(tiny, processor, name):
    model = tiny.model()
    dense = tiny.run(model)
    patch = va.patch(model, Disc(2))
    tiny.run(model)
    model.set_attn_processor(processor())
    with pytest.raises(
        va.PatchError,
        match=rf"'{name}' must keep its routed processor, but .* set back to a stock {processor.__name__}",
    ):
        tiny.run(model)
    patch.remove()
    assert torch.equal(tiny.run(model), dense)


def test_processors_set_back_by_the_user_not_strict():
    model = FLUX.model()
    dense = FLUX.run(model)
    patch = va.patch(model, Disc(2), strict=False)
    attention = model.transformer_blocks[0].attn
    routed, attention.processor = attention.processor, FluxAttnProcessor()
    with pytest.warns(UserWarning, match=r"'transformer_blocks\.0\.attn' must keep its routed processor"):
        FLUX.run(model)
    assert [layer.name for layer in patch.skipped] == ["transformer_blocks.0.attn"]
    assert "set back" in patch.skipped[0].reason
    assert "transformer_blocks.0.attn" not in [layer.name for layer in patch.routed]
    assert "transformer_blocks.0.attn" not in patch.calls
    FLUX.run(model)  # warned once: a second warning would be an error here
    attention.processor = routed
    FLUX.run(model)
    assert len(patch.routed) == 3
    patch.remove()
    assert torch.equal(FLUX.run(model), dense)


def test_attention_slicing_is_noticed():
    model = UNET.model()
    patch = va.patch(model, Disc(2))
    model.set_attention_slice(1)
    with pytest.raises(va.PatchError, match=r"its new processor SlicedAttnProcessor makes no attention call"):
        UNET.run(model)
    patch.remove()
    with pytest.raises(
        va.PatchError, match=r"got none: .*SlicedAttnProcessor makes no attention call that can be routed"
    ):
        va.patch(model, Disc(2))


def test_attn_processors_round_trip():
    model = FLUX.model()
    with va.patch(model, Disc(2)) as patch:
        local = FLUX.run(model)
        model.set_attn_processor(dict(model.attn_processors))
        assert torch.equal(FLUX.run(model), local)
        assert kinds(patch) == {"operator"}


def test_attention_backend_after_the_patch_stays_on_the_original():
    model = FLUX.model()
    with va.patch(model, Disc(2)):
        local = FLUX.run(model)
        model.set_attention_backend("native")
        assert torch.equal(FLUX.run(model), local)
    assert model.transformer_blocks[0].attn.processor._attention_backend == "native"


def flux_ip_adapter() -> dict[str, dict[str, torch.Tensor]]:
    """Weights of a random IP-Adapter for the tiny FLUX: one double block of 32 channels, 4 image tokens."""
    return {
        "image_proj": {
            "proj.weight": randn(4 * 32, 16, seed=5),
            "proj.bias": randn(4 * 32, seed=6),
            "norm.weight": torch.ones(32),
            "norm.bias": torch.zeros(32),
        },
        "ip_adapter": {
            "0.to_k_ip.weight": randn(32, 32, seed=7) / 5,
            "0.to_k_ip.bias": randn(32, seed=8) / 5,
            "0.to_v_ip.weight": randn(32, 32, seed=9) / 5,
            "0.to_v_ip.bias": randn(32, seed=10) / 5,
        },
    }


def run_with_image(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        image = {"ip_adapter_image_embeds": [randn(2, 1, 16, seed=11)]}
        return model(**FLUX.inputs(5, 7), joint_attention_kwargs=image).sample


def test_flux_ip_adapter_before_and_after_the_patch():
    before, after = FLUX.model(), FLUX.model()
    before._load_ip_adapter_weights([flux_ip_adapter()])
    loaded = before.transformer_blocks[0].attn.processor
    keys = list(before.state_dict())
    dense = run_with_image(before)
    patch_before = va.patch(before, Disc(2))
    local = run_with_image(before)
    assert not torch.allclose(local, dense, atol=1e-4)
    assert list(before.state_dict()) == keys

    patch_after = va.patch(after, Disc(2))
    after._load_ip_adapter_weights([flux_ip_adapter()])
    assert torch.equal(run_with_image(after), local)
    assert list(after.state_dict()) == keys
    assert {len(calls) for calls in patch_after.calls.values()} == {1, 2}
    double = patch_after.calls["transformer_blocks.0.attn"]
    assert [call.kind for call in double] == ["operator", "dense"]
    assert "35 query and 4 key tokens" in double[1].reason

    patch_before.remove()
    assert before.transformer_blocks[0].attn.processor is loaded
    assert torch.equal(run_with_image(before), dense)
    patch_after.remove()
    assert torch.equal(run_with_image(after), dense)
    assert list(after.state_dict()) == keys


@pytest.mark.parametrize("patch_first", [True, False])
def test_flux_ip_adapter_with_trainable_parameters(patch_first: bool):
    model, plain = FLUX.model(), FLUX.model()
    plain._load_ip_adapter_weights([flux_ip_adapter()])
    keys = list(plain.state_dict())
    if not patch_first:
        model._load_ip_adapter_weights([flux_ip_adapter()])
    patch = va.patch(model, va.Clear(radius=2, down_factor=2), trainable=True)
    if patch_first:
        model._load_ip_adapter_weights([flux_ip_adapter()])
    run_with_image(model)
    assert kinds(patch) == {"operator", "dense"}  # the second call of the double block is the image prompt's
    assert set(model.state_dict()) == {*keys, *patch.state_dict()}
    assert {id(p) for p in patch.parameters()} <= {id(p) for p in model.parameters()}
    patch.remove()
    assert list(model.state_dict()) == keys
    assert torch.equal(run_with_image(model), run_with_image(plain))


@pytest.mark.parametrize("tiny", [SD3, UNET], ids=lambda tiny: tiny.name)
def test_old_style_fusing_keeps_trainable_parameters(tiny):
    model = tiny.model()
    keys = list(model.state_dict())
    patch = va.patch(model, va.Clear(radius=2, down_factor=2), trainable=True)
    local = tiny.run(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(tiny.run(model), local, atol=1e-5, rtol=1e-5)
    assert set(patch.state_dict()) <= set(model.state_dict())
    model.unfuse_qkv_projections()
    torch.testing.assert_close(tiny.run(model), local, atol=1e-5, rtol=1e-5)
    patch.remove()
    assert [name for name in model.state_dict() if "spatial_weight" in name] == []
    assert set(keys) <= set(model.state_dict())


def test_ip_adapter_scale_reaches_the_routed_processor_and_survives_it():
    model = FLUX.model()
    model._load_ip_adapter_weights([flux_ip_adapter()])
    patch = va.patch(model, va.Dense())
    model.transformer_blocks[0].attn.processor.scale = [0.0]
    silent = run_with_image(model)
    patch.remove()
    assert model.transformer_blocks[0].attn.processor.scale == [0.0]
    assert torch.equal(run_with_image(model), silent)


def test_unet_ip_adapter_after_the_patch():
    model = UNET.model()
    stock = model.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    patch = va.patch(model, Disc(2))
    local = UNET.run(model)
    weights = {"image_proj": flux_ip_adapter()["image_proj"], "ip_adapter": {}}
    weights["image_proj"] = {
        "proj.weight": randn(4 * 16, 16, seed=5),
        "proj.bias": randn(4 * 16, seed=6),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    names = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(names):
        width = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("k", "v"):
            weights["ip_adapter"][f"{2 * index + 1}.to_{part}_ip.weight"] = torch.zeros(width, 16)
    model._load_ip_adapter_weights([weights])
    with torch.no_grad():
        image = {"image_embeds": [randn(2, 1, 16, seed=11)]}
        output = model(**UNET.inputs(6, 10), added_cond_kwargs=image).sample
    torch.testing.assert_close(output, local, atol=1e-5, rtol=1e-5)  # zero image values add nothing
    assert kinds(patch) == {"operator"}
    assert all(layer.name in patch.calls for layer in patch.routed)
    patch.remove()
    assert model.mid_block.attentions[0].transformer_blocks[0].attn1.processor is stock


def test_a_routed_class_is_made_without_arguments_and_keeps_its_name():
    model = UNET.model()
    va.patch(model, Disc(2))
    processor = model.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    assert type(processor).__name__ == "AttnProcessor2_0"
    assert isinstance(type(processor)(), AttnProcessor2_0)
    assert repr(type(processor)) == repr(AttnProcessor2_0)


def test_routed_twins_put_back_after_removal_are_stock():
    """A processor dict kept from under the patch must not keep it alive."""
    model = FLUX.model()
    dense = FLUX.run(model)
    patch = va.patch(model, Disc(2))
    kept = dict(model.attn_processors)
    patch.remove()
    model.set_attn_processor(kept)
    assert torch.equal(FLUX.run(model), dense)
    stock = type(diffusers.FluxTransformer2DModel.from_config(model.config).transformer_blocks[0].attn.processor)
    with va.patch(model, Disc(2)):
        assert not torch.equal(FLUX.run(model), dense)
    assert type(model.transformer_blocks[0].attn.processor) is stock
