"""The LTX-2.5 diffusion video decoder: the stock windows in linear memory, or those of an operator."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders import ltx2_diffusion_decoder
from diffusers.models.autoencoders.ltx2_diffusion_decoder import (
    LTX2VideoVaeNeighborhoodAttention,
    LTX2VideoVaeNeighborhoodAttnProcessor,
)
from torch import nn
from zoo_case import UPSTREAM_WARNINGS, randn

import vision_attn as va
from vision_attn.patching import ltx2_decoder

# FlexAttention without torch.compile is slow and says so; it is the oracle here.
pytestmark = [*UPSTREAM_WARNINGS, pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")]


def decoder() -> nn.Module:
    """A tiny decoder with even and odd windows, and layers of two depths."""
    torch.manual_seed(0)
    model = diffusers.LTX2VideoDiffusionDecoderModel(
        latent_channels=8,
        patch_size=2,
        decoder_head_dim=16,
        decoder_stage_channels=(64, 32, 32),
        decoder_stage_depths=(2, 1, 2),
        decoder_stage_kernels=((3, 2, 4), (2, 3, 3)),
        decoder_upsample_strides=((1, 2, 2), (2, 1, 1)),
        decoder_upsample_channel_reductions=(2, 1),
        decoder_stage5_kernel=(3, 5, 4),
        decoder_t_emb_dim=16,
        temporal_compression_ratio=2,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


def decode(model: nn.Module) -> torch.Tensor:
    """Decode a latent of 3 frames, 4 x 5 pixels."""
    with torch.no_grad():
        return model(randn(2, 8, 3, 4, 5), generator=torch.Generator().manual_seed(1)).sample


def layer_model(kernel_size: tuple[int, int, int]) -> Any:
    """One layer in a model that is taken for the decoder."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": LTX2VideoVaeNeighborhoodAttention(32, kernel_size, head_dim=16)})
    model.__class__ = type("LTX2VideoDiffusionDecoder3d", (nn.ModuleDict,), {})
    return model


def attentions(model: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if isinstance(part, LTX2VideoVaeNeighborhoodAttention)}


@pytest.fixture(scope="module")
def stock() -> torch.Tensor:
    return decode(decoder())


def test_own_windows_equal_the_stock_decoder(stock: torch.Tensor) -> None:
    model = decoder()
    with va.patch(model) as patch:
        torch.testing.assert_close(decode(model), stock, rtol=1e-4, atol=1e-5)
        assert {layer.name: layer.operator for layer in patch.routed} == {
            name: va.Neighborhood(kernel_size=part.kernel_size) for name, part in attentions(model).items()
        }
        assert len(patch.routed) == 5
        assert {call.kind for calls in patch.calls.values() for call in calls} == {"operator"}
        assert patch.calls["decoder.diff_blocks.0.attn"][0].layout == va.TokenLayout((5, 8, 10))
    assert torch.equal(decode(model), stock)


@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (2, 3, 4), (5, 2, 6), (4, 6, 7), (1, 1, 1)])
def test_a_layer_equals_the_stock_processor(kernel_size: tuple[int, int, int]) -> None:
    model, features = layer_model(kernel_size), randn(2, 5, 6, 7, 32)
    with torch.no_grad():  # FlexAttention has no backward on the CPU
        expected = model["attn"](features)
    with va.patch(model), torch.no_grad():
        torch.testing.assert_close(model["attn"](features), expected, rtol=1e-5, atol=1e-6)


def test_an_operator_takes_the_place_of_all_windows(stock: torch.Tensor) -> None:
    model, other = decoder(), decoder()
    for part in attentions(other).values():
        part.kernel_size = (3, 3, 3)
    with va.patch(model, va.Neighborhood(kernel_size=3)) as patch:
        assert {layer.operator for layer in patch.routed} == {va.Neighborhood(kernel_size=3)}
        changed = decode(model)
    torch.testing.assert_close(changed, decode(other), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, stock, atol=1e-3)


def test_dense_is_the_stock_attention(stock: torch.Tensor) -> None:
    model = decoder()
    with va.patch(model, va.Dense()):
        assert torch.equal(decode(model), stock)


def test_layers_select_and_the_rest_is_listed(stock: torch.Tensor) -> None:
    model = decoder()
    with va.patch(model, layers="decoder.diff_blocks.*") as patch:
        assert [layer.name for layer in patch.routed] == ["decoder.diff_blocks.0.attn", "decoder.diff_blocks.1.attn"]
        assert {layer.reason for layer in patch.skipped} == {"not selected by layers"}
        torch.testing.assert_close(decode(model), stock, rtol=1e-4, atol=1e-5)


def test_the_identical_processors_come_back() -> None:
    model = decoder()
    before = {name: part.processor for name, part in attentions(model).items()}
    keys = list(model.state_dict())
    va.patch(model)
    assert list(model.state_dict()) == keys
    assert all(part.processor is not before[name] for name, part in attentions(model).items())
    va.unpatch(model)
    assert all(part.processor is before[name] for name, part in attentions(model).items())
    assert not model._forward_pre_hooks


def test_patching_twice_names_the_layer() -> None:
    model = decoder()
    with va.patch(model), pytest.raises(va.PatchError, match=r"each layer must be patched once, got 'decoder\.det_st"):
        va.patch(model, va.Neighborhood(kernel_size=3))


def test_a_copy_stays_patched_and_a_pickle_is_stock(stock: torch.Tensor) -> None:
    model = decoder()
    with va.patch(model):
        twin, pickled = copy.deepcopy(model), pickle.dumps(model)
    for part in attentions(twin).values():
        assert not isinstance(part.processor, LTX2VideoVaeNeighborhoodAttnProcessor)
    torch.testing.assert_close(decode(twin), stock, rtol=1e-4, atol=1e-5)
    loaded = pickle.loads(pickled)
    for part in attentions(loaded).values():
        assert type(part.processor) is LTX2VideoVaeNeighborhoodAttnProcessor
    assert torch.equal(decode(loaded), stock)


