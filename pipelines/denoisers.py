"""The denoisers of stock pipelines, called as the pipelines' own loops call them, for the prompts' rows alone.

What differs from one model family to another stands here: how text becomes conditions, where the tokens of a phrase
are, what latents look like and how they go into the model. Guidance that takes gradients needs no more of a family.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vision_attn.guidance.phrases import concept_phrases, find_phrases
from vision_attn.guidance.structured import require_plain_prompt
from vision_attn.guidance.tokens import read_until, readable, token_groups, word_positions
from vision_attn.patching.diffusers import call_module
from vision_attn.pipelines.guided import text_options


class Text(NamedTuple):
    """What one text encoder gives to the model's text.

    Attributes:
        tokenizer: Its tokenizer.
        first: Position of its first token in the model's text.
        length: Tokens that it reads, special ones counted; None for the tokenizer's own.
    """

    tokenizer: Any
    first: int = 0
    length: int | None = None


class Denoiser:
    """One call of a stock pipeline, as its denoiser sees it.

    Args:
        pipe: The stock pipeline.
        prompts: The texts.
        images: Samples per text.
        height: Pixels; None for the pipeline's own.
        width: Pixels; None for the pipeline's own.
        steps: Denoising steps; None for the pipeline's own.
        options: Further arguments of the pipeline's call.

    Attributes:
        pipelines: Names of the classes of pipelines that are served.
        model_name: Of the pipeline's part that denoises.
    """

    pipelines: tuple[str, ...]
    model_name = "transformer"

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        images: int = 1,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe, self.prompts, self.images = pipe, list(prompts), images
        self.options: Mapping[str, Any] = options or {}
        self.steps: int = self.option("num_inference_steps") if steps is None else steps
        if height is None or width is None:
            rows, columns = self._default_size()
            height, width = height or rows, width or columns
        self.height, self.width = height, width

    @classmethod
    def check(cls, where: str, pipe: Any) -> None:
        """Refuse what a pipeline of this family may not be.

        Raises:
            NotImplementedError: a model that keeps results from one call for the next.
        """
        if getattr(cls.model_of(pipe), "is_cache_enabled", False):
            raise NotImplementedError(
                f"{where}: pipe must compute every step, got a {cls.model_name} with a cache, whose results would be "
                f"of other latents: call pipe.{cls.model_name}.disable_cache()"
            )

    @classmethod
    def model_of(cls, pipe: Any) -> Any:
        """The denoising model; of a compiled one the module inside, whose layers can be watched."""
        return call_module(getattr(pipe, cls.model_name))

    @property
    def module(self) -> Any:
        """The model."""
        return self.model_of(self.pipe)

    @property
    def samples(self) -> int:
        """Rows of latents: the images of the first prompt, then those of the next."""
        return len(self.prompts) * self.images

    def option(self, name: str) -> Any:
        """An argument of the pipeline's call, or its default."""
        default = inspect.signature(type(self.pipe).__call__).parameters[name].default
        return self.options.get(name, default)

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
        """What the pipeline multiplies its noise by before the first step."""
        return 1.0

    def noise(self, generator: Any) -> Tensor:
        """The noise that the pipeline begins with, as it draws it.

        Args:
            generator: As of the pipeline's call.
        """
        raise NotImplementedError

    def latent_scale(self, index: int) -> float:
        """How many times larger the latents before a step are than what the model sees of them.

        Args:
            index: Of the step.
        """
        return 1.0

    def forward(self, latents: Tensor, index: int) -> object:
        """Call the model on the latents before a step.

        Args:
            latents: As the pipeline holds them, `samples` rows.
            index: Of the step.
        """
        raise NotImplementedError

    def texts(self) -> list[Text]:
        """The text encoders whose tokens the model's text has, in their order."""
        raise NotImplementedError

    def words(self) -> list[list[int]] | None:
        """Per sample, positions of all words in the model's text; they compete. None: all tokens but first and last."""
        return [
            [
                text.first + place
                for text in self.texts()
                for place in word_positions(text.tokenizer, prompt, length=text.length)
            ]
            for prompt in self.prompts
            for _ in range(self.images)
        ]

    def concepts(self, where: str, prompt: str, given: Any) -> dict[str, list[int]]:
        """Positions of each concept's tokens in the model's text: of those that each encoder reads.

        Args:
            where: Who asks, for messages.
            prompt: One of the texts.
            given: Texts, offsets or `Phrase`s of it, or lists of positions; None for its noun phrases.

        Returns:
            By the concept's text, of which a second one is `"circle (2)"`; `"tokens 2, 3"` for given positions.

        Raises:
            ValueError: concepts that the prompt does not have, or a prompt without any.
            NotImplementedError: a prompt that the pipeline changes before it encodes it.
        """
        texts = self.texts()
        for text in texts:
            require_plain_prompt(where, self.pipe, prompt, text.tokenizer)
        positions = isinstance(given, (list, tuple)) and all(isinstance(each, (list, range)) for each in given)
        if given and positions:
            return _named([f"tokens {', '.join(map(str, each))}" for each in given], [list(each) for each in given])
        ends = [read_until(text.tokenizer, prompt, text.length) for text in texts]
        widest = texts[ends.index(max(ends))]
        phrases = concept_phrases(prompt) if given is None else find_phrases(prompt, given)
        if given is None:
            phrases = readable(widest.tokenizer, prompt, phrases, widest.length)
        groups: list[list[int]] = [[] for _ in phrases]
        for text, end in zip(texts, ends, strict=True):
            for phrase, group in zip(phrases, groups, strict=True):
                if text is widest or phrase.end <= end:
                    (places,) = token_groups(text.tokenizer, prompt, [phrase], length=text.length)
                    group += [text.first + place for place in places]
        if not groups:
            got = "in which no noun phrase was found" if given is None else f"got {given!r}"
            raise ValueError(f"{where}: concepts must be named for {prompt!r}, {got}")
        return _named([phrase.text for phrase in phrases], groups)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with what a running pipeline made of its prompts, as its callbacks see it."""
        raise NotImplementedError

    def _default_size(self) -> tuple[int, int]:
        """Rows and columns in pixels."""
        raise NotImplementedError

    def _set_timesteps(self) -> None:
        self.pipe.scheduler.set_timesteps(self.steps, device=self.device)


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


def _named(texts: Sequence[str], groups: Sequence[list[int]]) -> dict[str, list[int]]:
    counts = [texts[:number].count(text) for number, text in enumerate(texts)]
    names = [f"{text} ({count + 1})" if count else text for text, count in zip(texts, counts, strict=True)]
    return dict(zip(names, groups, strict=True))


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
