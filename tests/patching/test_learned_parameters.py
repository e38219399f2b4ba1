"""Learned parameters of operators: one set per layer, in the patch, and on request in the model."""

import copy
import io

import pytest
import torch
from tiny_models import FLUX, SD3, UNET

import vision_attn as va

POOLED = va.Clear(radius=2, down_factor=2)
NAMES = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
KEYS = [f"{name}.processor.spatial_weight" for name in NAMES]


def test_parameters_start_at_the_mean_and_have_the_original_keys():
    model = FLUX.model()
    keys = list(model.state_dict())
    with va.patch(model, POOLED) as patch:
        assert list(patch.state_dict()) == KEYS
        assert all(torch.equal(value, torch.full((1, 1, 1, 2, 1, 2, 1), 0.25)) for value in patch.state_dict().values())
        assert len({id(parameter) for parameter in patch.parameters()}) == 3
        assert list(model.state_dict()) == keys
    with va.patch(model, va.Clear(radius=2)) as patch:
        assert list(patch.parameters()) == []


def test_state_round_trip_changes_the_output():
    model = FLUX.model()
    with va.patch(model, POOLED) as patch:
        mean = FLUX.run(model)
        state = {name: torch.randn_like(value) for name, value in patch.state_dict().items()}
        patch.load_state_dict(state)
        learned = FLUX.run(model)
        assert not torch.allclose(mean, learned, atol=1e-5)
    with va.patch(model, POOLED) as patch:
        assert torch.equal(FLUX.run(model), mean)
        patch.load_state_dict(state)
        assert torch.equal(FLUX.run(model), learned)
        assert all(torch.equal(patch.state_dict()[name], value) for name, value in state.items())


def test_each_layer_uses_its_own_parameters():
    model = FLUX.model()
    with va.patch(model, POOLED) as patch:
        outputs = [FLUX.run(model)]
        for parameter in patch.parameters():
            with torch.no_grad():
                parameter.copy_(torch.eye(2).view(1, 1, 1, 2, 1, 2, 1))
            outputs.append(FLUX.run(model))
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 4


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_reach_every_layer(trainable: bool):
    model = FLUX.model()
    with va.patch(model, POOLED, trainable=trainable) as patch:
        model(**FLUX.inputs(5, 7)).sample.square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in patch.parameters())


@pytest.mark.parametrize("tiny", [FLUX, SD3, UNET], ids=lambda tiny: tiny.name)
def test_trainable_parameters_are_registered_in_the_model(tiny):
    model = tiny.model()
    stock = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    keys, dense = list(model.state_dict()), tiny.run(model)
    patch = va.patch(model, POOLED, trainable=True)
    added = set(model.state_dict()) - set(keys)
    assert added == set(patch.state_dict()) == {f"{layer.name}.processor.spatial_weight" for layer in patch.routed}
    ours = {id(parameter) for parameter in patch.parameters()}
    assert ours <= {id(parameter) for parameter in model.parameters()}
    optimizer = torch.optim.SGD(patch.parameters(), lr=10.0)
    before = tiny.run(model)
    with torch.enable_grad():
        model(**tiny.inputs(*tiny.grid)).sample.square().mean().backward()
    optimizer.step()
    assert not torch.equal(tiny.run(model), before)
    saved = {name: value.clone() for name, value in model.state_dict().items() if name in added}
    assert all(torch.equal(saved[name], value) for name, value in patch.state_dict().items())
    patch.remove()
    assert list(model.state_dict()) == keys
    assert all(module.processor is stock[name] for name, module in model.named_modules() if name in stock)
    assert torch.equal(tiny.run(model), dense)
    assert all("_parameters" not in vars(processor) for processor in stock.values())


def test_trainable_parameters_follow_the_model_to_another_dtype():
    model = FLUX.model()
    with va.patch(model, POOLED, trainable=True) as patch:
        model.double()
        assert {parameter.dtype for parameter in patch.parameters()} == {torch.float64}
        inputs = {name: value.double() for name, value in FLUX.inputs(5, 7).items()}
        with torch.no_grad():
            assert model(**inputs).sample.dtype == torch.float64


def test_copies_and_pickles_of_trainable_models():
    model = FLUX.model()
    dense = FLUX.run(model)
    patch = va.patch(model, POOLED, trainable=True)
    patch.load_state_dict({name: torch.randn_like(value) for name, value in patch.state_dict().items()})
    learned = FLUX.run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(FLUX.run(twin), learned)
    assert not {id(parameter) for parameter in twin.parameters()} & {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in KEYS:
                parameter.zero_()
    assert torch.equal(FLUX.run(model), learned)
    assert not torch.equal(FLUX.run(twin), learned)
    va.unpatch(twin)
    assert torch.equal(FLUX.run(twin), dense)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(FLUX.run(loaded), dense)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in patch.state_dict().items())
    with va.patch(loaded, POOLED, trainable=True) as again:
        again.load_state_dict(patch.state_dict())
        assert torch.equal(FLUX.run(loaded), learned)
    assert torch.equal(FLUX.run(loaded), dense)


def test_different_operators_have_their_own_shapes():
    model = FLUX.model()
    ops = {"transformer_blocks.*": va.Clear(radius=2, down_factor=3), "*": POOLED}
    with va.patch(model, layers=ops) as patch:
        assert [tuple(parameter.shape)[3] for parameter in patch.parameters()] == [3, 2, 2]


def test_parameters_that_loading_replaces_are_used():
    model, reference = SD3.model(), SD3.model()
    patch = va.patch(model, POOLED, trainable=True)
    other = va.patch(reference, POOLED, trainable=True)
    mean = SD3.run(model)
    state = {
        name: torch.randn_like(value) if "spatial_weight" in name else value.clone()
        for name, value in model.state_dict().items()
    }
    reference.load_state_dict(state)
    expected = SD3.run(reference)
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, state, (), SD3.inputs(5, 7)).sample, expected)
        assert torch.equal(SD3.run(model), mean)
    model.load_state_dict(state, assign=True)
    assert torch.equal(SD3.run(model), expected)
    assert {id(parameter) for parameter in patch.parameters()} <= {id(parameter) for parameter in model.parameters()}
    assert all(torch.equal(value, state[name]) for name, value in patch.state_dict().items())
    twin = copy.deepcopy(model)
    assert torch.equal(SD3.run(twin), expected)
    patch.remove()
    assert all(torch.equal(value, state[name]) for name, value in patch.state_dict().items())
    other.remove()


@pytest.mark.parametrize("trainable", [False, True])
def test_attributes_set_under_the_patch_outlive_it(trainable: bool):
    model = FLUX.model()
    with va.patch(model, POOLED, trainable=trainable):
        model.set_attention_backend("native")
        model.transformer_blocks[0].attn.processor.note = "kept"
        model.single_transformer_blocks[0].attn.processor.note = "lost"
        del model.single_transformer_blocks[0].attn.processor.note
    processors = [model.transformer_blocks[0].attn.processor, model.single_transformer_blocks[0].attn.processor]
    assert [processor._attention_backend for processor in processors] == ["native", "native"]
    assert processors[0].note == "kept"
    assert not hasattr(processors[1], "note")
    assert not {"training", "_parameters"} & vars(processors[0]).keys()
