"""Swapping attention in diffusers models: `patch`, `unpatch`, `Patch`."""

from vision_attn.patching.swap import Patch, patch, unpatch

__all__ = ["Patch", "patch", "unpatch"]
