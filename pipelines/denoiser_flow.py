"""Transformers of SD3 and FLUX.1, with rectified flow, as denoisers."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_attn.pipelines.denoiser import Denoiser, Text


class _FlowDenoiser(Denoiser):
    """What transformers with rectified flow have in common."""

    def noise(self, generator: Any) -> Tensor:
        """As the model takes it."""
        return self._latents(generator)[0]

    def forward(self, latents: Tensor, index: int) -> object:
        """Call the transformer."""
        timestep = self.timesteps[index].expand(latents.shape[0])
        given = self.option("joint_attention_kwargs")
        more = {"joint_attention_kwargs": None if given is None else dict(given)}  # the model takes things out of it
        return self.module(hidden_states=latents, timestep=self._timestep(timestep, latents), **self.condition, **more)

    @cached_property
    def condition(self) -> dict[str, Any]:
        """What the transformer is called with beside the latents, as the pipeline makes it of its prompts."""
        raise NotImplementedError

    def _timestep(self, timestep: Tensor, latents: Tensor) -> Tensor:
        return timestep

    def _latents(self, generator: Any, latents: Tensor | None = None) -> Any:
        """The pipeline's own, a tuple."""
        raise NotImplementedError

    def _default_size(self) -> tuple[int, int]:
        size: int = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return size, size

    def _encoded(self, **more: Any) -> Any:
        scale = (self.option("joint_attention_kwargs") or {}).get("scale")
        return self.pipe.encode_prompt(
            prompt=self.prompts, prompt_2=None, device=self.device, num_images_per_prompt=self.images,
            max_sequence_length=self.option("max_sequence_length"), lora_scale=scale, **more,
        )  # fmt: skip

    def _shift(self, tokens: int, largest: float) -> float:
        """The logarithm of the shift of timesteps for an image of so many tokens, both pipelines' line."""
        config = self.pipe.scheduler.config
        first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", largest)
        slope = (high - low) / (last - first)
        shift: float = tokens * slope + (low - slope * first)  # in this order: the same to the last bit
        return shift


class SD3Denoiser(_FlowDenoiser):
    """SD 3 and SD 3.5. Their text is CLIP's tokens, then T5's."""

    pipelines = ("StableDiffusion3Pipeline",)

    def texts(self) -> list[Text]:
        """CLIP's, and T5's where it was loaded; both CLIP encoders have the same tokens."""
        pipe = self.pipe
        clip = Text(pipe.tokenizer, 0, pipe.tokenizer_max_length)
        if pipe.text_encoder_3 is None:
            return [clip]
        return [clip, Text(pipe.tokenizer_3, pipe.tokenizer_max_length, self.option("max_sequence_length"))]

    @cached_property
    @torch.no_grad()
    def condition(self) -> dict[str, Any]:
        """Text and pooled text."""
        text, _, pooled, _ = self._encoded(
            prompt_3=None, do_classifier_free_guidance=False, clip_skip=self.option("clip_skip")
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def _latents(self, generator: Any, latents: Tensor | None = None) -> Any:
        dtype, channels = self.condition["encoder_hidden_states"].dtype, self.module.config.in_channels
        return (
            self.pipe.prepare_latents(
                self.samples, channels, self.height, self.width, dtype, self.device, generator, latents
            ),
        )

    def _set_timesteps(self) -> None:
        pipe, shift = self.pipe, self.option("mu")
        if shift is None and pipe.scheduler.config.get("use_dynamic_shifting"):
            patch = self.module.config.patch_size
            rows, columns = (size // pipe.vae_scale_factor // patch for size in (self.height, self.width))
            shift = self._shift(rows * columns, 1.16)
        shifted = {} if shift is None else {"mu": shift}
        pipe.scheduler.set_timesteps(self.steps, device=self.device, **shifted)


class FluxDenoiser(_FlowDenoiser):
    """FLUX.1. Its text is T5's tokens; latents are packed, a row of 2x2 of them per token."""

    pipelines = ("FluxPipeline",)

    def texts(self) -> list[Text]:
        """T5's; CLIP gives the pooled text alone."""
        return [Text(self.pipe.tokenizer_2, 0, self.option("max_sequence_length"))]

    @cached_property
    @torch.no_grad()
    def condition(self) -> dict[str, Any]:
        """Text and its ids, pooled text, the ids of pixels, and the guidance that FLUX.1-dev was distilled for."""
        text, pooled, text_ids = self._encoded()
        scale = None
        if self.module.config.guidance_embeds:
            scale = torch.full([1], self.option("guidance_scale"), device=self.device, dtype=torch.float32)
            scale = scale.expand(self.samples)
        condition = {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": text_ids}
        return condition | {"guidance": scale, "img_ids": self._prepared(text.dtype, None, text)[1]}

    def _timestep(self, timestep: Tensor, latents: Tensor) -> Tensor:
        return timestep.to(latents.dtype) / 1000

    def _latents(self, generator: Any, latents: Tensor | None = None) -> Any:
        return self._prepared(self.condition["encoder_hidden_states"].dtype, generator, latents)

    def _prepared(self, dtype: torch.dtype, generator: Any, latents: Tensor | None) -> Any:
        channels = self.module.config.in_channels // 4
        return self.pipe.prepare_latents(
            self.samples, channels, self.height, self.width, dtype, self.device, generator, latents
        )

    def _set_timesteps(self) -> None:
        scheduler, side = self.pipe.scheduler, 2 * self.pipe.vae_scale_factor
        shift = self._shift((self.height // side) * (self.width // side), 1.15)
        if scheduler.config.get("use_flow_sigmas"):
            scheduler.set_timesteps(self.steps, device=self.device, mu=shift)
        else:
            sigmas = np.linspace(1.0, 1 / self.steps, self.steps)
            scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=shift)
