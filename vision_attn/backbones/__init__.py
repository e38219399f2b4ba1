"""Backbones for `timm.create_model`: importing this package registers the names `va_*`.

Example:
    >>> import timm, vision_attn.backbones
    >>> timm.list_models("va_agent_deit_*")[0]
    'va_agent_deit_base_patch16_224'
"""

from __future__ import annotations

try:
    from timm import create_model  # a clear message before the modules below fail on it
except ImportError as error:
    raise ImportError('vision_attn.backbones: timm is missing: pip install "vision-attn[timm]"') from error

from vision_attn.backbones import (
    agent_cswin,
    agent_deit,
    agent_pvt,
    agent_swin,
    biformer,
    crossformer,
    litv2,
    nat,
)

__all__ = [
    "agent_cswin",
    "agent_deit",
    "agent_pvt",
    "agent_swin",
    "biformer",
    "create_model",
    "crossformer",
    "litv2",
    "nat",
]
