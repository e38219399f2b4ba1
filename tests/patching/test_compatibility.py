"""What diffusers does to models around a patch: LoRA, offloading, checkpointing, caching, casting, guiders."""

import copy
import gc

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, LayerSkipConfig, apply_group_offloading
from diffusers.hooks.layer_skip import apply_layer_skip
from probe_operators import Disc
from tiny_models import FLUX, SD3, UNET, WAN, Tiny, randn

import vision_attn as va

LOCAL = Disc(2)


def kinds(patch: va.Patch) -> set[str]:
    return {call.kind for calls in patch.calls.values() for call in calls}


def local_output(tiny: Tiny, model: torch.nn.Module) -> torch.Tensor:
    with va.patch(model, LOCAL):
        return tiny.run(model)


def add_lora(model: torch.nn.Module) -> None:
    from peft import LoraConfig

    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("tiny", [FLUX, SD3, UNET], ids=lambda tiny: tiny.name)
def test_lora_in_any_order(tiny: Tiny):
    first, second = tiny.model(), tiny.model()
    add_lora(first)
    with_lora = local_output(tiny, first)
    patch = va.patch(second, LOCAL)
    plain = tiny.run(second)
    assert not torch.allclose(plain, with_lora, atol=1e-4)
    add_lora(second)
    assert torch.equal(tiny.run(second), with_lora)
    assert kinds(patch) == {"operator"}
    assert list(second.state_dict()) == list(first.state_dict())
    second.disable_adapters()
    assert torch.equal(tiny.run(second), plain)
    second.enable_adapters()
    patch.remove()
    assert torch.equal(tiny.run(second), tiny.run(first))
    with va.patch(second, LOCAL):
        second.delete_adapters("default")
        assert torch.equal(tiny.run(second), plain)


@pytest.mark.parametrize("tiny", [FLUX, SD3, WAN, UNET], ids=lambda tiny: tiny.name)
def test_gradient_checkpointing(tiny: Tiny):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny.model()
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with va.patch(model, va.Clear(radius=2)) as patch:
            model(**tiny.inputs(*tiny.grid)).sample.square().mean().backward()
            assert kinds(patch) == {"operator"}
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert sum(float(grad.abs().sum()) for grad in plain.values()) > 0
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, atol=1e-6, rtol=1e-5)


def test_checkpoints_of_an_earlier_size_are_refused():
    """Recomputation would use the layout of the last forward."""
    model = SD3.model()
    model.train()
    model.enable_gradient_checkpointing()
    with va.patch(model, va.Clear(radius=2)):
        losses = [model(**SD3.inputs(*grid)).sample.square().mean() for grid in ((5, 7), (4, 6))]
        losses[1].backward()
        with pytest.raises(
            va.PatchError, match=r"recomputed with the tokens of its forward, got 40 query and 40 key tokens"
        ):
            losses[0].backward()


@pytest.mark.parametrize("training", [True, False])
def test_checkpoints_of_another_grid_of_the_same_length_are_refused(training: bool):
    """diffusers checkpoints in eval mode as well."""
    model = SD3.model()
    model.train(training)
    model.enable_gradient_checkpointing()
    with va.patch(model, va.Clear(radius=2)):
        for grid in ((4, 6), (6, 4), (4, 6)):  # each with its backward
            model(**SD3.inputs(*grid)).sample.square().mean().backward()
        model.eval()
        SD3.run(model, 6, 4)
        model.train(training)
        losses = [model(**SD3.inputs(*grid)).sample.square().mean() for grid in ((4, 6), (6, 4))]
        with pytest.raises(va.PatchError, match=r"got forwards of several grids or steps before it, the last \(6, 4\)"):
            sum(losses).backward()


def test_a_forward_without_gradients_between_a_checkpointed_one_and_its_backward():
    def gradients(*validation: int) -> list[torch.Tensor]:
        model = SD3.model()
        model.enable_gradient_checkpointing()
        with va.patch(model, va.Clear(radius=2)):
            loss = model(**SD3.inputs(4, 6)).sample.square().mean()
            if validation:
                SD3.run(model, *validation)
            loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for plain, disturbed in zip(gradients(), gradients(6, 4), strict=True):
        assert torch.equal(plain, disturbed)


