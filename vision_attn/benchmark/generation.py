"""One image from a stock pipeline, the same way for every attention: same prompt, same starting latents."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


@dataclass(frozen=True)
class Request:
    """What to draw.

    Args:
        prompt: Text.
        seed: Of the starting latents, drawn on the CPU so that every device starts from the same ones.
        height_px: Image height in pixels; None is the pipeline's own.
        width_px: Image width in pixels; None is the pipeline's own.
        steps: Denoising steps; None is the pipeline's own.
        guidance: Classifier-free guidance scale; None is the pipeline's own.
        frames: Frames of a video; None is the pipeline's own.
        max_sequence_length: Tokens of the prompt; None is the pipeline's own.
    """

    prompt: str
    seed: int = 0
    height_px: int | None = None
    width_px: int | None = None
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    max_sequence_length: int | None = None

    def filled_from(self, defaults: Mapping[str, Any]) -> Request:
        """This request with what it leaves open taken from a model's `vision_attn.json`."""
        names = {
            "height_px": "height",
            "width_px": "width",
            "steps": "num_inference_steps",
            "guidance": "true_cfg_scale",
            "frames": "num_frames",
            "max_sequence_length": "max_sequence_length",
        }
        taken = {
            field: defaults[name] for field, name in names.items() if getattr(self, field) is None and name in defaults
        }
        if not self.prompt and "prompt" in defaults:
            taken["prompt"] = defaults["prompt"]
        return replace(self, **taken)

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """The arguments of `pipe.__call__` that say the same.

        Raises:
            ValueError: the pipeline has no argument for something that this request asks for.
        """
        accepted = set(inspect.signature(type(pipe).__call__).parameters)
        wanted: dict[str, Any] = {
            "prompt": self.prompt,
            "height": self.height_px,
            "width": self.width_px,
            "num_inference_steps": self.steps,
            "num_frames": self.frames,
            "max_sequence_length": self.max_sequence_length,
        }
        if self.guidance is not None:
            # Guidance-distilled pipelines (FLUX) take real classifier-free guidance under another name, and only with
            # a negative prompt.
            wanted["true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"] = self.guidance
            if "true_cfg_scale" in accepted and self.guidance > 1:
                wanted["negative_prompt"] = ""
        wanted = {name: value for name, value in wanted.items() if value is not None}
        refused = sorted(set(wanted) - accepted)
        if refused:
            raise ValueError(f"generate: {type(pipe).__name__} takes no {', '.join(refused)}: leave it out")
        return wanted


def generate(pipe: Any, request: Request, **extra: Any) -> NDArray[np.float32]:
    """Run the pipeline once.

    Args:
        pipe: A diffusers text-to-image or text-to-video pipeline.
        request: What to draw.
        extra: Further arguments of the pipeline's `__call__`.

    Returns:
        `[Y, X, C]` for an image, `[T, Y, X, C]` for a video, in `[0, 1]`.

    Raises:
        ValueError: the pipeline cannot do what the request asks for.
    """
    generator = torch.Generator("cpu").manual_seed(request.seed)
    result = pipe(**request.arguments(pipe), generator=generator, output_type="np", **extra)
    pictures = result.images if hasattr(result, "images") else result.frames
    return np.asarray(pictures[0], dtype=np.float32)


def denoiser(pipe: Any) -> nn.Module:
    """The model of the pipeline whose attention is swapped: its transformer or UNet.

    Raises:
        ValueError: the pipeline has neither.
    """
    for name in ("transformer", "unet"):
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            return model
    raise ValueError(f"denoiser: pipe must have a transformer or a UNet, got {type(pipe).__name__}")
