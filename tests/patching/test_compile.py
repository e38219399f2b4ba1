"""Patched models compile: whole models whose grid comes from shapes, and the repeated blocks of all."""

import pytest
import torch
from probe_operators import Disc
from tiny_models import FLUX, SD3, WAN
from torch._dynamo.testing import CompileCounter

import vision_attn as va

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_whole_model_is_one_graph_per_size():
    model = SD3.model(num_layers=1)
    va.patch(model, va.Clear(radius=2))
    expected = [SD3.run(model, *grid) for grid in ((5, 7), (4, 6))]
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for index, grid in ((0, (5, 7)), (1, (4, 6)), (0, (5, 7))):
        torch.testing.assert_close(SD3.run(compiled, *grid), expected[index], atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2


def test_a_video_model_compiles_whole_before_any_eager_call():
    model = WAN.model(num_layers=1)
    va.patch(model, Disc(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = WAN.run(compiled)
    torch._dynamo.reset()
    torch.testing.assert_close(output, WAN.run(model), atol=1e-5, rtol=1e-5)


def test_repeated_blocks_of_24_layers_share_their_graphs():
    """Two kinds of block, called on tensors of two strides; a graph per layer would be 25."""
    model = FLUX.model(num_single_layers=24)
    va.patch(model, Disc(2))
    expected = FLUX.run(model)
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=counter)
    torch.testing.assert_close(FLUX.run(model), expected, atol=1e-5, rtol=1e-5)
    assert 2 <= counter.frame_count <= 4


def test_repeated_blocks_follow_the_steps():
    model = FLUX.model(num_single_layers=1)
    dense = FLUX.run(model)
    va.patch(model, Disc(2), steps={1})
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    inputs = FLUX.inputs(5, 7)
    with torch.no_grad():
        first = model(**{**inputs, "timestep": torch.tensor([0.5, 0.5])}).sample
        second = model(**{**inputs, "timestep": torch.tensor([0.4, 0.4])}).sample
    torch.testing.assert_close(first, dense, atol=1e-5, rtol=1e-5)
    va.unpatch(model)
    with torch.no_grad():
        plain = model(**{**inputs, "timestep": torch.tensor([0.4, 0.4])}).sample
    assert not torch.allclose(second, plain, atol=1e-4)


def test_position_ids_compile_whole():
    """The hook of the compiled module runs outside of its graph, where ids can be read."""
    model = FLUX.model(num_single_layers=1)
    with va.patch(model, Disc(2)):
        expected = [FLUX.run(model, *grid) for grid in ((5, 7), (4, 6))]
    patch = va.patch(model, Disc(2))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for grid, output in zip(((5, 7), (4, 6)), expected, strict=True):
        torch.testing.assert_close(FLUX.run(compiled, *grid), output, atol=1e-5, rtol=1e-5)
    patch.remove()
    with va.patch(compiled, Disc(2)) as patch:  # the wrapper may be patched as well
        assert patch.routed[0].name == "transformer_blocks.0.attn"
        torch.testing.assert_close(FLUX.run(compiled, 4, 6), expected[1], atol=1e-5, rtol=1e-5)
    assert not compiled._forward_pre_hooks
    assert not model._forward_pre_hooks


def test_position_ids_inside_a_larger_graph_need_a_grid():
    model = FLUX.model(num_single_layers=1)
    with va.patch(model, Disc(2)):
        expected = FLUX.run(model)
    graph = torch.compile(lambda **inputs: model(**inputs).sample, fullgraph=True, backend="eager")
    with (
        va.patch(model, Disc(2)),
        torch.no_grad(),
        pytest.raises(Exception, match=r"(?s)pass grid=\(Y, X\) to va.patch"),
    ):
        graph(**FLUX.inputs(5, 7))
    with va.patch(model, Disc(2), grid=(5, 7)), torch.no_grad():
        torch.testing.assert_close(graph(**FLUX.inputs(5, 7)), expected, atol=1e-5, rtol=1e-5)


def test_learned_parameters_compile():
    model = SD3.model(num_layers=1)
    patch = va.patch(model, va.Clear(radius=2, down_factor=2), trainable=True)
    patch.load_state_dict({name: torch.randn_like(value) for name, value in patch.state_dict().items()})
    expected = SD3.run(model)
    output = SD3.run(torch.compile(model, fullgraph=True, backend="eager"))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_steps_of_a_compiled_model():
    model = SD3.model(num_layers=1)
    inputs = SD3.inputs(5, 7)
    later = {**inputs, "timestep": inputs["timestep"] - 100}
    with torch.no_grad():
        dense = [model(**call).sample for call in (inputs, later)]
        patch = va.patch(model, Disc(2), steps={1})
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        first, second = (compiled(**call).sample for call in (inputs, later))
        torch.testing.assert_close(first, dense[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(second, dense[1], atol=1e-4)
        graph = torch.compile(lambda **call: model(**call).sample, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match=r"(?s)steps= must be followed outside of compiled code"):
            graph(**inputs)
    patch.remove()
