"""Structured Diffusion Guidance around a stock Stable Diffusion pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vision_attn.guidance.structured import require_unet, structured_embeddings, value_context
from vision_attn.pipelines.guided import GuidedPipeline, text_options


class StructuredDiffusionPipeline(GuidedPipeline):
    """A stock pipeline of SD 1, SD 2 or SDXL whose cross-attention takes values from phrases encoded alone.

    It shares the stock pipeline's parts and runs its code; everything that is not named here is the stock pipeline's.

    Args:
        pipe: The stock pipeline; text-to-image, image-to-image, inpainting or with a ControlNet, whose own
            cross-attention stays as it is.

    Raises:
        NotImplementedError: a pipeline without a UNet.

    Source: arXiv 2212.05032.
    """

    def __init__(self, pipe: Any) -> None:
        require_unet("StructuredDiffusionPipeline", pipe)
        super().__init__(pipe)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        phrases: Any = None,
        mode: str = "paper",
        strength: float = 1.0,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Any:
        """Draw as the stock pipeline does.

        Args:
            prompt: One or several.
            phrases: As of `structured_embeddings`; for several prompts None, a function, or one list per prompt.
            mode: As of `structured_embeddings`.
            strength: As of `structured_embeddings`; 0 draws what the stock pipeline draws.
            num_images_per_prompt: As of the stock pipeline.
            options: Further arguments of the stock pipeline.

        Returns:
            The stock pipeline's output.

        Raises:
            TypeError: text that is given as embeddings or as a second prompt, whose phrases cannot be found.
            ValueError: lists of phrases that are not one per prompt; as `structured_embeddings`.
        """
        for name in ("prompt_embeds", "prompt_2"):
            if options.get(name) is not None:
                raise TypeError(f"StructuredDiffusionPipeline: {name} must be left out, phrases are found in prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        each = _one_per_prompt(prompts, phrases, isinstance(prompt, str))
        values = [
            structured_embeddings(self.pipe, text, own, mode, strength, **text_options(options)).value_embeds
            for text, own in zip(prompts, each, strict=True)
        ]
        rows = torch.cat(values).repeat_interleave(num_images_per_prompt, 0)
        with value_context(self.pipe.unet, rows):
            return self.pipe(prompt, num_images_per_prompt=num_images_per_prompt, **options)


def _one_per_prompt(prompts: Sequence[str], phrases: Any, single: bool) -> list[Any]:
    if phrases is None or callable(phrases) or single:
        return [phrases] * len(prompts)
    if isinstance(phrases, str) or len(phrases) != len(prompts):
        raise ValueError(
            f"StructuredDiffusionPipeline: phrases must be one list per prompt, {len(prompts)}, got {phrases!r}"
        )
    return list(phrases)