def test_own_windows_are_for_this_decoder_only() -> None:
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
    with pytest.raises(ValueError, match=r"op must be an operator such as .*, got None"):
        va.patch(model)


def test_verify_compares_own_windows_with_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    report = va.verify(model, inputs={"z": randn(2, 8, 3, 4, 5)})
    assert [check.name for check in report.checks if check.passed] == [
        "finite output",
        "own windows are stock",
        "attention calls",
        "a window of one token is not stock",
        "removal gives the output back",
    ]
    monkeypatch.setattr(ltx2_decoder, "Neighborhood", lambda kernel_size: va.Neighborhood(kernel_size=2))
    with pytest.raises(va.PatchError, match=r"own windows are stock +FAILED"):
        va.verify(model, inputs={"z": randn(2, 8, 3, 4, 5)})


def test_no_block_mask_is_ever_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: object) -> None:
        raise AssertionError("a mask over all pairs of blocks")

    model = decoder()
    monkeypatch.setattr(ltx2_diffusion_decoder, "_neighborhood_block_mask", build)
    with pytest.raises(AssertionError, match="all pairs"):
        decode(model)
    with va.patch(model):
        assert decode(model).isfinite().all()


def test_tiled_decoding_equals_stock_tiled_decoding(stock: torch.Tensor) -> None:
    model = decoder()
    model.enable_tiling(12, 12, 4, 8, 8, 2)
    expected = decode(model)
    assert not torch.allclose(expected, stock, atol=1e-3)
    with va.patch(model):
        torch.testing.assert_close(decode(model), expected, rtol=1e-4, atol=1e-5)


def test_gradients_flow_where_stock_has_none() -> None:
    model = decoder()
    with va.patch(model):
        model(randn(1, 8, 3, 4, 5), generator=torch.Generator().manual_seed(1)).sample.square().mean().backward()
    gradient = attentions(model)["decoder.diff_blocks.0.attn"].to_k.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_a_layer_compiles_in_one_graph() -> None:
    model, features = layer_model((3, 2, 4)), randn(2, 5, 6, 7, 32)
    with va.patch(model), torch.no_grad():
        expected = model["attn"](features)
        compiled = torch.compile(model["attn"], fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(features), expected)


def test_an_operator_that_refuses_a_call_raises_or_leaves_the_layer_its_window() -> None:
    @dataclass(frozen=True)
    class Refusing:
        def __call__(self, query: object, key: object, value: object, layout: object, scale: object = None) -> None:
            raise va.UnsupportedError("three axes")

    model, features = layer_model((3, 2, 4)), randn(2, 5, 6, 7, 32)
    with torch.no_grad():
        expected = model["attn"](features)
        with va.patch(model, Refusing()), pytest.raises(va.PatchError, match="cannot honour the call of 'attn': three"):
            model["attn"](features)
        with va.patch(model, Refusing(), strict=False) as patch:
            torch.testing.assert_close(model["attn"](features), expected, rtol=1e-5, atol=1e-6)
            assert [(call.kind, call.reason) for call in patch.calls["attn"]] == [("dense", "three axes")]


def test_an_operator_must_return_attention() -> None:
    @dataclass(frozen=True)
    class Half:
        def __call__(self, query: Any, key: Any, value: Any, layout: Any, scale: float | None = None) -> torch.Tensor:
            return value.half()

    model = layer_model((3, 3, 3))
    message = r"must return a tensor of shape \(1, 60, 2, 16\) and dtype torch.float32 for 'attn', got torch.float16"
    with va.patch(model, Half()), pytest.raises(va.PatchError, match=message):
        model["attn"](randn(1, 3, 4, 5, 32))


@pytest.mark.parametrize(("argument", "value"), [("grid", (3, 4, 5)), ("steps", range(2)), ("trainable", True)])
def test_arguments_without_meaning_are_refused(argument: str, value: object) -> None:
    with pytest.raises(va.PatchError, match=rf"{argument} must be left out for LTX2VideoDiffusionDecoderModel, got"):
        va.patch(decoder(), **{argument: value})


def test_decoding_pipelines_are_patched(stock: torch.Tensor) -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.components = {"diffusion_decoder": decoder(), "vae": nn.Identity()}

    pipeline = Pipeline()
    with va.patch(pipeline) as patch:
        assert len(patch.routed) == 5
        torch.testing.assert_close(decode(pipeline.components["diffusion_decoder"]), stock, rtol=1e-4, atol=1e-5)


MEASURE = """
import re, torch, vision_attn as va
from pathlib import Path
from torch import nn
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoVaeNeighborhoodAttention
torch.set_num_threads(1)
attention = LTX2VideoVaeNeighborhoodAttention(64, (5, 7, 7), head_dim=64)
model = nn.ModuleDict({"attn": attention})
model.__class__ = type("LTX2VideoDiffusionDecoder3d", (nn.ModuleDict,), {})
peaks = []
with torch.no_grad(), va.patch(model):
    for frames in (11, 11, 22):
        attention(torch.randn(1, frames, 32, 24, 64))
        peaks.append(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(*peaks)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of one process is read from Linux's /proc")
def test_memory_is_linear_in_the_number_of_tokens() -> None:
    """16,896 tokens: a mask of all pairs would be 285 MB, their scores 1.1 GB."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=250)
    _, small, large = (int(peak) for peak in run.stdout.split())
    assert large - small < 120_000  # KiB
