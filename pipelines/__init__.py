"""Diffusers pipelines: loading them, and the ones built on guidance and patching."""

from __future__ import annotations

import importlib
from typing import Any

# Loaded on first use: loading a pipeline needs none of them, and they need diffusers.
_LAZY = {
    "AStarCallback": "callback",
    "AStarPipeline": "a_star",
    "AStarStep": "modular_a_star",
    "StructuredDiffusionPipeline": "structured",
}

__all__ = ["AStarCallback", "AStarPipeline", "AStarStep", "StructuredDiffusionPipeline"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
