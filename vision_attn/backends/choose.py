"""Which backends exist, which of them are usable here and why not, and the choice of `auto`."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import Tensor

from vision_attn.backends.triton import why_not_served, why_not_triton
from vision_attn.kernels.reach import Reach

BACKENDS = ("auto", "dense", "tiled", "flex", "triton", "natten")


class Backends(dict[str, str]):
    """Backend name to `"yes"` or the reason why it cannot be used here; prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {usable}" for name, usable in self.items())


def backends() -> Backends:
    """What each backend says about this machine.

    Example:
        >>> import vision_attn as va
        >>> va.backends()["tiled"]
        'yes'
    """
    return Backends({name: _why_not(name) or "yes" for name in BACKENDS if name != "auto"})


def resolve(backend: str, where: str, query: Tensor, value: Tensor, reach: Reach | None = None) -> str:
    """The backend to use for `backend`; for `"auto"` the Triton kernels on a GPU that can run them, else `tiled`.

    Args:
        backend: One of `BACKENDS`.
        where: Name of the public function, for the message.
        query: `[B, S, H, D]`.
        value: `[B, S, Hkv, Dv]`.
        reach: The window, where there is one.

    Raises:
        ValueError: unknown name.
        ImportError: the backend's package is missing.
        RuntimeError: the backend's hardware is missing.
    """
    if backend == "auto":
        on_gpu = query.is_cuda and why_not_triton() is None and why_not_served(query, value, reach) is None
        return "triton" if on_gpu else "tiled"
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{where}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = _why_not(backend)
    if reason is None:
        return backend
    missing = ImportError if "pip install" in reason else RuntimeError
    raise missing(f"{where}: backend={backend!r} cannot be used here: {reason}, or use backend='auto'")


def _why_not(backend: str) -> str | None:
    return {"flex": _why_not_flex, "triton": why_not_triton, "natten": _why_not_natten}.get(backend, lambda: None)()


def _why_not_flex() -> str | None:
    if torch.cuda.is_available() or any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return None
    return "torch compiles it with a C++ compiler and finds none: install g++, or set CXX"


def _why_not_natten() -> str | None:
    if importlib.util.find_spec("natten") is None:
        return "pip install natten (built for this torch and CUDA)"
    import natten

    if not getattr(natten, "HAS_LIBNATTEN", False):
        return "natten is installed without its kernels: pip install a natten build for this torch and CUDA"
    return None
