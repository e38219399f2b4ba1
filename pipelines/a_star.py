"""A-STAR and its siblings around a stock Stable Diffusion pipeline: latents that make attention tell concepts apart.

Methods have licences and patents of their own: A-STAR is the subject of US 12,633,000 B2. Whether to use it is the
user's decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vision_attn.guidance.latents import LatentGuide, MapLoss, step_sizes
from vision_attn.guidance.phrases import concept_phrases
from vision_attn.guidance.structured import require_plain_prompt, require_unet
from vision_attn.guidance.tokens import readable, token_groups
from vision_attn.pipelines.guided import GuidedPipeline, text_options

_SERVED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_REFUSED = (
    "prompt_embeds", "prompt_2", "timesteps", "sigmas", "ip_adapter_image", "ip_adapter_image_embeds", "denoising_end",
)  # fmt: skip
_FORGETFUL = ("PNDMScheduler",)


class AStarPipeline(GuidedPipeline):
    """A stock pipeline of SD 1, SD 2 or SDXL that keeps the concepts of a prompt apart while it draws.

    Before a denoising step the latents move down the gradient of a loss of the cross-attention maps: concepts should
    not overlap, and should stay where they were. It costs one more forward and its backward pass, up to the last layer
    whose maps are needed: half of SD 1.5's work, three quarters of SDXL's.

    Args:
        pipe: The stock pipeline, text-to-image.

    Raises:
        NotImplementedError: another pipeline, or one of a model distilled to a few steps.

    Source: arXiv 2306.14544; the losses of Attend-and-Excite (arXiv 2301.13826) and of your own as well.
    """

    def __init__(self, pipe: Any) -> None:
        require_unet("AStarPipeline", pipe)
        if not any(cls.__name__ in _SERVED for cls in type(pipe).__mro__):
            raise NotImplementedError(
                f"AStarPipeline: pipe must be a text-to-image pipeline, {' or '.join(_SERVED)}, got "
                f"{type(pipe).__name__}: its denoiser sees more than the latents and the text"
            )
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise NotImplementedError(
                f"AStarPipeline: pipe must not take its guidance scale as a condition, got {type(pipe.unet).__name__} "
                "with time_cond_proj_dim: models distilled to a few steps leave too few to move latents"
            )
        super().__init__(pipe)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        concepts: Any = None,
        loss: str | MapLoss = "a-star",
        step_size: float = 20.0,
        share: float = 0.5,
        threshold: float = 0.5,
        mode: str = "relative",
        resolution: tuple[int, int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> Any:
        """Draw as the stock pipeline does.

        Args:
            prompt: One or several.
            concepts: Texts, offsets or `Phrase`s of the prompt, or lists of token positions; None for its noun phrases
                without their determiners. For several prompts one list per prompt.
            loss: `"a-star"`, `"attend-and-excite"`, or a function of the maps `[n, Y, X]` of a sample and the masks of
                the step before (None in the first).
            step_size: Factor on the gradient in the first step, see `step_sizes`; 0 draws what the stock pipeline
                draws.
            share: Share of the steps before which latents move; 1 is the paper's.
            threshold: Of the masks, see `binarize`.
            mode: Of the masks, see `binarize`.
            resolution: Of the maps; None for a quarter of the latents'.
            height: Pixels.
            width: Pixels.
            num_inference_steps: Denoising steps.
            num_images_per_prompt: Images of each prompt.
            generator: As of the stock pipeline.
            latents: Noise to begin with, as of the stock pipeline.
            callback_on_step_end: As of the stock pipeline; it sees the moved latents.
            callback_on_step_end_tensor_inputs: As of the stock pipeline.
            options: Further arguments of the stock pipeline.

        Returns:
            The stock pipeline's output; its attribute `losses` lists, per step, the loss of each image.

        Raises:
            TypeError: text that is given as embeddings or as a second prompt, timesteps of your own, an IP-Adapter.
            NotImplementedError: a scheduler that goes back to latents of its own (PNDM, Heun, KDPM2).
            ValueError: concepts that the prompt does not have, or a prompt without any.
        """
        for name in _REFUSED:
            if options.get(name) is not None:
                raise TypeError(f"AStarPipeline: {name} must be left out")
        _check_scheduler(self.pipe.scheduler)
        pipe, prompts = self.pipe, [prompt] if isinstance(prompt, str) else list(prompt)
        groups = [
            _groups(pipe, text, own)
            for text, own in zip(prompts, _one_per_prompt(prompts, concepts, isinstance(prompt, str)), strict=True)
            for _ in range(num_images_per_prompt)
        ]
        guide = LatentGuide(pipe.unet, groups, loss=loss, threshold=threshold, mode=mode, resolution=resolution)
        if height is None or width is None:
            rows, columns = _pair(pipe.unet.config.sample_size)
            height, width = height or rows * pipe.vae_scale_factor, width or columns * pipe.vae_scale_factor
        device = pipe._execution_device
        condition = _condition(pipe, prompts, num_images_per_prompt, height, width, options)
        pipe.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = pipe.scheduler.timesteps
        sizes = step_sizes(len(timesteps), step_size, share)

        def forward(z: Tensor, index: int) -> object:
            scaled = pipe.scheduler.scale_model_input(z, timesteps[index])
            return pipe.unet(scaled, timesteps[index], **condition)

        def move(moving: Tensor, index: int) -> Tensor:
            return guide.move(moving, sizes[index], partial(forward, index=index)) if sizes[index] else moving

        def after_step(stock: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if index + 1 < len(timesteps):
                tensors["latents"] = move(tensors["latents"], index + 1)
            if callback_on_step_end is None:
                return tensors
            return {**tensors, **callback_on_step_end(stock, index, timestep, tensors)}

        wanted = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if latents is None:
            sides = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
            shape = (len(groups), pipe.unet.config.in_channels, *sides)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=pipe.unet.dtype)
        latents = latents.to(device)
        sigma = pipe.scheduler.init_noise_sigma
        noisy = latents * sigma
        begun = latents + (move(noisy, 0) - noisy) / sigma  # the pipeline multiplies by sigma: zero moves change no bit
        output = pipe(
            prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=begun,
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=list(dict.fromkeys(["latents", *wanted])),
            **options,
        )
        if not isinstance(output, tuple):
            output.losses = guide.losses
        return output


def _one_per_prompt(prompts: Sequence[str], concepts: Any, single: bool) -> list[Any]:
    if concepts is None or single:
        return [concepts] * len(prompts)
    if isinstance(concepts, str) or len(concepts) != len(prompts):
        raise ValueError(f"AStarPipeline: concepts must be one list per prompt, {len(prompts)}, got {concepts!r}")
    return list(concepts)


def _groups(pipe: Any, prompt: str, concepts: Any) -> list[list[int]]:
    """Token positions of each concept."""
    require_plain_prompt("AStarPipeline", pipe, prompt)
    if isinstance(concepts, (list, tuple)) and concepts and all(isinstance(each, (list, range)) for each in concepts):
        return [list(each) for each in concepts]
    found = readable(pipe.tokenizer, prompt, concept_phrases(prompt)) if concepts is None else concepts
    groups = token_groups(pipe.tokenizer, prompt, found)
    if not groups:
        given = "in which no noun phrase was found" if concepts is None else f"got {concepts!r}"
        raise ValueError(f"AStarPipeline: concepts must be named for {prompt!r}, {given}")
    return groups


def _check_scheduler(scheduler: Any) -> None:
    """Refuse schedulers whose second evaluations go back to a sample that they kept: moves would be lost."""
    name = type(scheduler).__name__
    if name in _FORGETFUL or getattr(scheduler, "order", 1) > 1:
        raise NotImplementedError(
            f"AStarPipeline: scheduler must go on from the latents it is given, got {name}, which goes back to its "
            "own: use pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config), or Euler or DPM++ 2M"
        )


@torch.no_grad()
def _condition(pipe: Any, prompts: Sequence[str], images: int, height: int, width: int, options: Any) -> dict[str, Any]:
    """What the UNet is called with for the images' own text, as the pipeline itself makes it."""
    encoded = pipe.encode_prompt(
        prompt=list(prompts), device=pipe._execution_device, num_images_per_prompt=images,
        do_classifier_free_guidance=False, **text_options(options),
    )  # fmt: skip
    condition: dict[str, Any] = {"encoder_hidden_states": encoded[0]}
    if options.get("cross_attention_kwargs") is not None:
        condition["cross_attention_kwargs"] = options["cross_attention_kwargs"]
    if getattr(pipe, "text_encoder_2", None) is None:
        return condition
    pooled = encoded[2]
    time_ids = pipe._get_add_time_ids(
        options.get("original_size") or (height, width),
        options.get("crops_coords_top_left") or (0, 0),
        options.get("target_size") or (height, width),
        dtype=encoded[0].dtype,
        text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
    )
    time_ids = time_ids.to(pooled.device).repeat(pooled.shape[0], 1)
    return condition | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
