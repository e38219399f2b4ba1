"""Which denoiser serves a stock pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vision_attn.pipelines.denoiser import Denoiser
from vision_attn.pipelines.denoiser_flow import FluxDenoiser, SD3Denoiser
from vision_attn.pipelines.denoiser_unet import UNetDenoiser

_CLASSES: tuple[type[Denoiser], ...] = (UNetDenoiser, SD3Denoiser, FluxDenoiser)


def denoiser_class(where: str, pipe: Any, classes: Sequence[type[Denoiser]] = _CLASSES) -> type[Denoiser]:
    """The class that serves a stock pipeline.

    Args:
        where: Who asks, for messages.
        pipe: The pipeline.
        classes: Those that may; by default all for text-to-image.

    Raises:
        NotImplementedError: another pipeline, one of a model distilled to a few steps, or one with a cache of steps.
    """
    names = [cls.__name__ for cls in type(pipe).__mro__]
    found = next((cls for cls in classes if any(name in cls.pipelines for name in names)), None)
    if found is None:
        served = ", ".join(name for cls in classes for name in cls.pipelines)
        raise NotImplementedError(
            f"{where}: pipe must be one of {served}, got {type(pipe).__name__}: other denoisers see more than the "
            "latents and the text, or are called in another way"
        )
    found.check(where, pipe)
    return found
