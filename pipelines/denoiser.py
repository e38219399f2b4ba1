"""A stock pipeline's denoiser, called as the pipeline's own loop calls it, for the prompts' rows alone.

What differs from one model family to another is left open: how text becomes conditions, where the tokens of a phrase
are, what latents look like and how they go into the model. Guidance that takes gradients needs no more of a family.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_attn.guidance.phrases import concept_phrases, find_phrases
from vision_attn.guidance.structured import require_plain_prompt
from vision_attn.guidance.tokens import read_until, readable, token_groups, word_positions
from vision_attn.patching.diffusers import call_module


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


def _named(texts: Sequence[str], groups: Sequence[list[int]]) -> dict[str, list[int]]:
    counts = [texts[:number].count(text) for number, text in enumerate(texts)]
    names = [f"{text} ({count + 1})" if count else text for text, count in zip(texts, counts, strict=True)]
    return dict(zip(names, groups, strict=True))
