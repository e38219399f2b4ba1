import dataclasses
import importlib.metadata
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vision_attn as va
from vision_attn.benchmark.compare import compare, runs_of
from vision_attn.benchmark.generation import Request, generate
from vision_attn.benchmark.metrics import psnr
from vision_attn.pipelines.loading import load_pipeline

# One token is 4x4 pixels: 9 x 12 tokens.
REQUEST = Request("a red circle left of a blue square", 5, 36, 48, 2, 3.0, max_sequence_length=24)


@pytest.fixture(scope="module")
def pipe(tiny_flux_folder):
    return load_pipeline(str(tiny_flux_folder))


@pytest.fixture(scope="module")
def operators():
    # The second sees every token of the grid; dense is listed twice and in the middle.
    return [va.Clear(radius=2), va.Dense(), va.Neighborhood(kernel_size=25), va.Dense(), va.Clear(radius=2)]


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def comparison(pipe, operators, told):
    return compare(pipe, operators, REQUEST, model="tiny", repeats=1, warmup=0, on_run=told.append)


def test_rows_are_distinct_and_dense_comes_first(comparison):
    names = [row.operator for row in comparison.rows]
    assert names == ["dense", "clear(radius=2)", "neighborhood(kernel_size=25)"]
    assert (comparison.grid, comparison.model, len(comparison.images)) == ((9, 12), "tiny", 3)


def test_dense_is_the_stock_pipeline(comparison, pipe):
    assert np.array_equal(comparison.images[0], generate(pipe, REQUEST))
    dense = comparison.rows[0]
    assert (dense.psnr, dense.routed_layers) == (math.inf, 0)
    assert dense.ssim == pytest.approx(1)
    # 2 joint and 4 single blocks, 2 steps, with and without the prompt.
    assert dense.attention_calls == 6 * 2 * 2
    tokens = 9 * 12 + 24
    assert dense.attention_flops == 24 * 4 * (4 * tokens**2 * 64)


def test_a_window_beyond_the_grid_changes_nothing_but_rounding(comparison):
    assert comparison.rows[2].psnr > 80


def test_windows_are_what_the_middle_token_sees(comparison):
    nothing, local, everything = comparison.windows
    assert nothing is None
    rows, columns = np.ogrid[:9, :12]
    assert np.array_equal(local, (rows - 4) ** 2 + (columns - 6) ** 2 < 4)
    assert everything.all()
    assert everything.shape == (9, 12)


def test_a_small_window_changes_the_picture_and_needs_less(comparison, pipe):
    dense, local = comparison.rows[:2]
    with va.patch(pipe, va.Clear(radius=2)):
        expected = generate(pipe, REQUEST)
    assert np.array_equal(comparison.images[1], expected)
    assert local.psnr == psnr(comparison.images[1], comparison.images[0]) < 60
    assert local.ssim < 1
    assert local.routed_layers == 6
    assert local.attention_calls == dense.attention_calls
    assert local.attention_flops < dense.attention_flops
    assert local.dense_layers == ()


def test_times_and_memory_are_plausible(comparison):
    for row in comparison.rows:
        assert row.seconds == row.seconds_of_each_repeat[0] > 0
        assert 0 < row.attention_share < 1
        assert row.peak_memory_bytes is None or row.peak_memory_bytes >= 0


def test_runs_are_counted_with_the_one_that_a_gpu_needs_apart(operators):
    assert runs_of(operators, repeats=3, warmup=1) == 3 * 4
    assert runs_of(operators, repeats=3, warmup=1, device="cuda") == 3 * 5


def test_progress_is_told_as_often_as_announced(comparison, operators, told):
    assert len(told) == runs_of(operators, repeats=1, warmup=0) == 3
    assert set(told) == {row.operator for row in comparison.rows}


def test_the_pipeline_is_left_as_it_was(comparison, pipe):
    with va.patch(pipe, va.Dense()) as patch:
        assert len(patch.routed) == 6


def test_the_judge_sees_each_picture(pipe):
    seen = []

    def judge(image):
        seen.append(image)
        return f"picture {len(seen)}"

    found = compare(pipe, [va.Clear(radius=2)], REQUEST, repeats=1, warmup=0, judge=judge)
    assert [row.caption for row in found.rows] == ["picture 1", "picture 2"]
    assert all(np.array_equal(a, b) for a, b in zip(seen, found.images, strict=True))


def test_results_are_ready_for_json(comparison):
    content = comparison.to_dict()
    assert content["request"]["height_px"] == 36
    assert content["environment"]["torch"] == importlib.metadata.version("torch")
    assert [row["operator"] for row in content["rows"]] == [row.operator for row in comparison.rows]


def test_an_operator_that_serves_nothing_is_an_error(pipe):
    class Refusing(va.Dense):
        operator_name = "refusing"

        def __call__(self, query, key, value, layout, scale=None):
            raise va.UnsupportedError("not today")

    with pytest.raises(va.PatchError, match="took no attention call of FluxPipeline: not today"):
        compare(pipe, [Refusing()], REQUEST, repeats=1, warmup=0)


def test_an_operator_that_is_not_registered_needs_neither_cost_nor_mask(pipe):
    @dataclasses.dataclass  # not hashable either
    class Mean:
        weight: float = 0.5

        def __call__(self, query, key, value, layout, scale=None):
            return self.weight * value.mean(1, keepdim=True).expand_as(value)

    found = compare(pipe, [Mean(), Mean()], REQUEST, repeats=1, warmup=0)
    assert len(found.rows) == runs_of([Mean(), Mean()], repeats=1, warmup=0) == 2
    row = found.rows[1]
    assert (row.operator, row.attention_flops, row.attention_calls) == (str(Mean()), None, 24)
    assert found.windows == (None, None)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return F.scaled_dot_product_attention(x * self.weight, x, x)


class HandsOver:
    """Draws with one model first and with another one after it."""

    def __init__(self):
        self.transformer, self.transformer_2, self.text_encoder = Attending(), Attending(), Attending()
        self.components = dict(vars(self))

    def __call__(self, prompt=None, num_inference_steps=3, generator=None, output_type="pil"):
        x = torch.rand(1, 2, 12, 16, generator=generator)
        self.text_encoder(x)
        for step in range(num_inference_steps):
            (self.transformer if step == 0 else self.transformer_2)(x)
        return type("Result", (), {"images": torch.rand(1, 16, 12, 3, generator=generator).numpy()})


def test_attention_of_a_second_denoiser_counts():
    row = compare(HandsOver(), [], Request("a cat", steps=3), repeats=1, warmup=0).rows[0]
    assert row.attention_calls == 3
    assert row.attention_flops == 3 * 2 * (4 * 12 * 12 * 16)


def test_a_picture_too_small_to_compare_is_refused_before_it_is_drawn(pipe):
    told = []
    with pytest.raises(ValueError, match="compare: height and width must be at least 11 pixels, got 8x48"):
        compare(pipe, [], dataclasses.replace(REQUEST, height_px=8), on_run=told.append)
    assert told == []
