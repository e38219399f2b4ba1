"""Attention for diffusion and vision models: swap it in one line, take it back exactly."""

from __future__ import annotations

import importlib
from typing import Any

from vision_attn.backends import backends
from vision_attn.errors import PatchError, UnsupportedError
from vision_attn.layout import TokenLayout
from vision_attn.operators import (
    LSDA,
    Agent,
    AgentSD,
    BiLevelRouting,
    Clear,
    Cost,
    Dense,
    Halo,
    HiLo,
    Neighborhood,
    agent_attention,
    block_sparse_attention,
    clear_attention,
    merge_attention,
    na1d,
    na2d,
    na3d,
    operators,
    parse,
    proportional_scale,
    register_operator,
)

__version__ = "0.1.0"

# Loaded on first use: they are for models, and not every user of an operator has diffusers installed.
_LAZY = dict.fromkeys(("Patch", "patch", "unpatch", "verify"), "vision_attn.patching")
_SUBMODULES = ("guidance", "simulator")

__all__ = [
    "LSDA",
    "Agent",
    "AgentSD",
    "BiLevelRouting",
    "Clear",
    "Cost",
    "Dense",
    "Halo",
    "HiLo",
    "Neighborhood",
    "Patch",
    "PatchError",
    "TokenLayout",
    "UnsupportedError",
    "agent_attention",
    "backends",
    "block_sparse_attention",
    "clear_attention",
    "guidance",
    "merge_attention",
    "na1d",
    "na2d",
    "na3d",
    "operators",
    "parse",
    "patch",
    "proportional_scale",
    "register_operator",
    "simulator",
    "unpatch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_SUBMODULES])
