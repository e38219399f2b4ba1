"""Where a prompt's phrases are among the tokens of a text encoder, and their own encodings put there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_attn.guidance.phrases import Phrase, find_phrases


def token_groups(tokenizer: Any, prompt: str, spans: Any, *, length: int | None = None) -> list[list[int]]:
    """Positions of phrases in the encoder's input.

    Characters are what counts, not words: apostrophes, accents, upper case and blanks need no care, and a word of
    several pieces has several positions.

    Args:
        tokenizer: A fast tokenizer of transformers, such as CLIP's or T5's.
        prompt: As it goes to the tokenizer.
        spans: `(start, end)` character offsets, `Phrase`s, or texts to be found in the prompt.
        length: Tokens that the encoder reads, special ones counted, such as a pipeline's `max_sequence_length`; None
            for the tokenizer's own.

    Returns:
        A list of positions per span, special tokens such as BOS counted.

    Raises:
        TypeError: a tokenizer that tells no offsets, spans of another kind.
        ValueError: a span that is not in the prompt, has no token, or lies beyond what the encoder reads.
    """
    phrases = find_phrases(prompt, spans)
    offsets = _offsets(tokenizer, prompt)
    limit = _capacity(tokenizer, length)
    groups = []
    for phrase in phrases:
        group = [place for place, (start, end) in enumerate(offsets) if start < phrase.end and end > phrase.start]
        if not group:
            raise ValueError(f"token_groups: spans must hold at least one token, got {phrase.text!r} of {prompt!r}")
        if group[-1] >= limit:
            raise ValueError(
                f"token_groups: spans must be within the {limit} tokens that the encoder reads, got {phrase.text!r} at "
                f"position {group[-1]}: put it nearer to the prompt's beginning"
            )
        groups.append(group)
    return groups


def word_positions(tokenizer: Any, prompt: str, *, length: int | None = None) -> list[int]:
    """Positions of all tokens that the prompt's characters have: none that are special, and no padding.

    Args:
        tokenizer: As of `token_groups`.
        prompt: As of `token_groups`.
        length: As of `token_groups`.
    """
    limit = _capacity(tokenizer, length)
    return [place for place, (start, end) in enumerate(_offsets(tokenizer, prompt)[:limit]) if end > start]


def read_until(tokenizer: Any, prompt: str, length: int | None = None) -> int:
    """How many characters of the prompt the encoder reads."""
    offsets, limit = _offsets(tokenizer, prompt), _capacity(tokenizer, length)
    return offsets[limit - 1][1] if len(offsets) > limit else len(prompt)


def readable(tokenizer: Any, prompt: str, phrases: Sequence[Phrase], length: int | None = None) -> list[Phrase]:
    """The phrases that lie within what the encoder reads; the others are warned of, as pipelines warn of cut text."""
    end = read_until(tokenizer, prompt, length)
    cut = [phrase.text for phrase in phrases if phrase.end > end]
    if cut:
        limit = _capacity(tokenizer, length)
        warnings.warn(f"phrases beyond the {limit} tokens that the encoder reads are left out: {cut}", stacklevel=4)
    return [phrase for phrase in phrases if phrase.end <= end]


def _offsets(tokenizer: Any, prompt: str) -> list[tuple[int, int]]:
    """Characters of each token, without the blanks around them; empty for special tokens."""
    try:
        encoded = tokenizer(prompt, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    except (NotImplementedError, TypeError) as error:
        raise TypeError(
            f"token_groups: tokenizer must be a fast tokenizer that tells offsets, got {type(tokenizer).__name__}"
        ) from error
    offsets = []
    for (start, end), special in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True):
        piece = prompt[start:end]
        blanks = len(piece) - len(piece.lstrip())
        offsets.append((0, 0) if special else (start + blanks, max(start + blanks, end)))
    return offsets


def _capacity(tokenizer: Any, length: int | None) -> int:
    """Tokens that the encoder reads, less the special one at the end."""
    longest: int = tokenizer.model_max_length if length is None else length
    return longest - 1


def align(prompt_embeds: Tensor, phrase_embeds: Any, groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """The prompt's encoding with each phrase's own encoding in the phrase's place.

    Args:
        prompt_embeds: `[..., T, C]` of the whole prompt.
        phrase_embeds: One `[..., T', C]` per phrase, each encoded alone: BOS, its tokens, anything.
        groups: Positions of each phrase in the prompt, as `token_groups` gives them.

    Returns:
        One tensor like `prompt_embeds` per phrase; all other positions are the prompt's.

    Raises:
        ValueError: another number of phrases than of groups, a group that is not consecutive or does not fit.

    Source: Structured Diffusion Guidance (arXiv 2212.05032), section 3.2.
    """
    if len(phrase_embeds) != len(groups):
        raise ValueError(f"align: phrase_embeds must be one per group, {len(groups)}, got {len(phrase_embeds)}")
    aligned = []
    for phrase, group in zip(phrase_embeds, groups, strict=True):
        first, count = (group[0], len(group)) if group else (0, 0)
        if not group or list(group) != list(range(first, first + count)) or first < 0:
            raise ValueError(f"align: groups must hold consecutive positions, got {list(group)}")
        if first + count > prompt_embeds.shape[-2] or 1 + count > phrase.shape[-2]:
            raise ValueError(
                f"align: groups must fit {prompt_embeds.shape[-2]} positions of the prompt and {phrase.shape[-2]} of "
                f"the phrase (the first is BOS), got {list(group)}"
            )
        own = phrase[..., 1 : 1 + count, :]
        parts = [prompt_embeds[..., :first, :], own, prompt_embeds[..., first + count :, :]]
        aligned.append(torch.cat(parts, -2))
    return aligned
