"""Which backends exist, which of them are usable here and why not, and the choice of `auto`."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

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


def resolve(backend: str, where: str) -> str:
    """The backend to use for `backend`, which may be `"auto"`.

    Args:
        backend: One of `BACKENDS`.
        where: Name of the public function, for the message.

    Raises:
        ValueError: unknown name.
        ImportError: the backend's package is missing.
        RuntimeError: the backend's hardware is missing.
    """
    if backend == "auto":
        return "tiled"
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{where}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = _why_not(backend)
    if reason is None:
        return backend
    missing = ImportError if "pip install" in reason else RuntimeError
    raise missing(f"{where}: backend={backend!r} cannot be used here: {reason}, or use backend='auto'")


def _why_not(backend: str) -> str | None:
    return {"flex": _why_not_flex, "triton": _why_not_triton, "natten": _why_not_natten}.get(backend, lambda: None)()


def _why_not_flex() -> str | None:
    if torch.cuda.is_available() or any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return None
    return "torch compiles it with a C++ compiler and finds none: install g++, or set CXX"


def _why_not_triton() -> str | None:
    if not torch.cuda.is_available():
        return "it needs a CUDA or ROCm GPU and torch sees none"
    return "this release has no Triton kernels yet"


def _why_not_natten() -> str | None:
    if importlib.util.find_spec("natten") is None:
        return "pip install natten (built for this torch and CUDA)"
    import natten

    if not getattr(natten, "HAS_LIBNATTEN", False):
        return "natten is installed without its kernels: pip install a natten build for this torch and CUDA"
    return None
