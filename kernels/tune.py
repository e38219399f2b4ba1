"""Finds the fastest launches of the windowed kernels on this GPU and writes them as a table that `launch` reads.

Candidates are timed on a window that stands for many; one that does not compile or fit is left out. The table goes to a
file of its own: point `VISION_ATTN_LAUNCH_CONFIGS` at it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from .geometry import geometry_of
from .launch import LaunchConfig, architecture_of
from .windowed import Call, backward, forward

KERNELS = ("windowed_forward", "windowed_backward_dq", "windowed_backward_dkv")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Measure = Callable[[Callable[[], Any]], float]
# A window that is neither tiny nor most of the grid, with text and more heads than multiprocessors have programs.
_GRID, _WINDOW, _TEXT, _HEADS = (128, 128), 33, 256, 16


def tune(
    kernels: Sequence[str] = KERNELS,
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[str] = ("bfloat16",),
    *,
    window: int | None = None,
    device: str = "cuda",
    measure: Measure | None = None,
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Time candidates and keep the fastest.

    Args:
        kernels: Keys of `launch_configs.json`, windowed ones.
        head_dims: Up to 256; a row serves head dims up to its own.
        dtypes: Names; the two of 16 bits share rows.
        window: Tokens per axis of a square window; rows then serve windows of at most so many keys, and a table for
            several is one whose rows are in their order. None times 33 and serves all.
        device: Where to run.
        measure: Milliseconds of a call; None takes the median of 20 on the GPU's clock.
        on_run: Told what was timed.

    Returns:
        A table in the form of `launch_configs.json`, for this architecture.

    Raises:
        ValueError: an unknown kernel or dtype, a head dim or window out of range, or no GPU.
        RuntimeError: no candidate that runs.
    """
    require(kernels, dtypes, head_dims, window, device)
    architecture = architecture_of(torch.device(device))
    table: dict[str, Any] = {kernel: {architecture: []} for kernel in kernels}
    for dtype, head_dim in itertools.product(dtypes, sorted(head_dims)):
        calls = _calls(head_dim, DTYPES[dtype], device, window or _WINDOW)
        for kernel in kernels:
            config = _fastest(kernel, calls[kernel], measure or _median_milliseconds, on_run, f"{dtype} {head_dim}")
            row = {"bits": 32 if dtype == "float32" else 16, "head_dim": head_dim} | _fields(config)
            table[kernel][architecture].append(row if window is None else row | {"window": window * window})
    return table


def require(
    kernels: Sequence[str],
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    window: int | None = None,
    device: str = "cuda",
) -> None:
    """Raise ValueError for an unknown kernel or dtype, a head dim or window out of range, and where there is no GPU."""
    if window is not None and not 1 <= window <= min(_GRID):
        raise ValueError(f"tune: window must be 1 to {min(_GRID)} tokens per axis, got {window}")
    for head_dim in head_dims:
        if not 1 <= head_dim <= 256:
            raise ValueError(f"tune: head_dims must be 1 to 256, got {head_dim}")
    for name, given, known in (("kernels", kernels, KERNELS), ("dtypes", dtypes, tuple(DTYPES))):
        for item in given:
            if item not in known:
                raise ValueError(f"tune: {name} must be among {', '.join(known)}, got {item!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("tune: device must be a CUDA or ROCm GPU, torch sees none: run this where the kernels will")


def to_json(table: dict[str, Any]) -> str:
    """One row per line."""
    return json.dumps(table, indent=2) + "\n"


def candidates() -> Iterator[LaunchConfig]:
    """Launches worth a try: 16 rows of the fixed tile per warp, as chained products want them, or 32."""
    for warps, rows, moving, stages in itertools.product((4, 8), (16, 32), (16, 32, 64, 128), (1, 2, 3)):
        if warps * rows <= 128:
            yield LaunchConfig(warps * rows, moving, warps, stages)


def _fastest(
    kernel: str, call: Callable[[LaunchConfig], Any], measure: Measure, on_run: Callable[[str], None], what: str
) -> LaunchConfig:
    best: tuple[float, LaunchConfig] | None = None
    for config in candidates():
        if kernel.endswith("dkv"):  # programs hold keys there
            config = replace(config, q_tokens=config.kv_tokens, kv_tokens=config.q_tokens)
        try:
            milliseconds = measure(lambda config=config: call(config))  # type: ignore[misc]
        except Exception as error:  # what a compiler or driver raises where a tile does not fit differs by version
            on_run(f"{kernel} {what} {config}: {type(error).__name__}")
            continue
        on_run(f"{kernel} {what} {config}: {milliseconds:.3f} ms")
        if best is None or milliseconds < best[0]:
            best = milliseconds, config
    if best is None:
        raise RuntimeError(f"tune: no candidate of {kernel} runs here with {what}")
    return best[1]


def _calls(head_dim: int, dtype: torch.dtype, device: str, window: int) -> dict[str, Callable[[LaunchConfig], Any]]:
    tokens = _GRID[0] * _GRID[1] + _TEXT
    query, key, value, grad = (torch.randn(1, tokens, _HEADS, head_dim, dtype=dtype, device=device) for _ in range(4))
    geometry = geometry_of(_GRID, (window, window), (1, 1), (1, 1), (False, False), 0)
    call = Call(query, key, value, None, None, None, None, geometry, _TEXT, head_dim**-0.5)
    output, lse = forward(call)
    grad_lse = torch.zeros_like(lse)
    return {
        "windowed_forward": lambda config: forward(call, config),
        "windowed_backward_dq": lambda config: backward(call, output, lse, grad, grad_lse, config_dq=config),
        "windowed_backward_dkv": lambda config: backward(call, output, lse, grad, grad_lse, config_dkv=config),
    }


def _fields(config: LaunchConfig) -> dict[str, int]:
    names = ("q_tokens", "kv_tokens", "warps", "stages")
    return {name: getattr(config, name) for name in names}


def _median_milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]
