"""How a kernel is launched: tile sizes, warps and stages, read from `launch_configs.json` per kernel and architecture.

A file of the same form at the path in `VISION_ATTN_LAUNCH_CONFIGS` comes first: `vision-attn tune` writes one.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).with_name("launch_configs.json")


@dataclass(frozen=True)
class LaunchConfig:
    """One kernel's launch.

    Attributes:
        q_tokens: Queries per tile, a power of two of at least 16.
        kv_tokens: Keys per tile, a power of two of at least 16.
        warps: Warps per program.
        stages: Key tiles in flight.
        registers: Most registers per thread on an NVIDIA chip; None lets the compiler trade them for programs per
            multiprocessor, for which it spills a few at times.
    """

    q_tokens: int
    kv_tokens: int
    warps: int
    stages: int
    registers: int | None = None

    def __post_init__(self) -> None:
        for name in ("q_tokens", "kv_tokens", "warps", "stages"):
            value, least = getattr(self, name), 16 if name.endswith("tokens") else 1
            power = isinstance(value, int) and value >= least and (name == "stages" or value & (value - 1) == 0)
            if not power:
                raise ValueError(f"LaunchConfig: {name} must be a power of two of at least {least}, got {value!r}")


def choose(kernel: str, head_dim: int, dtype: torch.dtype, architecture: str, window: int = 0) -> LaunchConfig:
    """The launch of a kernel for this head dim (the larger of keys and values), dtype, architecture and window.

    Args:
        kernel: A key of the file, such as `windowed_forward`.
        head_dim: Up to 256.
        dtype: Of query, key and value.
        architecture: `sm80`, `gfx942`, ...; see `rows_for`.
        window: Keys of the box around a window. A row may have a `window`, the most it serves; 0 fits in any.

    Raises:
        NotImplementedError: a larger head dim.
    """
    bits = 32 if dtype == torch.float32 else 16
    for table in tables():
        rows = table.get(kernel, {})
        for row in rows_for(rows, architecture):
            if row["bits"] == bits and head_dim <= row["head_dim"] and window <= row.get("window", window):
                return config_of(row)
    raise NotImplementedError(f"{kernel}: head_dim must be at most 256, got {head_dim}: use backend='tiled'")


def rows_for(rows: dict[str, list[dict[str, Any]]], architecture: str) -> list[dict[str, Any]]:
    """A kernel's rows for an architecture: its own; else those of a relative; else the default, which fits small chips.

    AMD's chips have 64 KiB of shared memory and warps of 64, so that NVIDIA's rows do not suit them.
    """
    relative = "gfx942" if architecture.startswith("gfx") else "default"
    return rows.get(architecture) or rows.get(relative) or rows.get("default", [])


def config_of(row: dict[str, Any]) -> LaunchConfig:
    """The launch of a row of the table."""
    return LaunchConfig(row["q_tokens"], row["kv_tokens"], row["warps"], row["stages"], row.get("registers"))


def cut(config: LaunchConfig, kernel: str, q_tokens: int, kv_tokens: int) -> LaunchConfig:
    """The launch with tiles of at most so many tokens, powers of two; each warp keeps its rows of the tile it holds."""
    smaller = replace(config, q_tokens=min(config.q_tokens, q_tokens), kv_tokens=min(config.kv_tokens, kv_tokens))
    held = "kv_tokens" if kernel.endswith("dkv") else "q_tokens"
    return replace(smaller, warps=max(1, config.warps * getattr(smaller, held) // getattr(config, held)))


def launch_options(config: LaunchConfig) -> dict[str, int]:
    """What Triton is told of a launch."""
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.registers is not None and torch.version.hip is None:
        options["maxnreg"] = config.registers
    return options


def architecture_of(device: torch.device) -> str:
    """`sm90` or `gfx942` for a GPU, `cpu` for the interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def tile_shape(tokens: int, lengths: tuple[int, int, int]) -> tuple[int, int, int]:
    """A box of `tokens` tokens as close to a cube as axes of these lengths allow; what is too much runs along X."""
    shape = [1, 1, 1]
    while math.prod(shape) < tokens:
        open_axes = [axis for axis in (2, 1, 0) if shape[axis] < lengths[axis]]
        shape[min(open_axes, key=lambda axis: shape[axis], default=2)] *= 2
    return shape[0], shape[1], shape[2]


@lru_cache(maxsize=1)
def tables() -> tuple[dict[str, Any], ...]:
    """The tables in the order in which they are asked; the package's own is the last."""
    own = os.environ.get("VISION_ATTN_LAUNCH_CONFIGS")
    paths = [Path(own), CONFIGS] if own else [CONFIGS]
    return tuple(json.loads(path.read_text(encoding="utf-8")) for path in paths)
