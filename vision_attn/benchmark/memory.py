"""Peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager: bytes that the block needed at its peak, above what was in use when it began.

    On CUDA the allocator's own count. On Linux the kernel's high-water mark of resident memory, which it lets a process
    reset; elsewhere `bytes` stays None, because `ru_maxrss` cannot be reset and would report an earlier peak.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _reset_high_water_mark()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = status_bytes("VmHWM")
        self.bytes = max(0, peak - self._before)


def _reset_high_water_mark() -> int | None:
    """Forget the peak so far; returns the bytes resident now, or None where the system cannot do it."""
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(AttributeError, OSError):  # a libc other than glibc has no malloc_trim
        # Memory that the C allocator keeps after an earlier run would hide the same need of this one.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
        return status_bytes("VmRSS")
    except OSError:
        return None


def status_bytes(field: str) -> int:
    """A memory field of this process's status, such as VmRSS (now) or VmHWM (at its peak); Linux only."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no field {field}")
