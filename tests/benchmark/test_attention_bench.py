import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend

import vision_attn as va
from vision_attn.benchmark import attention_bench, memory_probe
from vision_attn.benchmark.attention_bench import (
    DENSE,
    FLEX_PERMUTED,
    FLEX_ROWS,
    FLEX_TILES,
    NATTEN,
    OURS,
    BenchReport,
    Case,
    bench_case,
    growth,
)
from vision_attn.benchmark.stock import DenseAttention, FlexTiles, token_places, window_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("operator", "grid"),
    [
        (va.Clear(radius=3), (7, 10)),
        (va.Clear(radius=2.5), (5, 4)),
        (va.Neighborhood(kernel_size=4), (9, 6)),
        (va.Neighborhood(kernel_size=(3, 20)), (8, 5)),
    ],
)
def test_windows_are_those_of_the_operators(operator, grid):
    rows, columns = token_places(grid, CPU)
    mask = window_of(operator, grid)(rows[:, None], columns[:, None], rows, columns)
    assert torch.equal(mask, operator.mask(va.TokenLayout(grid)))


@pytest.mark.parametrize(
    "operator",
    [va.Dense(), va.Clear(radius=3, down_factor=2), va.Neighborhood(4, stride=2), va.Neighborhood(2, dilation=(1, 2))],
)
def test_operators_without_a_stock_rival(operator):
    with pytest.raises(ValueError, match=r"bench: ops must be clear\(radius=\.\.\.\) or .*got \w+\("):
        window_of(operator, (16, 16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_size": (3, 5, 7)}, r"kernel_size must be one number or two.*got \(3, 5, 7\)"),
        ({"kernel_size": 3, "dilation": (1, 1, 1)}, r"dilation must be one number or two.*got \(1, 1, 1\)"),
    ],
)
def test_a_window_for_another_number_of_axes(fields, message):
    with pytest.raises(ValueError, match=f"bench: {message}"):
        window_of(va.Neighborhood(**fields), (16, 8))


def test_tile_permutation_is_undone_and_makes_tiles_contiguous():
    window = window_of(va.Clear(radius=2), (16, 24))
    tiles = FlexTiles(window, (16, 24), CPU)
    tokens = torch.randn(2, 3, 16 * 24, 5)
    assert torch.equal(tiles.restore(tiles.permute(tokens)), tokens)
    second_tile = tiles.permute(tokens)[:, :, 64:128].reshape(2, 3, 8, 8, 5)
    assert torch.equal(second_tile, tokens.view(2, 3, 16, 24, 5)[:, :, :8, 8:16])


def test_tiles_need_a_grid_of_whole_tiles():
    with pytest.raises(ValueError, match=r"FlexTiles: grid must be made of multiples of \(8, 8\), got \(16, 20\)"):
        FlexTiles(window_of(va.Clear(radius=2), (16, 20)), (16, 20), CPU)


def test_without_flex_ours_and_dense_are_timed():
    told = []
    result = bench_case(Case(va.Clear(radius=3), (16, 8), 2, 16), repeats=2, warmup=1, flex=False, on_run=told.append)
    ours, dense = result.contenders
    assert (ours.name, ours.ratio) == (OURS, 1.0)
    assert dense.name == DENSE
    assert dense.ratio == pytest.approx(dense.seconds / ours.seconds)
    assert (ours.max_error < 2e-5, dense.max_error) == (True, None)
    assert told == [OURS, DENSE] * 3


def test_the_triton_kernels_are_benchmarked_where_they_are_interpreted():
    case = Case(va.Clear(radius=3), (8, 8), 1, 16)
    ours, _dense = bench_case(case, repeats=1, warmup=0, flex=False, backend="triton").contenders
    assert 0 < ours.max_error < 2e-5
    assert ours.seconds > 0


def test_pytorchs_fused_kernels_are_asked_for_by_name():
    query, key, value = torch.randn(3, 1, 2, 9, 8)
    chosen = DenseAttention(SDPBackend.MATH)(query, key, value)
    torch.testing.assert_close(chosen, DenseAttention()(query, key, value))
    with pytest.raises(RuntimeError, match=r"No (available|viable) "):
        DenseAttention(SDPBackend.CUDNN_ATTENTION)(query, key, value)


def natten_module(attend):
    module = types.ModuleType("natten")
    module.na2d = attend
    return module


def test_natten_is_a_rival_of_neighborhoods(monkeypatch):
    case = Case(va.Neighborhood(kernel_size=(3, 40)), (16, 8), 2, 16)
    monkeypatch.setitem(sys.modules, "natten", None)
    assert bench_case(case, repeats=1, flex=False).contenders[-1] == attention_bench.Contender(
        NATTEN, None, problem="not installed"
    )
    monkeypatch.setitem(sys.modules, "natten", natten_module(va.na2d))
    right = bench_case(case, repeats=1, flex=False).contenders[-1]
    assert (right.name, right.problem) == (NATTEN, "")
    assert right.max_error < 2e-5
    wide = natten_module(lambda query, key, value, kernel_size: va.na2d(query, key, value, (5, 8)))
    monkeypatch.setitem(sys.modules, "natten", wide)
    assert bench_case(case, repeats=1, flex=False).contenders[-1].problem.startswith("wrong result, off by ")
    circle = bench_case(Case(va.Clear(radius=3), (16, 8), 2, 16), repeats=1, flex=False)
    assert [way.name for way in circle.contenders] == [OURS, DENSE]


