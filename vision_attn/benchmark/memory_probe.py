"""Peak memory of one `clear_attention` call in a process of its own: `python -m vision_attn.benchmark.memory_probe`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from vision_attn.benchmark.memory import status_bytes


def probe(grid: tuple[int, int], *, heads: int, head_dim: int, radius: float, device: str = "cpu") -> dict[str, Any]:
    """Run this module in a fresh process and return what it found.

    Args:
        grid: Rows and columns of tokens.
        heads: Number of heads.
        head_dim: Channels per head.
        radius: Of the window, in tokens.
        device: Where the call runs.

    Returns:
        `peak_bytes` of the whole process (on a GPU: of its allocator), `inputs_bytes`, and the call's shape.

    Raises:
        RuntimeError: the process failed.
    """
    arguments = [*map(str, grid), str(heads), str(head_dim), str(radius), device]
    command = [sys.executable, "-m", "vision_attn.benchmark.memory_probe", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise RuntimeError(f"probe: the measuring process failed: {(answer.stderr.strip().splitlines() or ['?'])[-1]}")
    return dict(json.loads(answer.stdout))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform.startswith("linux"):
        # Not ru_maxrss: a child starts with its parent's there, and the parent has just run dense attention.
        return status_bytes("VmHWM")
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main(rows: str, columns: str, heads: str, head_dim: str, radius: str, where: str) -> None:
    import vision_attn as va

    device = torch.device(where)
    grid = (int(rows), int(columns))
    shape = (1, grid[0] * grid[1], int(heads), int(head_dim))
    query, key, value = (torch.randn(shape, device=device) for _ in range(3))
    with torch.no_grad():
        va.clear_attention(query, key, value, grid=grid, radius=float(radius))
    found = {
        "grid": grid,
        "heads": shape[2],
        "head_dim": shape[3],
        "radius": float(radius),
        "inputs_bytes": 3 * query.nbytes,
        "peak_bytes": _peak_bytes(device),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
