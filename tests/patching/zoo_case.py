"""One tiny random model of the zoo: how to build it, what to feed it and how to touch one of its tokens.

Test modules and the tables `zoo_image.py`, `zoo_video.py`, `zoo_unet.py` import this as `from zoo_case import Case`:
pytest puts `tests/patching` on the path (`pythonpath` in pyproject.toml).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

Inputs = dict[str, Any]

# What diffusers and torch say while tiny models run, by name; every other warning stays an error.
UPSTREAM_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*In CPU autocast, but the target dtype is not supported:UserWarning"),
]


@dataclass(frozen=True)
class Case:
    """A tiny random configuration of one diffusers model class.

    Attributes:
        name: Test id, such as `"flux"`.
        build: Makes the model: seeded, eval mode, float32.
        inputs: `inputs(*grid)` gives the keyword arguments of `forward` for a *token* grid (Y, X) or (T, Y, X): seeded,
            batch 2.
        grid: Token grid of the tests: never square, at least 5 x 7 tokens where the model allows it.
        touch_image: `touch_image(inputs, token)` changes, in place, what the token at (y, x) or (t, y, x) is made of.
        touch_text: `touch_text(inputs, row)` changes, in place, one text row; `None` when no text is in the sequence.
        text_tokens: Rows that may be passed to `touch_text`.
        text_mixes: One text row reaches all others before attention (a pooled prompt modulates them).
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]
    grid: tuple[int, ...] = (5, 7)
    touch_image: Callable[[Inputs, tuple[int, ...]], None] | None = None
    touch_text: Callable[[Inputs, int], None] | None = None
    text_tokens: int = 0
    text_mixes: bool = False


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Make a builder reproducible, with random values for parameters that start at zero (gates, output layers)."""

    def build_seeded() -> nn.Module:
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() > 1 and not parameter.any():
                    parameter.normal_(std=0.2)
        return model

    return build_seeded


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values that do not depend on what was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change(channels: int) -> torch.Tensor:
    """What touching adds to the channels: not the same for all, which a layer norm would remove."""
    return 2 * randn(channels, seed=99)


def touch_latent(key: str, patch: int | tuple[int, ...] = 1) -> Callable[[Inputs, tuple[int, ...]], None]:
    """Touch the first pixel of a token in a latent `[B, C, Y, X]` or `[B, C, T, Y, X]`; `patch` pixels per token."""

    def touch(inputs: Inputs, token: tuple[int, ...]) -> None:
        steps = (patch,) * len(token) if isinstance(patch, int) else patch
        pixel = tuple(position * step for position, step in zip(token, steps, strict=True))
        inputs[key][(slice(None), slice(None), *pixel)] += change(inputs[key].shape[1])

    return touch


def touch_packed(key: str, grid: tuple[int, ...], start: int = 0) -> Callable[[Inputs, tuple[int, ...]], None]:
    """Touch a token of a packed row-major sequence `[B, S, C]` whose image starts at row `start`."""

    def touch(inputs: Inputs, token: tuple[int, ...]) -> None:
        row = 0
        for position, size in zip(token, grid, strict=True):
            row = row * size + position
        inputs[key][:, start + row] += change(inputs[key].shape[-1])

    return touch


def touch_row(key: str) -> Callable[[Inputs, int], None]:
    """Touch one row of text embeddings `[B, S, C]`."""

    def touch(inputs: Inputs, row: int) -> None:
        inputs[key][:, row] += change(inputs[key].shape[-1])

    return touch