@pytest.mark.parametrize("tiny", [FLUX, WAN], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("patch_first", [True, False])
def test_group_offload(tiny: Tiny, patch_first: bool):
    model = tiny.model()
    expected = local_output(tiny, model)
    cpu = torch.device("cpu")
    if patch_first:
        va.patch(model, LOCAL)
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    if not patch_first:
        va.patch(model, LOCAL)
    assert torch.equal(tiny.run(model), expected)


@pytest.mark.parametrize("patch_first", [True, False])
def test_sequential_offload(patch_first: bool):
    from accelerate import cpu_offload

    model = FLUX.model()
    expected = local_output(FLUX, model)
    if patch_first:
        patch = va.patch(model, LOCAL)
    cpu_offload(model, torch.device("cpu"))
    if not patch_first:
        patch = va.patch(model, LOCAL)
    assert torch.equal(FLUX.run(model), expected)
    assert kinds(patch) == {"operator"}
    patch.remove()
    FLUX.run(model)


def test_model_offload_hooks():
    from accelerate import cpu_offload_with_hook

    model = FLUX.model()
    expected = local_output(FLUX, model)
    va.patch(model, LOCAL)
    model, _ = cpu_offload_with_hook(model, torch.device("cpu"))
    assert torch.equal(FLUX.run(model), expected)


def test_layerwise_casting():
    def cast(patched_first: bool) -> torch.Tensor:
        model = FLUX.model()
        if patched_first:
            va.patch(model, LOCAL)
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        if not patched_first:
            va.patch(model, LOCAL)
        return FLUX.run(model)

    assert torch.equal(cast(True), cast(False))


@pytest.mark.parametrize("patch_first", [True, False])
def test_first_block_cache(patch_first: bool):
    model = FLUX.model(num_layers=2)
    expected = local_output(FLUX, model)
    if patch_first:
        patch = va.patch(model, LOCAL)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    if not patch_first:
        patch = va.patch(model, LOCAL)
    with model.cache_context("cond"):
        assert torch.equal(FLUX.run(model), expected)
        assert len(patch.calls) == 4
        torch.testing.assert_close(FLUX.run(model), expected, atol=1e-5, rtol=1e-5)
        assert list(patch.calls) == ["transformer_blocks.0.attn"]  # the rest comes from the cache
    model.disable_cache()
    assert torch.equal(FLUX.run(model), expected)


def skipping(what: str) -> LayerSkipConfig:
    flags = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False}
    return LayerSkipConfig(indices=[0], fqn="transformer_blocks", **({} if what == "block" else {**flags, what: True}))


def _dit(**changes) -> torch.nn.Module:
    return diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, **changes)


def _dit_inputs(rows: int, columns: int) -> dict[str, torch.Tensor]:
    latent = randn(2, 4, 2 * rows, 2 * columns)
    return {"hidden_states": latent, "timestep": torch.tensor([3, 3]), "class_labels": torch.tensor([1, 2])}


# Upstream's layer skipping works on few models; stock DiT is one, and draws squares only.
DIT = Tiny("dit", _dit, _dit_inputs, (6, 6))


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("what", ["skip_attention", "skip_attention_scores", "block"])
def test_layer_skip_guiders(what: str, patch_first: bool):
    """Skip-layer and perturbed guidance look up processors by their exact class and replace what attention gives."""

    def output(*actions) -> torch.Tensor:
        model = DIT.model()
        for action in actions:
            action(model)
        return DIT.run(model)

    def skip(model):
        apply_layer_skip(model, skipping(what))

    def others(model):
        va.patch(model, LOCAL, layers="transformer_blocks.1.*")

    def everything(model):
        va.patch(model, LOCAL)

    expected = output(skip, others)  # the skipped layer is stock
    actions = (everything, skip) if patch_first else (skip, everything)
    torch.testing.assert_close(output(*actions), expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(output(everything), expected, atol=1e-4)


def test_perturbed_attention_of_the_only_patched_layer_is_listed():
    model = DIT.model()
    patch = va.patch(model, LOCAL, layers="transformer_blocks.0.*")
    apply_layer_skip(model, skipping("skip_attention_scores"))
    DIT.run(model)
    (call,) = patch.calls["transformer_blocks.0.attn1"]
    assert (call.kind, call.reason) == ("dense", "a guider skips the attention scores")


def test_metadata_of_routed_classes_is_given_back():
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    AttentionProcessorRegistry._register()
    gc.collect()  # routes of earlier tests
    before = len(AttentionProcessorRegistry._registry)
    model = FLUX.model()
    patch = va.patch(model, LOCAL)
    twin = copy.deepcopy(model)
    assert len(AttentionProcessorRegistry._registry) > before
    patch.remove()
    va.unpatch(twin)
    del patch, model, twin
    gc.collect()
    assert len(AttentionProcessorRegistry._registry) == before


def test_hooks_of_diffusers_and_a_patch():
    class Double(diffusers.hooks.ModelHook):
        def post_forward(self, module, output):
            return type(output)(sample=2 * output.sample)

    model = FLUX.model()
    expected = local_output(FLUX, model)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Double(), "double")
    with va.patch(model, LOCAL):
        assert torch.equal(FLUX.run(model), 2 * expected)
        registry.remove_hook("double")
        assert torch.equal(FLUX.run(model), expected)


def test_half_precision():
    model = FLUX.model().bfloat16()
    inputs = {name: value.bfloat16() for name, value in FLUX.inputs(5, 7).items()}
    with torch.no_grad():
        dense = model(**inputs).sample
        with va.patch(model, va.Clear(radius=100)):
            output = model(**inputs).sample
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, dense, atol=2e-2, rtol=5e-2)


def test_arguments_by_position():
    """The layout hook must bind what a caller gives by position."""
    model = UNET.model()
    inputs = UNET.inputs(6, 10)
    expected = local_output(UNET, model)
    with va.patch(model, LOCAL), torch.no_grad():
        assert torch.equal(model(*inputs.values()).sample, expected)
        assert torch.equal(model(*inputs.values(), return_dict=False)[0], expected)
    model = SD3.model()
    expected = local_output(SD3, model)
    with va.patch(model, LOCAL), torch.no_grad():
        assert torch.equal(model(*SD3.inputs(5, 7).values()).sample, expected)
