"""UNets of SD 1, SD 2 and SDXL as denoisers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vision_attn.pipelines.denoiser import Denoiser, Text
from vision_attn.pipelines.guided import text_options


class UNetDenoiser(Denoiser):
    """SD 1, SD 2 and SDXL."""

    pipelines: tuple[str, ...] = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

    model_name = "unet"

    @classmethod
    def check(cls, where: str, pipe: Any) -> None:
        """Refuse models that take their guidance scale as a condition, too."""
        super().check(where, pipe)
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise NotImplementedError(
                f"{where}: pipe must not take its guidance scale as a condition, got {type(pipe.unet).__name__} "
                "with time_cond_proj_dim: models distilled to a few steps leave too few to move latents"
            )

    @property
    def noise_scale(self) -> Any:
        """The scheduler's, which some know only once they have timesteps."""
        assert len(self.timesteps)
        return self.pipe.scheduler.init_noise_sigma

    def texts(self) -> list[Text]:
        """CLIP's; both encoders of SDXL have the same tokens."""
        tokenizer = self.pipe.tokenizer
        return [Text(self.pipe.tokenizer_2 if tokenizer is None else tokenizer)]  # SDXL's refiner has the second alone

    def words(self) -> list[list[int]] | None:
        """All but BOS and the last compete, as Attend-and-Excite has it."""
        return None

    def noise(self, generator: Any) -> Tensor:
        """`[B, C, Y, X]`."""
        unet, factor = self.pipe.unet, self.pipe.vae_scale_factor
        shape = (self.samples, unet.config.in_channels, self.height // factor, self.width // factor)
        return randn_tensor(shape, generator=generator, device=self.device, dtype=unet.dtype)

    def latent_scale(self, index: int) -> float:
        """`sqrt(sigma^2 + 1)` for Euler and its kin, 1 for others."""
        return 1 / float(self.pipe.scheduler.scale_model_input(torch.ones(()), self.timesteps[index]))

    def forward(self, latents: Tensor, index: int) -> object:
        """Call the UNet."""
        timestep = self.timesteps[index]
        scaled = self.pipe.scheduler.scale_model_input(latents, timestep)
        return self.module(scaled, timestep, **self.condition)

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

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The last rows: those before them are without the prompts."""
        text, *added = (
            tensors[name][-self.samples :]
            for name in ("prompt_embeds", "add_text_embeds", "add_time_ids")
            if name in tensors
        )
        condition: dict[str, Any] = {"encoder_hidden_states": text}
        condition["cross_attention_kwargs"] = self.pipe.cross_attention_kwargs
        if added:
            condition["added_cond_kwargs"] = dict(zip(("text_embeds", "time_ids"), added, strict=True))
        self.condition = condition

    def _default_size(self) -> tuple[int, int]:
        size, factor = self.pipe.unet.config.sample_size, self.pipe.vae_scale_factor
        rows, columns = (size, size) if isinstance(size, int) else size
        return rows * factor, columns * factor


def require_latents_alone(where: str, pipe: Any) -> None:
    """Refuse UNets that see a mask and an image besides, as those made for inpainting do.

    Raises:
        NotImplementedError: such a UNet.
    """
    channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != latents:
        raise NotImplementedError(
            f"{where}: pipe must have a UNet of latents alone, {latents} channels, got {channels}: the others are not "
            "known here"
        )
