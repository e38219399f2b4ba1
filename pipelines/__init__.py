"""Diffusers pipelines: loading them, and the ones built on guidance and patching."""
