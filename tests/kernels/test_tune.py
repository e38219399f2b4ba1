"""Tuning with a clock of our own: which launch wins, what is left out, and that `launch` reads what it writes."""

import json

import pytest
import torch

from vision_attn.kernels import launch, tune


def test_the_fastest_candidate_becomes_a_row_that_is_read_first(tmp_path, monkeypatch):
    wanted = {
        "windowed_forward": launch.LaunchConfig(64, 32, 4, 2),
        "windowed_backward_dkv": launch.LaunchConfig(16, 128, 8, 1),
    }
    current = {}

    def calls(head_dim, dtype, device, window):
        assert window == 7
        return {
            kernel: lambda config, kernel=kernel: current.update({"now": (kernel, config)}) for kernel in tune.KERNELS
        }

    def measure(call):
        call()
        kernel, config = current["now"]
        if config.stages == 3:
            raise RuntimeError("out of shared memory")
        return 1.0 if config == wanted[kernel] else 2.0

    monkeypatch.setattr(tune, "_calls", calls)
    said = []
    table = tune.tune(list(wanted), (64, 128), window=7, device="cpu", measure=measure, on_run=said.append)
    rows = table["windowed_forward"]["cpu"]
    assert rows == [
        {"bits": 16, "head_dim": width, "q_tokens": 64, "kv_tokens": 32, "warps": 4, "stages": 2, "window": 49}
        for width in (64, 128)
    ]
    assert any("RuntimeError" in line for line in said)
    path = tmp_path / "mine.json"
    path.write_text(tune.to_json(table))
    monkeypatch.setenv("VISION_ATTN_LAUNCH_CONFIGS", str(path))
    launch.tables.cache_clear()
    try:
        assert launch.choose("windowed_forward", 100, torch.bfloat16, "cpu") == wanted["windowed_forward"]
        assert launch.choose("windowed_backward_dkv", 64, torch.float16, "cpu") == wanted["windowed_backward_dkv"]
        assert launch.choose("windowed_forward", 64, torch.bfloat16, "cpu", 50) != wanted["windowed_forward"]
        # What the file lacks comes from the package's own table.
        theirs = json.loads(launch.CONFIGS.read_text())["windowed_forward"]["default"]
        own = next(row for row in theirs if row["bits"] == 16 and row["head_dim"] == 256)
        assert launch.choose("windowed_forward", 256, torch.float16, "cpu").q_tokens == own["q_tokens"]
        assert launch.choose("windowed_forward", 64, torch.float16, "sm90").warps > 0
    finally:
        launch.tables.cache_clear()


def test_candidates_hold_16_or_32_rows_per_warp():
    found = list(tune.candidates())
    assert len(found) == len(set(found))
    assert all(config.q_tokens in (16 * config.warps, 32 * config.warps) for config in found)


def test_wrong_input_and_no_gpu_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"tune: kernels must be among windowed_forward, .* got 'dense'"):
        tune.tune(["dense"])
    with pytest.raises(ValueError, match="tune: dtypes must be among float16, bfloat16, float32, got 'int8'"):
        tune.tune(dtypes=["int8"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="tune: device must be a CUDA or ROCm GPU, torch sees none"):
        tune.tune()
    monkeypatch.setattr(tune, "_calls", lambda *args: dict.fromkeys(tune.KERNELS, lambda config: 1 / 0))
    with pytest.raises(RuntimeError, match="no candidate of windowed_forward runs here with bfloat16 64"):
        tune.tune(["windowed_forward"], (64,), device="cpu", measure=lambda call: call())


@pytest.mark.parametrize(
    ("kernel", "head_dim", "message"),
    [("windowed_forward", 257, "windowed_forward: head_dim must be at most 256, got 257: use backend='tiled'")],
)
def test_a_head_dim_without_a_launch(kernel, head_dim, message):
    with pytest.raises(NotImplementedError, match=message):
        launch.choose(kernel, head_dim, torch.float16, "sm90")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((48, 64, 4, 2), "q_tokens must be a power of two of at least 16, got 48"),
        ((64, 8, 4, 2), "kv_tokens must be a power of two of at least 16, got 8"),
        ((64, 64, 3, 2), "warps must be a power of two of at least 1, got 3"),
        ((64, 64, 4, 0), "stages must be a power of two of at least 1, got 0"),
    ],
)
def test_a_launch_that_no_kernel_takes(sizes, message):
    with pytest.raises(ValueError, match=message):
        launch.LaunchConfig(*sizes)


@pytest.mark.parametrize(
    ("tokens", "lengths", "shape"),
    [
        (128, (1, 64, 64), (1, 8, 16)),
        (64, (30, 48, 80), (4, 4, 4)),
        (64, (1, 1, 4096), (1, 1, 64)),
        (64, (2, 3, 100), (2, 4, 8)),
        (64, (1, 2, 3), (1, 2, 32)),
    ],
)
def test_tile_shapes_are_as_cubic_as_the_grid_allows(tokens, lengths, shape):
    assert launch.tile_shape(tokens, lengths) == shape
