"""A patched model may be saved, pickled and copied."""

import copy
import io
import threading
import zipfile

import diffusers
import pytest
import torch
from probe_operators import Disc
from tiny_models import FLUX, SD3, UNET, Tiny

import vision_attn as va

COPIED = (FLUX, SD3, UNET)


def classes(model: torch.nn.Module) -> set[type]:
    return {type(module.processor) for module in model.modules() if hasattr(module, "processor")}


@pytest.mark.parametrize("tiny", COPIED, ids=lambda tiny: tiny.name)
def test_saved_models_are_stock(tiny: Tiny, tmp_path):
    model = tiny.model()
    stock, reference = classes(model), tiny.run(model)
    with va.patch(model, Disc(2)):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert classes(loaded) == stock
    assert torch.equal(tiny.run(loaded), reference)


@pytest.mark.parametrize("tiny", COPIED, ids=lambda tiny: tiny.name)
def test_a_pickle_holds_the_stock_model(tiny: Tiny):
    model = tiny.model()
    stock, reference = classes(model), tiny.run(model)
    buffer = io.BytesIO()
    with va.patch(model, Disc(2)):
        torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert classes(loaded) == stock
    assert torch.equal(tiny.run(loaded), reference)
    with va.patch(loaded, Disc(2)) as patch:
        assert not torch.equal(tiny.run(loaded), reference)
        assert patch.routed
    assert torch.equal(tiny.run(loaded), reference)


def test_a_pickle_loads_without_this_package(tmp_path):
    model = FLUX.model()
    with va.patch(model, Disc(2)):
        torch.save(model, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        (pickled,) = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    assert b"FluxAttnProcessor" in pickled
    assert b"vision_attn" not in pickled
    assert b"probe_operators" not in pickled


@pytest.mark.parametrize("tiny", COPIED, ids=lambda tiny: tiny.name)
def test_a_deep_copy_keeps_the_patch_and_is_independent(tiny: Tiny):
    model = tiny.model()
    reference = tiny.run(model)
    patch = va.patch(model, Disc(2))
    local = tiny.run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.run(twin), local)
    assert torch.equal(tiny.run(twin, *tiny.other_grid), tiny.run(model, *tiny.other_grid))
    patch.remove()
    assert torch.equal(tiny.run(model), reference)
    assert torch.equal(tiny.run(twin), local)
    tiny.run(twin)
    assert all(not calls for calls in patch.calls.values()) or {
        call.layout.grid for calls in patch.calls.values() for call in calls
    } != {tiny.grid}
    va.unpatch(twin)
    assert torch.equal(tiny.run(twin), reference)
    assert classes(twin) == classes(model)
    with va.patch(twin, Disc(2)):
        assert torch.equal(tiny.run(twin), local)


def test_a_copy_shares_no_weights_or_processors():
    model = FLUX.model()
    va.patch(model, Disc(2))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    ours = {id(module.processor) for module in model.modules() if hasattr(module, "processor")}
    theirs = {id(module.processor) for module in twin.modules() if hasattr(module, "processor")}
    assert not ours & theirs
    assert FLUX.run(model).abs().max() > 0


def test_one_block_can_be_copied():
    model = FLUX.model()
    va.patch(model, Disc(2))
    block = copy.deepcopy(model.transformer_blocks[0])
    assert not any(child is model for child in block.modules())
    assert isinstance(block.attn.processor, diffusers.models.transformers.transformer_flux.FluxAttnProcessor)


def test_a_processor_can_be_copied():
    model = FLUX.model()
    va.patch(model, Disc(2))
    processor = model.transformer_blocks[0].attn.processor
    twin = copy.copy(processor)
    twin._attention_backend = "native"
    assert type(twin) is type(processor)
    assert processor._attention_backend is None


def test_two_models_in_two_threads():
    """Different operators and sizes at the same time: each thread must get what it gets alone."""
    jobs = [(FLUX, Disc(2), (5, 7)), (FLUX, Disc(3), (6, 4)), (SD3, Disc(1.5), (4, 6))]
    models = [tiny.model() for tiny, _, _ in jobs]
    patches = [va.patch(model, op) for model, (_, op, _) in zip(models, jobs, strict=True)]
    alone = [tiny.run(model, *grid) for model, (tiny, _, grid) in zip(models, jobs, strict=True)]
    barrier, wrong = threading.Barrier(len(jobs)), []

    def work(index: int) -> None:
        tiny, _, grid = jobs[index]
        for _ in range(6):
            barrier.wait(timeout=60)
            if not torch.equal(tiny.run(models[index], *grid), alone[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for patch, (_, _, grid) in zip(patches, jobs, strict=True):
        assert {call.layout.grid for calls in patch.calls.values() for call in calls} == {grid}


def test_one_model_in_two_threads_is_refused():
    """Layers of both forwards would read one layout. A copy made meanwhile is free."""
    model = SD3.model()
    va.patch(model, Disc(2))
    alone = {grid: SD3.run(model, *grid) for grid in ((4, 6), (6, 4))}
    inside, done, results = threading.Event(), threading.Event(), []

    def pause(*_) -> None:
        if threading.current_thread() is first:
            inside.set()
            done.wait(timeout=60)

    model.transformer_blocks[1].register_forward_pre_hook(pause)
    first = threading.Thread(target=lambda: results.append(SD3.run(model, 4, 6)))
    first.start()
    inside.wait(timeout=60)
    try:
        message = "a patched SD3Transformer2DModel must run in one thread at a time, got a forward in a second one"
        with pytest.raises(va.PatchError, match=message):
            SD3.run(model, 6, 4)
        model.transformer_blocks[1]._forward_pre_hooks.clear()
        assert torch.equal(SD3.run(copy.deepcopy(model), 6, 4), alone[6, 4])
    finally:
        done.set()
        first.join()
    assert torch.equal(results[0], alone[4, 6])
    assert torch.equal(SD3.run(model, 6, 4), alone[6, 4])
