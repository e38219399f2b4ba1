"""How much of the other object a shape's token holds: what Structured Diffusion Guidance could mend."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .scenes import COLORS, SHAPES

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Leakage:
    """Mean distances of a shape's token in "a <color> circle and a <color> <shape>", over the token's own length.

    Args:
        other: To the same where the circle has another color: what leaks in.
        own: To the same where the shape itself has another color: what the token is for.
        alone: To that of "a <color> <shape>", which nothing can leak into, but which stands elsewhere.
    """

    other: float
    own: float
    alone: float


@torch.no_grad()
def measure_leakage(pipeline: StableDiffusionPipeline) -> Leakage:
    """Encodes every such caption with the pipeline's tokenizer and text encoder.

    Args:
        pipeline: a stock pipeline with the embedded model's tokenizer, one token per word.
    """
    colors = list(COLORS)
    grid = list(product(colors, colors, SHAPES))
    tokens = _shape_tokens(pipeline, [f"a {first} circle and a {second} {shape}" for first, second, shape in grid])
    table = tokens.unflatten(0, (len(colors), len(colors), len(SHAPES)))
    alone = _shape_tokens(pipeline, [f"a {color} {shape}" for color, shape in product(colors, SHAPES)])
    pairs = torch.tensor(list(permutations(range(len(colors)), 2)))
    return Leakage(
        other=_distance(table[pairs[:, 0]], table[pairs[:, 1]]),
        own=_distance(table[:, pairs[:, 0]], table[:, pairs[:, 1]]),
        alone=_distance(table, alone.unflatten(0, (len(colors), len(SHAPES))).expand_as(table)),
    )


def _shape_tokens(pipeline: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """`[captions, C]`: the last word of each caption; all have the same number of words."""
    options = {"padding": "max_length", "max_length": pipeline.tokenizer.model_max_length, "return_tensors": "pt"}
    ids = pipeline.tokenizer(captions, **options).input_ids
    return pipeline.text_encoder(ids.to(pipeline.device))[0][:, len(captions[0].split())]  # BOS is before the first


def _distance(tokens: Tensor, others: Tensor) -> float:
    return float(((tokens - others).norm(dim=-1) / tokens.norm(dim=-1)).mean())
