"""A window over the image tokens of a joint text-image sequence: text is seen by all and sees everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_attn.backends import full, resolve, triton_windowed, windowed
from vision_attn.errors import UnsupportedError
from vision_attn.kernels.reach import Reach
from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import checked_mask, joint_inputs, no_autocast, resolve_scale

Extra = tuple[Tensor, Tensor, Tensor | None]


def joint_attention(
    where: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    reach: Reach,
    scale: float | None,
    attn_mask: Tensor | None = None,
    *,
    pooled: Sequence[Extra] = (),
    return_lse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Windowed attention on a whole sequence.

    Args:
        where: Name of the public function, for messages.
        query: `[B, S, H, D]` with `S = layout.tokens`.
        key: `[B, S, Hkv, D]`.
        value: `[B, S, Hkv, Dv]`.
        layout: Where the grid stands in the sequence.
        reach: The window of the grid's tokens.
        scale: Factor on the logits, None for `D ** -0.5`.
        attn_mask: As for `scaled_dot_product_attention`, broadcastable to `[B, H, S, S]`, bool (True = visible) or
            added to the logits. All image queries must share one row of it; text queries may have their own.
        pooled: Further keys and values for image queries only.
        return_lse: Whether the log-sum-exp is wanted.
        backend: Backend name.

    Returns:
        Output `[B, S, H, Dv]` and log-sum-exp `[B, S, H]`.

    Raises:
        UnsupportedError: a mask that differs between image queries or heads.
        ValueError, TypeError: arguments that do not fit.
    """
    query, key, value = joint_inputs(where, query, key, value, layout)
    factor, chosen = resolve_scale(where, scale, query.shape[-1]), resolve(backend, where, query, value, reach)
    with no_autocast(query):
        return _joint(where, query, key, value, layout, reach, factor, attn_mask, pooled, return_lse, chosen)


def _joint(
    where: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    reach: Reach,
    factor: float,
    attn_mask: Tensor | None,
    pooled: Sequence[Extra],
    return_lse: bool,
    chosen: str,
) -> tuple[Tensor, Tensor]:
    bias, text_mask = split_mask(where, attn_mask, query, layout)
    if pooled and bias is not None:
        require_visible_grid(where, bias[:, layout.image_slice])
    if chosen == "triton" and (text_mask is None or text_mask.shape[2] == 1):  # text and image queries share the bias
        return triton_windowed(query, key, value, reach, factor, before=layout.text_before, key_bias=bias, extra=pooled)
    image, before, after = (
        layout.image_slice,
        slice(0, layout.text_before),
        slice(layout.image_slice.stop, layout.tokens),
    )

    extra = [(key[:, s], value[:, s], None if bias is None else bias[:, s]) for s in (before, after)]
    grid_bias = None if bias is None else bias[:, image]
    q, k, v = (x[:, image] for x in (query, key, value))
    extra = [part for part in (*extra, *pooled) if part[0].shape[1] > 0]
    output, lse = windowed(
        q, k, v, reach, factor, extra=extra, key_bias=grid_bias, return_lse=return_lse, backend=chosen
    )
    if not layout.text_tokens:
        return output, lse
    text_query = torch.cat([query[:, before], query[:, after]], dim=1)
    text_out, text_lse = full(text_query, key, value, text_mask, factor, backend=chosen)
    return (
        torch.cat([text_out[:, before], output, text_out[:, layout.text_before :]], dim=1),
        torch.cat([text_lse[:, before], lse, text_lse[:, layout.text_before :]], dim=1),
    )


def with_text_queries(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, text_mask: Tensor | None,
    factor: float, backend: str,
) -> Tensor:  # fmt: skip
    """The grid's output `[B, N, H, Dv]` among that of the text's queries, which attend every key of the sequence."""
    if not layout.text_tokens:
        return output
    image, before = layout.image_slice, layout.text_before
    text = torch.cat([query[:, : image.start], query[:, image.stop :]], 1)
    text = full(text, key, value, text_mask, factor, backend=backend)[0]
    return torch.cat([text[:, :before], output, text[:, before:]], 1)


def require_visible_grid(where: str, bias: Tensor) -> None:
    """Refuse a key bias `[B, N]` of the grid where its keys are pooled."""
    # A pooled key mixes the tokens of its cell: hidden in the window only, they would leak through it.
    if torch.compiler.is_compiling() or bool(bias.any()):
        raise UnsupportedError(
            f"{where}: attn_mask must leave all image keys visible where keys are pooled, it does not"
        )


def joint_mask(reach: Reach, layout: TokenLayout) -> Tensor:
    """Bool `[S, S]` of a window on a whole sequence."""
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    mask[layout.image_slice, layout.image_slice] = reach.mask()
    return mask


def split_mask(
    where: str, attn_mask: Tensor | None, query: Tensor, layout: TokenLayout
) -> tuple[Tensor | None, Tensor | None]:
    """The key bias `[B, S]` that all image queries share and the additive mask of the text queries.

    Raises:
        UnsupportedError: image queries, or heads, have different masks, or the mask needs a gradient.
        ValueError: the mask does not broadcast to `[B, H, S, S]`.
    """
    if attn_mask is None:
        return None, None
    if isinstance(attn_mask, Tensor) and attn_mask.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            f"{where}: attn_mask must not need a gradient, as a learned bias does: only va.Dense() has it"
        )
    mask = _additive(where, attn_mask, query, layout)
    if mask.shape[1] > 1:
        raise UnsupportedError(f"{where}: attn_mask must be the same for all heads, got shape {tuple(attn_mask.shape)}")
    if mask.shape[2] == 1:
        return mask[:, 0, 0].expand(query.shape[0], -1), mask
    rows = mask[:, 0, layout.image_slice]
    if torch.compiler.is_compiling() or not torch.equal(rows, rows[:, :1].expand_as(rows)):
        raise UnsupportedError(
            f"{where}: attn_mask must be the same for all image queries, got shape {tuple(attn_mask.shape)}"
        )
    text = torch.cat([mask[:, :, : layout.text_before], mask[:, :, layout.image_slice.stop :]], dim=2)
    return rows[:, 0].expand(query.shape[0], -1), text


def _additive(where: str, attn_mask: Tensor, query: Tensor, layout: TokenLayout) -> Tensor:
    """`[B or 1, H or 1, S or 1, S]`, added to the logits."""
    mask = checked_mask(where, attn_mask, query).expand(-1, -1, -1, layout.tokens)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, float("-inf"))
    return mask
