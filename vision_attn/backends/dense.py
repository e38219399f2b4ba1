"""The readable oracle: softmax attention with an explicit mask, on any device, differentiable in everything."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_attn.backends.attend import accumulator, finite, logsumexp
from vision_attn.kernels.reach import Reach


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`softmax(scale * Q K^T + attn_mask) V` as it is written in the papers; memory is quadratic.

    Args and returns as `vision_attn.backends.attend.attend`; `attn_mask` may be bool, True where a query sees a key.
    """
    wide, group = accumulator(query.dtype), query.shape[2] // key.shape[2]
    q = query.to(wide).transpose(1, 2)
    k, v = (x.to(wide).repeat_interleave(group, dim=2).transpose(1, 2) for x in (key, value))
    logits = q @ k.transpose(-1, -2) * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask.to(wide)
    lse = logsumexp(logits, -1)
    output = (logits - finite(lse).unsqueeze(-1)).exp() @ v
    return output.transpose(1, 2).to(query.dtype), lse.transpose(1, 2)


def dense_windowed(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, reach: Reach, scale: float
) -> tuple[Tensor, Tensor]:
    """Windowed attention through the window's full mask; arguments as `vision_attn.backends.tiled.window_attention`."""
    visible = reach.mask(query.device)
    if key_bias is None:
        return dense_attention(query, key, value, visible, scale)
    mask = key_bias[:, None, None, :].to(accumulator(query.dtype)).masked_fill(~visible, float("-inf"))
    return dense_attention(query, key, value, mask, scale)
