"""Cross-attention of a UNet with other texts than the call's own.

The projections to keys and values get other inputs, and nothing else changes: processors, backends, adapters and
patches go on as they are. Several texts of one image are as many attentions, whose outputs are averaged: all that comes
after the softmax is linear, so that the mean of the module's outputs is the projection of the mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.guidance.structured import StructuredEmbeds


@contextlib.contextmanager
def value_context(unet: nn.Module, value_embeds: Tensor) -> Iterator[None]:
    """Have the cross-attention of a UNet take its values from another text than its keys.

    With the keys' own text the output is the same bit for bit.

    Args:
        unet: `UNet2DConditionModel`.
        value_embeds: `[B, T, C]`: of the last B rows of a call, which are the conditional ones of classifier-free
            guidance; rows before them keep their text.

    Raises:
        ValueError: a model without cross-attention; at the call, text of another shape.
        NotImplementedError: fused projections, or a norm between text and projections.
    """
    value = _TextHook("value_context: value_embeds", value_embeds)
    with contextlib.ExitStack() as stack:
        for attention in _cross_attention("value_context", unet):
            stack.callback(attention.to_v.register_forward_pre_hook(value).remove)
        yield


@contextlib.contextmanager
def text_context(unet: nn.Module, texts: Sequence[StructuredEmbeds]) -> Iterator[None]:
    """Have the cross-attention of a UNet attend to texts of each image's own, and average over them.

    With n keys the output is `1/n * sum_i softmax(Q K_i^T / sqrt(d)) V_i`, where `V_i` is the i-th value sequence or
    the only one. `AttentionCapture` sees the first keys.

    Args:
        unet: `UNet2DConditionModel`.
        texts: One per image, for the last rows of a call, which are the conditional ones of classifier-free guidance:
            keys `[n, T, C]`, n of the image's own, and values `[n, T, C]` or `[1, T, C]`. Rows before them keep their
            text and their bits.

    Raises:
        ValueError: texts of shapes that do not go together, a model without cross-attention; at the call, text of
            another shape.
        NotImplementedError: fused projections, or a norm between text and projections.

    Source: Structured Diffusion Guidance (arXiv 2212.05032), section 3.

    Cost: per layer one more cross-attention for each key but the first of each image, all of them in one batch.
    """
    _check_texts(texts)
    key = _TextHook("text_context: texts", torch.cat([text.key_embeds[:1] for text in texts]))
    value = _TextHook("text_context: texts", torch.cat([text.value_embeds[:1] for text in texts]))
    mean = _MeanHook(texts, key, value)
    with contextlib.ExitStack() as stack:
        for attention in _cross_attention("text_context", unet):
            stack.callback(attention.to_k.register_forward_pre_hook(key).remove)
            stack.callback(attention.to_v.register_forward_pre_hook(value).remove)
            if any(mean.further):
                stack.callback(attention.register_forward_hook(mean, with_kwargs=True).remove)
        yield


class _TextHook:
    """Forward pre-hook of a projection whose last rows get another text."""

    def __init__(self, argument: str, embeds: Tensor) -> None:
        self.argument, self.embeds = argument, embeds

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        text, own = args[0], self.embeds
        if text.shape[1:] != own.shape[1:] or text.shape[0] not in (own.shape[0], 2 * own.shape[0]):
            raise ValueError(
                f"{self.argument} must be the last rows of text of shape {tuple(text.shape)}, got "
                f"{tuple(own.shape)}: give one row per image"
            )
        return (torch.cat([text[: text.shape[0] - own.shape[0]], own.to(text)]), *args[1:])

    @contextlib.contextmanager
    def giving(self, embeds: Tensor) -> Iterator[None]:
        first, self.embeds = self.embeds, embeds
        try:
            yield
        finally:
            self.embeds = first


class _MeanHook:
    """Forward hook of cross-attention with the first text of each image: attends to the further ones and averages."""

    def __init__(self, texts: Sequence[StructuredEmbeds], key: _TextHook, value: _TextHook) -> None:
        self.key, self.value = key, value
        self.keys = torch.cat([text.key_embeds[1:] for text in texts])
        self.values = torch.cat([text.value_embeds.expand_as(text.key_embeds)[1:] for text in texts])
        self.further = [len(text.key_embeds) - 1 for text in texts]
        images = [image for image, count in enumerate(self.further) for _ in range(count)]
        self.images = torch.tensor(images, device=self.keys.device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        batch = output.shape[0]
        others = batch - len(self.further)
        rows = self.images.to(output.device) + others
        with self.key.giving(self.keys), self.value.giving(self.values):
            further = module.forward(*_select(args, rows, batch), **_select(kwargs, rows, batch))
        own = zip(output[others:].split(1), further.split(self.further), strict=True)
        return torch.cat([output[:others], *(torch.cat(outputs).mean(0, keepdim=True) for outputs in own)])


def _select(argument: Any, rows: Tensor, batch: int) -> Any:
    """Some rows of every tensor of the batch in an argument of a call."""
    if isinstance(argument, Tensor):
        return argument.index_select(0, rows) if argument.ndim and argument.shape[0] == batch else argument
    if isinstance(argument, dict):
        return {name: _select(each, rows, batch) for name, each in argument.items()}
    if isinstance(argument, (tuple, list)):
        return type(argument)(_select(each, rows, batch) for each in argument)
    return argument


def _check_texts(texts: Sequence[StructuredEmbeds]) -> None:
    shapes = [(tuple(text.key_embeds.shape), tuple(text.value_embeds.shape)) for text in texts]
    for key, value in shapes:
        if len(key) != 3 or not key[0] or value not in (key, (1, *key[1:])) or key[1:] != shapes[0][0][1:]:
            raise ValueError(
                "text_context: texts must hold keys [n, T, C] with as many values or one, T and C alike in all, got "
                f"keys {key} and values {value}"
            )
    if not shapes:
        raise ValueError(f"text_context: texts must be one per image, got {texts!r}")


def _cross_attention(where: str, unet: nn.Module) -> list[Any]:
    """The cross-attention modules, each with projections of the text."""
    named = [(name, part) for name, part in unet.named_modules() if name.endswith("attn2") and hasattr(part, "to_v")]
    if not named:
        raise ValueError(f"{where}: unet must have cross-attention, got {type(unet).__name__} without attn2")
    for name, attention in named:
        _check_attention(where, name, attention)
    return [attention for _, attention in named]


def _check_attention(where: str, name: str, attention: Any) -> None:
    problem = "fused projections" if getattr(attention, "fused_projections", False) else ""
    problem = problem or ("a norm of the text" if getattr(attention, "norm_cross", None) is not None else "")
    if problem:
        raise NotImplementedError(
            f"{where}: cross-attention must project keys and values of the text apart, got {problem} in {name!r}"
        )
