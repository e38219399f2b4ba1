"""A-STAR as a callback of a stock pipeline, for those that `AStarPipeline` does not wrap and for calls of your own.

The method has a patent of its own, see `a_star`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.callbacks import PipelineCallback
from torch import Tensor

from vision_attn.pipelines.denoiser_unet import UNetDenoiser, require_latents_alone
from vision_attn.pipelines.denoisers import denoiser_class
from vision_attn.pipelines.moves import Moves, Settings, one_per_prompt

_TENSORS = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")


class AStarCallback(PipelineCallback):
    """Moves latents between the steps of a stock pipeline of SD 1, SD 2 or SDXL.

    A callback comes after a step; latents before the first one are moved by `initial_latents`. Without these, and with
    pipelines that begin with an image, moves begin before the second step. Text is what the pipeline itself made of its
    prompts. With a ControlNet or another input of the UNet that callbacks do not see the gradient would be that of
    another model: such pipelines are refused.

    Args:
        pipe: The pipeline: text-to-image, image-to-image, or inpainting with a UNet of the text-to-image kind.
        prompt: What the pipeline will be given, one or several; SDXL's second prompt must be the same.
        concepts: As of `AStarPipeline`.
        settings: See `Settings`: `loss`, `step_size`, `share`, ...

    Attributes:
        losses: Of the last run, as of `AStarPipeline`.
        maps: Of the last run, as of `AStarPipeline`; without `return_maps=True` of the last step that had a move.

    Raises:
        NotImplementedError: another pipeline; in a run, a scheduler that goes back to latents of its own.
        TypeError: an unknown setting.
        ValueError: concepts that are not one list per prompt; in a run, concepts that the prompt does not have.

    Example:
        ```
        callback = AStarCallback(pipe, prompt)
        pipe(prompt, latents=callback.initial_latents(), callback_on_step_end=callback)
        ```
    """

    def __init__(self, pipe: Any, prompt: str | Sequence[str], concepts: Any = None, **settings: Any) -> None:
        super().__init__()
        self._kind = denoiser_class("AStarCallback", pipe, (UNetDenoiser, _ImageDenoiser))
        self._pipe, self._settings = pipe, Settings(**settings)
        self._prompts, self._concepts = one_per_prompt("AStarCallback", prompt, concepts)
        self._moves: Moves | None = None
        self._has_begun = False

    @property
    def tensor_inputs(self) -> list[str]:
        """What the pipeline is asked for."""
        return [name for name in _TENSORS if name in self._pipe._callback_tensor_inputs]

    @property
    def losses(self) -> list[list[float]]:
        """Per step so far, the loss of each image."""
        return [] if self._moves is None else self._moves.losses

    @property
    def maps(self) -> list[dict[str, Tensor]]:
        """Per image, the map of each concept."""
        return [] if self._moves is None else self._moves.maps

    def initial_latents(
        self,
        generator: Any = None,
        *,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Tensor:
        """Noise for the pipeline's `latents`, moved for its first step.

        Args:
            generator: As of the pipeline; give the same one to the pipeline afterwards.
            latents: Noise to begin with; None draws it.
            height: Pixels.
            width: Pixels.
            num_inference_steps: As the pipeline will be given it.
            num_images_per_prompt: As the pipeline will be given it.
            options: Further arguments of the pipeline that say what its text is, such as `clip_skip`.

        Raises:
            NotImplementedError: a pipeline that begins with an image.
        """
        if self._kind is _ImageDenoiser:
            raise NotImplementedError(
                f"initial_latents: pipe must begin with noise, got {type(self._pipe).__name__}: leave latents out, "
                "moves begin before its second step"
            )
        denoiser = self._kind(
            self._pipe, self._prompts, images=num_images_per_prompt, height=height, width=width,
            steps=num_inference_steps, options=options,
        )  # fmt: skip
        self._moves = Moves("AStarCallback", denoiser, self._concepts, self._settings)
        self._has_begun = True
        noise = denoiser.noise(generator) if latents is None else latents
        return self._moves.begin(noise.to(denoiser.device))

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by the pipeline after a step; `timesteps` is the step's timestep."""
        if pipeline is not self._pipe:
            raise ValueError(
                f"AStarCallback: pipe must be the pipeline that calls back, got {type(self._pipe).__name__} and now "
                f"another {type(pipeline).__name__}: make a callback for each"
            )
        latents = callback_kwargs["latents"]
        if step_index == 0:
            self._begin(latents.shape[0], timesteps)
        assert self._moves is not None
        self._moves.denoiser.take(callback_kwargs)
        return {**callback_kwargs, "latents": self._moves.before(step_index + 1, latents)}

    def _begin(self, samples: int, timestep: Any) -> None:
        """Begin a run, unless `initial_latents` did."""
        schedule = self._pipe.scheduler.timesteps
        first = schedule.tolist().index(float(timestep))
        timesteps = schedule[first : first + self._pipe.num_timesteps]
        if self._has_begun:
            assert self._moves is not None
            self._has_begun = False
            prepared = self._moves.denoiser.timesteps
            if len(prepared) != len(timesteps):
                raise ValueError(
                    f"AStarCallback: num_inference_steps must be the {len(prepared)} of initial_latents, got "
                    f"{len(timesteps)}: give both the same"
                )
            return
        images, rest = divmod(samples, len(self._prompts))
        if rest:
            raise ValueError(
                f"AStarCallback: prompt must be the pipeline's, got {len(self._prompts)} prompts for {samples} images"
            )
        denoiser = self._kind(self._pipe, self._prompts, images=images, steps=len(timesteps))
        denoiser.timesteps = timesteps
        self._moves = Moves("AStarCallback", denoiser, self._concepts, self._settings)


class _ImageDenoiser(UNetDenoiser):
    """A UNet of latents and text in pipelines that begin with an image."""

    pipelines = (
        "StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline",
    )  # fmt: skip

    @classmethod
    def check(cls, where: str, pipe: Any) -> None:
        """Refuse UNets that see mask and image besides."""
        super().check(where, pipe)
        require_latents_alone(where, pipe)
