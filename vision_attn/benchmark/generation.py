"""One image from a stock pipeline, the same way for every attention: same prompt, same starting latents."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Request:
    """What to draw.

    Args:
        prompt: Text, also an empty one; None is the model's own example.
        seed: Of the starting latents, drawn on the CPU so that every device starts from the same ones.
        height_px: Image height in pixels; None is the pipeline's own.
        width_px: Image width in pixels; None is the pipeline's own.
        steps: Denoising steps; None is the pipeline's own.
        guidance: Classifier-free guidance scale; None is the pipeline's own.
        frames: Frames of a video; None is the pipeline's own.
        max_sequence_length: Tokens of the prompt; None is the pipeline's own.
    """

    prompt: str | None = None
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
            "prompt": "prompt",
            "height_px": "height",
            "width_px": "width",
            "steps": "num_inference_steps",
            "guidance": "true_cfg_scale" if "true_cfg_scale" in defaults else "guidance_scale",
            "frames": "num_frames",
            "max_sequence_length": "max_sequence_length",
        }
        taken = {
            field: defaults[name] for field, name in names.items() if getattr(self, field) is None and name in defaults
        }
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
        ValueError: the pipeline cannot do what the request asks for, such as a size between two numbers of tokens.
    """
    check_size(pipe, request)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    result = pipe(**request.arguments(pipe), generator=generator, output_type="np", **extra)
    pictures = result.images if hasattr(result, "images") else result.frames
    image = np.asarray(pictures[0], dtype=np.float32)
    _require_asked_size(pipe, request, image)
    return image


def draws_video(pipe: Any) -> bool:
    """Whether the pipeline's result has frames."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters


def check_size(pipe: Any, request: Request) -> None:
    """Raise ValueError for a height or width that the pipeline would round, naming the nearest size that it would not.

    Pipelines round in silence, and a size that is rounded to nothing fails deep inside.
    """
    multiple = size_multiple(pipe)
    sides = (request.height_px, request.width_px)
    if any(side is not None and side % multiple for side in sides):
        nearest = [None if side is None else multiple * max(1, round(side / multiple)) for side in sides]
        raise ValueError(
            f"generate: height and width must be multiples of {multiple} pixels for {type(pipe).__name__}, got "
            f"{_size(sides)}: the nearest size is {_size(nearest)}"
        )


def size_multiple(pipe: Any) -> int:
    """What height and width must be multiples of, in pixels, as far as the pipeline tells it; 1 if it does not.

    The scale of its VAE, twice that where 2x2 latents are packed into one token before the transformer, as in FLUX.
    """
    scale = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None) or 1
    return int(scale) * (2 if _packs_latents(pipe) else 1)


def _packs_latents(pipe: Any) -> bool:
    model = getattr(getattr(pipe, "transformer", None), "config", None)
    vae = getattr(getattr(pipe, "vae", None), "config", None)
    latent_channels = getattr(vae, "latent_channels", None) or getattr(vae, "z_dim", None)
    if latent_channels is None or not hasattr(pipe, "_pack_latents"):
        return False
    return getattr(model, "in_channels", None) == 4 * latent_channels


def _require_asked_size(pipe: Any, request: Request, image: NDArray[np.float32]) -> None:
    """For pipelines that do not tell their multiple."""
    asked, drawn = (request.height_px, request.width_px), image.shape[-3:-1]
    if any(side is not None and side != got for side, got in zip(asked, drawn, strict=True)):
        raise ValueError(
            f"generate: height and width must be a size that {type(pipe).__name__} can draw, got {_size(asked)}: it "
            f"drew {_size(drawn)}, ask for that"
        )


def _size(sides: Sequence[int | None]) -> str:
    return "x".join("default" if side is None else str(side) for side in sides)
