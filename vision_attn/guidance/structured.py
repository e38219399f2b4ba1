"""Structured Diffusion Guidance: phrases encoded alone lend their encodings to cross-attention.

A causal text encoder lets the words of a prompt leak into all later ones: the sheep of "a red car and a white sheep" is
a little red. Encoded alone, "a white sheep" is not. Keys stay the whole prompt's, so that attention looks where it
looked; values come from a mixture of the prompt and of its phrases, each in its place.

The paper runs one attention per phrase and averages the outputs; attention is linear in its values, so that one
attention with the mean of the values is the same, at no cost to the denoiser. Prompts that join two things may have the
phrases as keys, too ("conjunction"): these need an attention each.

Source: arXiv 2212.05032, section 3, and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision_attn.guidance.phrases import Phrase, find_phrases
from vision_attn.guidance.tokens import align, readable, token_groups

_REFUSED = ("transformer", "transformer_2", "prior")


class StructuredEmbeds(NamedTuple):
    """Text for cross-attention.

    Attributes:
        key_embeds: `[1, T, C]`, the prompt's encoding; `[n, T, C]` where the outputs of n keys are averaged.
        value_embeds: `[1, T, C]`, the same with the phrases' own encodings mixed in; `[n, T, C]` where each key has
            values of its own.
    """

    key_embeds: Tensor
    value_embeds: Tensor


def structured_embeddings(
    pipe: Any,
    prompt: str,
    phrases: Any = None,
    mode: str = "paper",
    strength: float = 1.0,
    *,
    clip_skip: int | None = None,
    lora_scale: float | None = None,
) -> StructuredEmbeds:
    """Keys and values of a prompt for the UNet of a Stable Diffusion pipeline.

    Args:
        pipe: A pipeline of SD 1, SD 2 or SDXL.
        prompt: One prompt.
        phrases: Texts, offsets, `Phrase`s or a function of the prompt; None for its noun phrases of several words. A
            phrase at the very beginning changes nothing: the encoder is causal.
        mode: What the values are. `"paper"`: the mean of the prompt's and of each phrase's sequence, so that k phrases
            have a weight of `1 / (k + 1)` each. `"covering"`: a phrase's tokens are the mean of the phrases that cover
            them, others are the prompt's. `"replace"`: as that, but the last phrase that covers a token wins, the inner
            one of nested phrases. `"conjunction"`, for prompts such as "A and B": the values are those of `"replace"`,
            and the outputs of k + 1 keys are averaged, the prompt's and, per phrase, the prompt's with the phrase's own
            encoding in its place.
        strength: Share of that mixture, 0 to 1; the prompt's encoding has the rest, of each key as of the values.
        clip_skip: As the pipeline's.
        lora_scale: Of adapters of the text encoder, the pipeline's `cross_attention_kwargs["scale"]`.

    Returns:
        `(key_embeds, value_embeds)`, both `[1, T, C]` in the encoder's dtype, for `value_context` or `text_context`.
        For a conjunction of k phrases `key_embeds` is `[k + 1, T, C]`, for `text_context` only. Where there is nothing
        to mix, no phrases or a strength of 0, both are the same tensor.

    Raises:
        NotImplementedError: a pipeline whose text goes through the denoiser's own layers (FLUX, SD3, ...).
        ValueError, TypeError: an unknown mode, a strength out of range, a phrase that the prompt lacks or that lies
            beyond what the encoder reads.

    Source: arXiv 2212.05032, equations 2 to 5; `"covering"`, `"replace"` and `strength` are ours. A conjunction has one
    value sequence, as in the released code; with values of its own for each key, as in the paper's formula, it is
    `StructuredEmbeds(keys, keys)`. Its first key is the prompt's own encoding; the released code writes the phrases
    into that very tensor, so that there the first key is equal to the values.
    """
    require_unet("structured_embeddings", pipe)
    require_mixture("structured_embeddings", mode, strength)
    require_plain_prompt("structured_embeddings", pipe, prompt)
    words = find_phrases(prompt, phrases)
    if phrases is None:
        words = [phrase for phrase in readable(pipe.tokenizer, prompt, words) if len(phrase.text.split()) > 1]
    whole = _encoded(pipe, prompt, clip_skip, lora_scale)
    groups = _groups(pipe, prompt, words)
    alone = [_encoded(pipe, phrase.text, clip_skip, lora_scale) for phrase in words]
    if not alone or strength == 0:
        return StructuredEmbeds(whole, whole)
    aligned = align(whole, alone, groups)
    keys = torch.cat([whole, *aligned]) if mode == "conjunction" else whole
    values = MODES[mode](whole, aligned, groups)
    return StructuredEmbeds(*(each if strength == 1 else torch.lerp(whole, each, strength) for each in (keys, values)))


def _mean(whole: Tensor, aligned: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([whole, *aligned]).mean(0)


def _covering(whole: Tensor, aligned: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    value = whole.clone()
    for place in sorted({place for group in groups for place in group}):
        own = [tensor[:, place] for tensor, group in zip(aligned, groups, strict=True) if place in group]
        value[:, place] = torch.stack(own).mean(0)
    return value


def _replaced(whole: Tensor, aligned: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    value = whole.clone()
    for tensor, group in zip(aligned, groups, strict=True):
        value[:, group] = tensor[:, group]
    return value


MODES = {"paper": _mean, "covering": _covering, "replace": _replaced, "conjunction": _replaced}


def require_unet(where: str, pipe: Any) -> None:
    """Refuse a pipeline without text keys and values that could differ.

    Raises:
        NotImplementedError: no Stable Diffusion pipeline.
    """
    parts = getattr(pipe, "components", {})
    if any(isinstance(parts.get(name), nn.Module) for name in _REFUSED) or "unet" not in parts:
        raise NotImplementedError(
            f"{where}: pipe must be a Stable Diffusion pipeline with a UNet, got {type(pipe).__name__}: where text "
            "passes through the denoiser's own layers (FLUX, SD3, ...) there are no keys and values of its own: use "
            "SD 1, SD 2 or SDXL; elsewhere only prompt_embeds can be mixed, before the call (guidance.align)"
        )


def require_plain_prompt(where: str, pipe: Any, prompt: str, tokenizer: Any = None) -> None:
    """Refuse a prompt that the pipeline changes before it encodes it: its phrases would be elsewhere.

    Args:
        where: Who asks, for messages.
        pipe: The pipeline.
        prompt: The prompt.
        tokenizer: Which of the pipeline's; None for its first.

    Raises:
        NotImplementedError: words of textual inversion that stand for several tokens.
    """
    convert = getattr(pipe, "maybe_convert_prompt", None)
    tokenizer = pipe.tokenizer if tokenizer is None else tokenizer
    if convert is not None and convert(prompt, tokenizer) != prompt:
        raise NotImplementedError(
            f"{where}: prompt must hold no textual inversion of several vectors, got {prompt!r}: its phrases would be "
            "taken from the wrong places"
        )


def require_mixture(where: str, mode: str, strength: float) -> None:
    """Refuse what `structured_embeddings` cannot mix.

    Raises:
        ValueError, TypeError: an unknown mode, a strength out of range.
    """
    if mode not in MODES:
        raise ValueError(f"{where}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"{where}: strength must be a number, got {strength!r}")
    if not 0 <= strength <= 1:
        raise ValueError(f"{where}: strength must be from 0 to 1, got {strength}")


@torch.no_grad()
def _encoded(pipe: Any, text: str, clip_skip: int | None, lora_scale: float | None) -> Tensor:
    """`[1, T, C]` as the pipeline itself encodes a prompt."""
    device = getattr(pipe, "_execution_device", pipe.device)
    embeds: Tensor = pipe.encode_prompt(
        prompt=text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, clip_skip=clip_skip,
        lora_scale=lora_scale,
    )[0]  # fmt: skip
    return embeds


def _groups(pipe: Any, prompt: str, phrases: Sequence[Phrase]) -> list[list[int]]:
    groups = token_groups(pipe.tokenizer, prompt, phrases)
    ids = pipe.tokenizer(prompt).input_ids
    for phrase, group in zip(phrases, groups, strict=True):
        alone = pipe.tokenizer(phrase.text).input_ids[1:-1]
        if [ids[place] for place in group] != alone:
            raise ValueError(
                f"structured_embeddings: phrases must be of whole tokens, got {phrase.text!r}, which alone is "
                f"{len(alone)} tokens that differ from the {len(group)} in the prompt: let it begin and end with words"
            )
    second = getattr(pipe, "tokenizer_2", None)
    if second is not None and token_groups(second, prompt, phrases) != groups:
        raise ValueError(
            f"structured_embeddings: both tokenizers of {type(pipe).__name__} must divide the prompt alike, got "
            f"{groups} and {token_groups(second, prompt, phrases)}"
        )
    return groups
