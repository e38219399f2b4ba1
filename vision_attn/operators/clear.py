"""CLEAR: circular local attention that makes a pre-trained diffusion transformer linear in its image tokens.

    image query i sees all text, and image key j iff |pos(i) - pos(j)|^2 < radius^2;  text queries see everything

With `down_factor` f > 1 image queries also see one pooled key and value per f x f cell of the grid: a learned
`spatial_weight` (one per layer, starting at the mean) weighs the cell's tokens.

Source: CLEAR (arXiv 2412.16112), section 3; the reference code Huage001/CLEAR fixes what the paper leaves open.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels.reach import Ball
from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import FLOATS, autocast, check_attention_inputs, joint_inputs
from vision_attn.operators.cost import Cost, chunks, pairs_cost, text_tiles, visited_tiles
from vision_attn.operators.joint import joint_attention, joint_mask
from vision_attn.operators.registry import register_operator

TRAINED_TOKENS = 4608  # of FLUX: 64 x 64 image and 512 text tokens
PROPORTIONAL_FACTOR = 10.0  # of the reference code's pooled variant


def proportional_scale(
    head_dim: int, n_tokens: int, trained_tokens: int = TRAINED_TOKENS, factor: float = 1.0
) -> float:
    """Softmax scale that keeps the entropy of trained attention at other sequence lengths.

    `sqrt(log(factor * n_tokens, trained_tokens) / head_dim)`.

    Args:
        head_dim: Channels per head.
        n_tokens: Tokens of this sequence, text included.
        trained_tokens: Tokens of the training sequences, at least 2.
        factor: Sharpens further; the pooled variant of CLEAR uses 10.

    Raises:
        ValueError: a value out of range.
        TypeError: not a finite number.

    Source: CLEAR (arXiv 2412.16112), section 4.3; Jin et al. (arXiv 2306.08645).

    Example:
        >>> proportional_scale(16, 4608)
        0.25
    """
    arguments = {"head_dim": head_dim, "n_tokens": n_tokens, "trained_tokens": trained_tokens, "factor": factor}
    for name, number in arguments.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < sys.float_info.max:
            raise TypeError(f"proportional_scale: {name} must be a finite number, got {number!r}")
    for name, value, least in (
        ("head_dim", head_dim, 1),
        ("n_tokens", n_tokens, 1),
        ("trained_tokens", trained_tokens, 2),
    ):
        if not value >= least:
            raise ValueError(f"proportional_scale: {name} must be at least {least}, got {value}")
    if not factor * n_tokens >= 1:
        raise ValueError(f"proportional_scale: factor must keep factor * n_tokens at 1 or more, got factor={factor}")
    return math.sqrt(math.log(factor * n_tokens) / math.log(trained_tokens) / head_dim)


def clear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, ...],
    radius: float | tuple[float, ...],
    text_tokens: int = 0,
    text_first: bool = True,
    down_factor: int = 1,
    spatial_weight: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """CLEAR's circular attention on a joint sequence of text and image tokens.

    Args:
        query: `[B, S, H, D]`, `S = text_tokens + prod(grid)`, image tokens row-major.
        key: `[B, S, Hkv, D]`, `Hkv` divides `H`.
        value: `[B, S, Hkv, Dv]`.
        grid: Image tokens `(Y, X)` or `(T, Y, X)`.
        radius: In tokens, above 0. Keys at a distance strictly below it are seen; windows are clipped at borders. One
            radius per axis of the grid makes an ellipse, `sum((step / radius)^2) < 1`, as for video.
        text_tokens: Tokens that everyone sees and that see everyone.
        text_first: Whether text stands before the image tokens (FLUX) or after them (SD3).
        down_factor: Side `f` of the cells pooled into one extra key and value; 1 for none. On a `(T, Y, X)` grid
            each frame is pooled by itself. Cells cut by the border pool the tokens they hold, with weights
            rescaled to the sum of a whole cell's (less where the held weights all but cancel).
        spatial_weight: `(1, 1, 1, f, 1, f, 1)` or `(f, f)`, row then column inside the cell; None is the mean.
        scale: Factor on the logits; None is `D ** -0.5`.
        return_lse: Also return the natural log-sum-exp.
        backend: As for `na2d`.

    Returns:
        `[B, S, H, Dv]` in the query's dtype; with `return_lse` also `[B, S, H]` in float32 (float64 for float64).
        Differentiable in query, key, value and `spatial_weight`.

    Raises:
        ValueError, TypeError: arguments that do not fit, before any work.
        ImportError, RuntimeError: an unavailable backend asked for by name.

    Cost:
        About `4 * H * D * (pi * radius^2 * Y * X + text_tokens * S)` FLOPs, linear in the image tokens; pooled keys
        add `(Y * X / f)^2` pairs, which is not. Memory is linear.

    Source: CLEAR (arXiv 2412.16112); `radius` is its `window_size`.

    Example:
        >>> x = torch.randn(1, 7 + 4 * 6, 2, 8)
        >>> clear_attention(x, x, x, grid=(4, 6), radius=2, text_tokens=7, down_factor=2).shape
        torch.Size([1, 31, 2, 8])
    """
    where = "clear_attention"
    if not isinstance(text_first, bool):
        raise TypeError(f"{where}: text_first must be True or False, got {text_first!r}")
    before, after = (text_tokens, 0) if text_first else (0, text_tokens)
    layout = _checked_layout(where, grid, before, after)
    query, key, value = autocast(query, key, value)
    check_attention_inputs(where, query, key, value)
    _check_sequence(where, query, layout)
    pooled = pooled_keys(where, key, value, layout, _checked_factor(where, down_factor), spatial_weight)
    reach = checked_ball(where, layout.grid, radius)
    output, lse = joint_attention(
        where, query, key, value, layout, reach, scale, pooled=pooled, return_lse=return_lse, backend=backend
    )
    return (output, lse) if return_lse else output


def pooled_keys(
    where: str, key: Tensor, value: Tensor, layout: TokenLayout, down_factor: int, spatial_weight: Tensor | None
) -> list[tuple[Tensor, Tensor, None]]:
    """One key and value `[B, cells, Hkv, D]` per `down_factor` cell of the grid; empty without pooling.

    A cell that the border cuts pools the tokens it holds, with weights rescaled to the sum of a whole cell's.
    """
    if down_factor == 1:
        if spatial_weight is not None:
            raise ValueError(
                f"{where}: spatial_weight must be None without pooling, got down_factor=1: set down_factor"
            )
        return []
    weight = _checked_weight(where, spatial_weight, down_factor, key)
    image = layout.image_slice
    return [(_pool(key[:, image], layout.grid, weight), _pool(value[:, image], layout.grid, weight), None)]


def pooled_cells(grid: tuple[int, ...], down_factor: int) -> int:
    """Number of cells of a grid."""
    frames, (y, x) = math.prod(grid[:-2]), (1, *grid)[-2:]
    return frames * -(-y // down_factor) * -(-x // down_factor)


def _pool(tokens: Tensor, grid: tuple[int, ...], weight: Tensor) -> Tensor:
    """`[B, N, H, D]` to `[B, cells, H, D]`: weighted sums over `f x f` cells of each frame."""
    f, (y, x) = weight.shape[0], (1, *grid)[-2:]
    b, _, heads, width = tokens.shape
    frames = tokens.reshape(b * math.prod(grid[:-2]), y, x, heads * width)
    rows, columns = -(-y // f), -(-x // f)
    padded = torch.nn.functional.pad(frames, (0, 0, 0, columns * f - x, 0, rows * f - y))
    cells = padded.unflatten(2, (columns, f)).unflatten(1, (rows, f))
    pooled = torch.einsum("nrfcgd,rcfg->nrcd", cells, _cell_weights(weight, y, x).to(tokens.dtype))
    return pooled.reshape(b, math.prod(grid[:-2]) * rows * columns, heads, width)


def _cell_weights(weight: Tensor, y: int, x: int) -> Tensor:
    """The weight of every token in its cell, `[rows, columns, f, f]`: zero off the grid, each cell of full sum."""
    f = weight.shape[0]
    rows, columns = -(-y // f), -(-x // f)
    inside_y = torch.arange(rows * f, device=weight.device).view(rows, 1, f, 1) < y
    inside_x = torch.arange(columns * f, device=weight.device).view(1, columns, 1, f) < x
    inside = inside_y & inside_x
    held = weight * inside
    if y % f == 0 and x % f == 0:
        return held
    total, kept, mass = weight.sum(), held.sum((2, 3), keepdim=True), held.abs().sum((2, 3), keepdim=True)
    # Weights are unconstrained: where those of a cut cell all but cancel, their sum counts as 1 / f^2 of their mass.
    least = mass / f**2
    bounded = torch.where(kept.abs() < least, torch.where(kept < 0, -least, least), kept)
    rescale = total / torch.where(mass == 0, torch.ones_like(bounded), bounded)
    # Whole cells keep their weights to the bit: two sums of the same numbers may round differently.
    return torch.where(inside.all(3, keepdim=True).all(2, keepdim=True), held, held * rescale)


@register_operator("clear")
@dataclass(frozen=True)
class Clear:
    """CLEAR's circular attention as an operator for whole sequences.

    Args:
        radius: In tokens, above 0; keys at a distance strictly below it are seen. One per grid axis makes an ellipse.
        down_factor: Side of the cells pooled into extra keys and values; 1 for none. Above 1 the operator has one
            learned parameter per layer, `spatial_weight`.
        proportional: Use `proportional_scale` (with factor 10 where keys are pooled, as the reference code does)
            instead of the model's own scale.

    Raises:
        ValueError, TypeError: a value out of range.

    Source: CLEAR (arXiv 2412.16112).
    """

    radius: float | tuple[float, ...]
    down_factor: int = 1
    proportional: bool = False

    def __post_init__(self) -> None:
        # Numpy's float is one of Python's too, but prints as no literal.
        object.__setattr__(self, "radius", _checked_radius("Clear", self.radius))
        _checked_factor("Clear", self.down_factor)
        if not isinstance(self.proportional, bool):
            raise TypeError(f"Clear: proportional must be True or False, got {self.proportional!r}")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        scale: float | None = None,
        *,
        attn_mask: Tensor | None = None,
        spatial_weight: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Attention on `[B, S, H, D]` with `S = layout.tokens`.

        Raises UnsupportedError for a mask it cannot honour: one that differs between image queries or heads, or, with
        pooled keys, one that touches image keys.
        """
        query, key, value = joint_inputs("Clear", query, key, value, layout)
        if self.proportional:
            factor = PROPORTIONAL_FACTOR if self.down_factor > 1 else 1.0
            scale = proportional_scale(query.shape[-1], layout.tokens, factor=factor)
        pooled = pooled_keys("Clear", key, value, layout, self.down_factor, spatial_weight)
        return joint_attention(
            "Clear", query, key, value, layout, self.reach(layout), scale, attn_mask, pooled=pooled, backend=backend
        )[0]

    def initial_parameters(self) -> dict[str, Tensor]:
        """Learned parameters of one layer at their start: the mean over a cell."""
        f = self.down_factor
        return {"spatial_weight": torch.full((1, 1, 1, f, 1, f, 1), 1 / f**2)} if f > 1 else {}

    def reach(self, layout: TokenLayout) -> Ball:
        """The window on this layout's grid."""
        return checked_ball("Clear", layout.grid, self.radius)

    def mask(self, layout: TokenLayout) -> Tensor:
        """Bool `[S, S]`: which token sees which; pooled keys are left out."""
        return joint_mask(self.reach(layout), layout)

    def cost(self, layout: TokenLayout, heads: int, head_dim: int) -> Cost:
        """Counted cost of one call, one batch item; pooled keys included."""
        reach, text, image = self.reach(layout), layout.text_tokens, layout.image_tokens
        cells = pooled_cells(layout.grid, self.down_factor) if self.down_factor > 1 else 0
        pairs = reach.count() + text * (image + layout.tokens) + image * cells
        tiles = visited_tiles(reach) + text_tiles(layout.grid, text) + chunks(image) * chunks(cells)
        return pairs_cost(pairs, layout.tokens, heads, head_dim, tiles)


