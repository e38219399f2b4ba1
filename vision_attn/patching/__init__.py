"""Swapping attention in diffusers models: `patch`, `unpatch`, `verify`, `Patch`."""

from vision_attn.patching.swap import Patch, patch, unpatch
from vision_attn.patching.verify import verify

__all__ = ["Patch", "patch", "unpatch", "verify"]
