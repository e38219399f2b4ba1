"""Structured Diffusion Guidance around a stock Stable Diffusion pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from vision_attn.guidance.contexts import text_context
from vision_attn.guidance.structured import require_mixture, require_unet, structured_embeddings
from vision_attn.pipelines.guided import GuidedPipeline, require_arguments, text_options


class StructuredDiffusionPipeline(GuidedPipeline):
    """A stock pipeline of SD 1, SD 2 or SDXL whose cross-attention reads phrases encoded alone.

    It shares the stock pipeline's parts and runs its code; everything that is not named here is the stock pipeline's.

    Args:
        pipe: The stock pipeline; text-to-image, image-to-image, inpainting or with a ControlNet, whose own
            cross-attention stays as it is.
        phrases: Of calls that name none, as of `structured_embeddings`: None or a function.
        mode: Of calls that name none, as of `structured_embeddings`.
        strength: Of calls that name none, as of `structured_embeddings`.

    Raises:
        NotImplementedError: a pipeline without a UNet.
        ValueError, TypeError: an unknown mode, a strength out of range.

    Source: arXiv 2212.05032.
    """

    def __init__(self, pipe: Any, *, phrases: Any = None, mode: str = "paper", strength: float = 1.0) -> None:
        require_unet("StructuredDiffusionPipeline", pipe)
        require_mixture("StructuredDiffusionPipeline", mode, strength)
        super().__init__(pipe)
        self.__dict__["defaults"] = {"phrases": phrases, "mode": mode, "strength": strength}

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        phrases: Any = None,
        mode: str | None = None,
        strength: float | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Any:
        """Draw as the stock pipeline does.

        Args:
            prompt: One or several.
            phrases: As of `structured_embeddings`; for several prompts a function, or one list per prompt; None for
                those of this pipeline.
            mode: As of `structured_embeddings`; None for that of this pipeline.
            strength: As of `structured_embeddings`, 0 draws what the stock pipeline draws; None for that of this
                pipeline.
            num_images_per_prompt: As of the stock pipeline.
            options: Further arguments of the stock pipeline.

        Returns:
            The stock pipeline's output.

        Raises:
            TypeError: an unknown argument; text that is given as embeddings or as a second prompt, whose phrases cannot
                be found.
            ValueError: lists of phrases that are not one per prompt; as `structured_embeddings`.
        """
        require_arguments("StructuredDiffusionPipeline", self.pipe, options)
        context = self.text_context(
            prompt, phrases=phrases, mode=mode, strength=strength, num_images_per_prompt=num_images_per_prompt,
            **options,
        )  # fmt: skip
        with context:
            return self.pipe(prompt, num_images_per_prompt=num_images_per_prompt, **options)

    @contextlib.contextmanager
    def text_context(
        self,
        prompts: str | Sequence[str],
        *,
        phrases: Any = None,
        mode: str | None = None,
        strength: float | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Iterator[None]:
        """What a call does around the stock pipeline's: inside, the UNet reads the phrases.

        Other pipelines with the same UNet may be called inside, for the same prompts and as many images.

        Args:
            prompts: One or several.
            phrases: As of the call.
            mode: As of the call.
            strength: As of the call; 0 leaves the UNet as it is.
            num_images_per_prompt: As of the call.
            options: The call's, of which `clip_skip` and `cross_attention_kwargs["scale"]` change how text is encoded.

        Raises:
            As the call.
        """
        for name in ("prompt_embeds", "prompt_2"):
            if options.get(name) is not None:
                raise TypeError(f"StructuredDiffusionPipeline: {name} must be left out, phrases are found in prompt")
        given = {"phrases": phrases, "mode": mode, "strength": strength}
        wanted = {name: self.defaults[name] if value is None else value for name, value in given.items()}
        every = [prompts] if isinstance(prompts, str) else list(prompts)
        each = _one_per_prompt(every, wanted["phrases"], isinstance(prompts, str))
        texts = [
            structured_embeddings(self.pipe, prompt, own, wanted["mode"], wanted["strength"], **text_options(options))
            for prompt, own in zip(every, each, strict=True)
        ]
        images = [text for text in texts for _ in range(num_images_per_prompt)]
        mixed = any(text.value_embeds is not text.key_embeds for text in texts)
        with text_context(self.pipe.unet, images) if mixed else contextlib.nullcontext():
            yield


def _one_per_prompt(prompts: Sequence[str], phrases: Any, single: bool) -> list[Any]:
    if phrases is None or callable(phrases) or single:
        return [phrases] * len(prompts)
    if isinstance(phrases, str) or len(phrases) != len(prompts):
        raise ValueError(
            f"StructuredDiffusionPipeline: phrases must be one list per prompt, {len(prompts)}, got {phrases!r}"
        )
    return list(phrases)