def _checked_layout(where: str, grid: Any, before: Any, after: Any) -> TokenLayout:
    if not isinstance(grid, Sequence):
        raise TypeError(f"{where}: grid must be a tuple (Y, X) or (T, Y, X), got {grid!r}")
    try:
        layout = TokenLayout(tuple(grid), before, after)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        problem = (
            str(error)
            .replace("TokenLayout: ", "")
            .replace("text_before", "text_tokens")
            .replace("text_after", "text_tokens")
        )
        raise kind(f"{where}: {problem}") from error
    if len(layout.grid) == 1:
        raise ValueError(f"{where}: grid must be (Y, X) or (T, Y, X), got {layout.grid}")
    return layout


def _check_sequence(where: str, query: Tensor, layout: TokenLayout) -> None:
    if query.shape[1] != layout.tokens:
        raise ValueError(
            f"{where}: query must have text_tokens + prod(grid) = {layout.text_tokens} + {layout.image_tokens} tokens "
            f"for grid={layout.grid}, got {query.shape[1]}"
        )


def checked_ball(where: str, grid: tuple[int, ...], radius: Any) -> Ball:
    """The window of a radius, or of one per axis, on a token grid.

    Raises:
        ValueError, TypeError: a radius out of range, or another number of them than the grid has axes.
    """
    radius = _checked_radius(where, radius)
    if isinstance(radius, tuple) and len(radius) != len(grid):
        raise ValueError(
            f"{where}: radius must be one value or {len(grid)} of them (one per axis of the grid {grid}), got {radius}"
        )
    try:
        return Ball.of_radius(grid, radius)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _checked_radius(where: str, radius: Any) -> float | tuple[float, ...]:
    if isinstance(radius, (list, tuple)):
        if not 1 <= len(radius) <= 3:
            raise ValueError(f"{where}: radius must be one value or one per grid axis, 1 to 3, got {radius!r}")
        return tuple(_checked_length(where, item) for item in radius)
    return _checked_length(where, radius)


