"""Diffusers pipelines: loading them, and the ones built on guidance and patching."""

from vision_attn.pipelines.structured import StructuredDiffusionPipeline

__all__ = ["StructuredDiffusionPipeline"]