@pytest.mark.slow
def test_all_rivals_are_checked_and_timed():
    result = bench_case(Case(va.Neighborhood(kernel_size=5), (16, 24), 2, 16), repeats=1, warmup=1)
    ways = [way for way in result.contenders if way.name != NATTEN]  # it may be installed
    assert [way.name for way in ways] == [OURS, DENSE, FLEX_ROWS, FLEX_TILES, FLEX_PERMUTED]
    assert [way.problem for way in ways] == [""] * 5
    assert all(way.max_error < 2e-5 for way in ways if way.name != DENSE)


class WrongInOneBorderQuery(va.Clear):
    def __call__(self, query, key, value, layout, scale=None, **options):
        output = super().__call__(query, key, value, layout, scale, **options).clone()
        output[:, -1] += 1e-3
        return output


def test_a_wrong_result_is_not_timed():
    with pytest.raises(RuntimeError, match=r"bench: .*16x8 tokens.* is off by 1\.\d+e-03: this is a bug"):
        bench_case(Case(WrongInOneBorderQuery(radius=3), (16, 8), 2, 16), repeats=1, flex=False)


def test_a_rival_that_cannot_run_is_reported(monkeypatch):
    class Uncompilable(attention_bench.FlexRows):
        def __call__(self, query, key, value):
            raise OSError("no compiler here\nsecond line")

    class Wrong(attention_bench.FlexTiles):
        def attend(self, query, key, value, block_mask):
            return value

    monkeypatch.setattr(attention_bench, "FlexRows", Uncompilable)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda query, key, value, block_mask: value)
    monkeypatch.setattr(attention_bench, "FlexTiles", Wrong)
    result = bench_case(Case(va.Clear(radius=3), (16, 8), 2, 16), repeats=1)
    by_name = {way.name: way for way in result.contenders}
    assert by_name[FLEX_ROWS].problem == "no compiler here"
    assert by_name[FLEX_TILES].problem.startswith("wrong result, off by ")
    assert by_name[FLEX_TILES].seconds is by_name[FLEX_PERMUTED].ratio is None


def test_growth_compares_two_sizes(monkeypatch):
    sizes = []

    def attention(query, key, value, *, grid, radius, backend):
        assert backend == "auto"
        sizes.append((grid, query.shape, radius))

    monkeypatch.setattr(attention_bench.va, "clear_attention", attention)
    assert growth(radius=4, heads=2, head_dim=8, repeats=1) > 0
    assert sizes == [((side, side), (1, side * side, 2, 8), 4) for side in (64, 128)] * 2


def test_memory_is_that_of_a_whole_process_of_its_own():
    found = memory_probe.probe((24, 40), heads=2, head_dim=16, radius=3.0)
    assert found["grid"] == [24, 40]
    assert found["inputs_bytes"] == 3 * 24 * 40 * 2 * 16 * 4
    assert 50 * 2**20 < found["peak_bytes"] < 1500 * 2**20


def test_memory_of_the_caller_does_not_count():
    small = memory_probe.probe((8, 16), heads=1, head_dim=8, radius=3.0)
    held = torch.ones(600 * 2**20 // 4)
    again = memory_probe.probe((8, 16), heads=1, head_dim=8, radius=3.0)
    assert held[-1] == 1
    assert abs(again["peak_bytes"] - small["peak_bytes"]) < 100 * 2**20


def test_a_failed_measuring_process_says_why():
    with pytest.raises(RuntimeError, match=r"probe: the measuring process failed: .*radius.*-1"):
        memory_probe.probe((4, 6), heads=1, head_dim=8, radius=-1)


def test_report_as_text_and_json():
    result = bench_case(Case(va.Clear(radius=3), (16, 8), 2, 16), repeats=1, flex=False)
    memory = {"peak_bytes": 700 * 2**20, "inputs_bytes": 108 * 2**20}
    report = BenchReport({"threads": 2}, (result,), 4.25, memory)
    text = str(report)
    assert "threads 2" in text
    assert "clear(radius=3), 16x8 tokens, 2 heads of 16" in text
    assert "128x128 tokens take 4.25 times as long as 64x64 (linear: 4)" in text
    assert "need 700 MiB at the peak of a whole process, of which query, key and value are 108" in text
    content = report.to_dict()
    assert content["cases"][0]["case"] == {"operator": "clear(radius=3)", "grid": (16, 8), "heads": 2, "head_dim": 16}
    assert content["cases"][0]["contenders"][0]["name"] == OURS
