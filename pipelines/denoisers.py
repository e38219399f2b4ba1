"""The denoisers of stock pipelines, called as the pipelines' own loops call them, for the prompts' rows alone.

What differs from one model family to another stands here: how text becomes conditions, where the tokens of a phrase
are, what latents look like and how they go into the model. Guidance that takes gradients needs no more of a family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from vision_attn.guidance.phrases import concept_phrases
from vision_attn.guidance.structured import require_plain_prompt, require_unet
from vision_attn.guidance.tokens import readable, token_groups
from vision_attn.pipelines.guided import text_options


class Denoiser:
    """One call of a stock pipeline, as its denoiser sees it.

    Args:
        pipe: The stock pipeline.
        prompts: The texts.
        images: Samples per text.
        height: Pixels; None for the pipeline's own.
        width: Pixels; None for the pipeline's own.
        steps: Denoising steps.
        options: Further arguments of the pipeline's call.

    Attributes:
        module: The model.
        samples: Rows of latents: the images of the first prompt, then those of the next.
        timesteps: Of each step, as the scheduler has them.
        noise_scale: What the pipeline multiplies the noise by before its first step.
    """

    module: nn.Module
    pipelines: tuple[str, ...]

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        images: int = 1,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe, self.prompts, self.images, self.steps = pipe, list(prompts), images, steps
        self.options: Mapping[str, Any] = options or {}
        if height is None or width is None:
            rows, columns = self._default_size()
            height, width = height or rows, width or columns
        self.height, self.width = height, width

    @property
    def samples(self) -> int:
        """Rows of latents."""
        return len(self.prompts) * self.images

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        device: torch.device = self.pipe._execution_device
        return device

    @cached_property
    def timesteps(self) -> Tensor:
        """Timestep of each step; the scheduler is set to them."""
        self._set_timesteps()
        timesteps: Tensor = self.pipe.scheduler.timesteps
        return timesteps

    @property
    def noise_scale(self) -> Any:
        """Factor of the pipeline on its noise, known once the scheduler is set."""
        return 1.0

    def noise(self, generator: Any) -> Tensor:
        """The noise that the pipeline begins with, as it draws it.

        Args:
            generator: As of the pipeline's call.
        """
        raise NotImplementedError

    def forward(self, latents: Tensor, index: int) -> object:
        """Call the model on the latents before a step.

        Args:
            latents: As the pipeline holds them, `samples` rows.
            index: Of the step.
        """
        raise NotImplementedError

    def groups(self, where: str, prompt: str, concepts: Any) -> list[list[int]]:
        """Token positions of each concept in the model's text.

        Args:
            where: Who asks, for messages.
            prompt: One of the texts.
            concepts: Texts, offsets or `Phrase`s of it, or lists of positions; None for its noun phrases.

        Raises:
            ValueError: concepts that the prompt does not have, or a prompt without any.
            NotImplementedError: a prompt that the pipeline changes before it encodes it.
        """
        require_plain_prompt(where, self.pipe, prompt)
        positions = isinstance(concepts, (list, tuple)) and all(isinstance(each, (list, range)) for each in concepts)
        if concepts and positions:
            return [list(each) for each in concepts]
        groups = self._groups(prompt, concepts)
        if not groups:
            given = "in which no noun phrase was found" if concepts is None else f"got {concepts!r}"
            raise ValueError(f"{where}: concepts must be named for {prompt!r}, {given}")
        return groups

    def _groups(self, prompt: str, concepts: Any) -> list[list[int]]:
        tokenizer = self.pipe.tokenizer
        found = readable(tokenizer, prompt, concept_phrases(prompt)) if concepts is None else concepts
        return token_groups(tokenizer, prompt, found)

    def _default_size(self) -> tuple[int, int]:
        """Rows and columns in pixels."""
        raise NotImplementedError

    def _set_timesteps(self) -> None:
        self.pipe.scheduler.set_timesteps(self.steps, device=self.device)


class UNetDenoiser(Denoiser):
    """SD 1, SD 2 and SDXL."""

    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The UNet."""
        unet: nn.Module = self.pipe.unet
        return unet

    @property
    def noise_scale(self) -> Any:
        """The scheduler's."""
        assert self.timesteps is not None  # some schedulers know their largest sigma only then
        return self.pipe.scheduler.init_noise_sigma

    def noise(self, generator: Any) -> Tensor:
        """`[B, C, Y, X]`."""
        unet, factor = self.pipe.unet, self.pipe.vae_scale_factor
        shape = (self.samples, unet.config.in_channels, self.height // factor, self.width // factor)
        return randn_tensor(shape, generator=generator, device=self.device, dtype=unet.dtype)

    def forward(self, latents: Tensor, index: int) -> object:
        """Call the UNet."""
        timestep = self.timesteps[index]
        scaled = self.pipe.scheduler.scale_model_input(latents, timestep)
        return self.pipe.unet(scaled, timestep, **self.condition)

    @cached_property
    @torch.no_grad()
    def condition(self) -> dict[str, Any]:
        """What the UNet is called with beside the latents, as the pipeline makes it of its prompts."""
        pipe, options = self.pipe, self.options
        encoded = pipe.encode_prompt(
            prompt=self.prompts, device=self.device, num_images_per_prompt=self.images,
            do_classifier_free_guidance=False, **text_options(options),
        )  # fmt: skip
        condition: dict[str, Any] = {"encoder_hidden_states": encoded[0]}
        if options.get("cross_attention_kwargs") is not None:
            condition["cross_attention_kwargs"] = options["cross_attention_kwargs"]
        if getattr(pipe, "text_encoder_2", None) is None:
            return condition
        pooled = encoded[2]
        time_ids = pipe._get_add_time_ids(
            options.get("original_size") or (self.height, self.width),
            options.get("crops_coords_top_left") or (0, 0),
            options.get("target_size") or (self.height, self.width),
            dtype=encoded[0].dtype,
            text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
        )
        time_ids = time_ids.to(pooled.device).repeat(pooled.shape[0], 1)
        return condition | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}

    def _default_size(self) -> tuple[int, int]:
        size, factor = self.pipe.unet.config.sample_size, self.pipe.vae_scale_factor
        rows, columns = (size, size) if isinstance(size, int) else size
        return rows * factor, columns * factor


def denoiser_class(where: str, pipe: Any) -> type[Denoiser]:
    """The class that serves a stock pipeline.

    Args:
        where: Who asks, for messages.
        pipe: The pipeline.

    Raises:
        NotImplementedError: another pipeline, or one of a model distilled to a few steps.
    """
    require_unet(where, pipe)
    names = [cls.__name__ for cls in type(pipe).__mro__]
    if not any(name in UNetDenoiser.pipelines for name in names):
        raise NotImplementedError(
            f"{where}: pipe must be a text-to-image pipeline, {' or '.join(UNetDenoiser.pipelines)}, got "
            f"{type(pipe).__name__}: its denoiser sees more than the latents and the text"
        )
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise NotImplementedError(
            f"{where}: pipe must not take its guidance scale as a condition, got {type(pipe.unet).__name__} "
            "with time_cond_proj_dim: models distilled to a few steps leave too few to move latents"
        )
    return UNetDenoiser