def _checked_length(where: str, radius: Any) -> float:
    if isinstance(radius, bool) or not isinstance(radius, (int, float)):
        raise TypeError(f"{where}: radius must be a number of tokens, got {radius!r}")
    if not 0 < radius < sys.float_info.max:
        raise ValueError(f"{where}: radius must be above 0 and finite, got {radius}: 1 sees the query's own token only")
    return radius if isinstance(radius, int) else float(radius)


def _checked_factor(where: str, down_factor: Any) -> int:
    if isinstance(down_factor, bool) or not isinstance(down_factor, int):
        raise TypeError(f"{where}: down_factor must be an integer, got {down_factor!r}")
    if down_factor < 1:
        raise ValueError(f"{where}: down_factor must be at least 1, got {down_factor}: 1 pools nothing")
    return down_factor


def _checked_weight(where: str, weight: Tensor | None, f: int, like: Tensor) -> Tensor:
    if weight is None:
        return like.new_full((f, f), 1 / f**2)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{where}: spatial_weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{where}: spatial_weight must be floating point of 16 to 64 bits, got {weight.dtype}")
    if weight.layout != torch.strided:
        raise ValueError(f"{where}: spatial_weight must be a dense tensor, got {weight.layout}: use .to_dense()")
    if weight.device != like.device:
        raise ValueError(f"{where}: spatial_weight must be on the key's device {like.device}, got {weight.device}")
    if tuple(weight.shape) not in ((f, f), (1, 1, 1, f, 1, f, 1)):
        legal = f"({f}, {f}) or (1, 1, 1, {f}, 1, {f}, 1)"
        raise ValueError(f"{where}: spatial_weight must have shape {legal}, got {tuple(weight.shape)}")
    return weight.reshape(f, f)
