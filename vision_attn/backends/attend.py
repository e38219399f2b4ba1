"""Softmax attention with its log-sum-exp, forward and backward, as a custom op: the building block of `tiled`.

On the CPU the forward pass is PyTorch's own fused flash kernel, which also returns the log-sum-exp; elsewhere, and in
the backward pass (the fused one has no gradient for the log-sum-exp), it is two matrix products per chunk of queries.
Memory is linear in the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# Elements of one chunk of logits: 2**22 float32 are 16 MiB, within a desktop CPU's caches and small on any GPU.
CHUNK_ELEMENTS = 2**22


@torch.library.custom_op("vision_attn::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over every key.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, Hkv, D]`, `H` a multiple of `Hkv`.
        value: `[B, Sk, Hkv, Dv]`.
        attn_mask: Added to the logits, broadcastable to `[B, H, Sq, Sk]`; `-inf` hides a key. No gradient.
        scale: Factor on the logits.

    Returns:
        Output `[B, Sq, H, Dv]` in the query's dtype and the natural log-sum-exp `[B, Sq, H]` in float32 (float64 for
        float64). A query that sees no key gives zeros and `-inf`.
    """
    heads_kv, mask = key.shape[2], fold_mask(attn_mask, query, key)
    q, k, v = (heads_first(x, heads_kv) for x in (query, key, value))
    output, lse = attend_heads(q, k, v, mask, scale)
    if mask is not None:
        output, lse = clear_empty(output, lse, mask)
    heads = query.shape[2]
    return heads_last(output, heads).contiguous(), heads_last(lse.unsqueeze(-1), heads).squeeze(-1).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=accumulator(query.dtype))


@torch.library.custom_op("vision_attn::attend_backward", mutates_args=())
def attend_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` for query, key and value."""
    heads_kv, heads = key.shape[2], query.shape[2]
    folded = [heads_first(x, heads_kv) for x in (grad_output, query, key, value, output)]
    delta = heads_first((lse_delta(grad_output, grad_lse, output)).unsqueeze(-1), heads_kv).squeeze(-1)
    lse_first = heads_first(lse.unsqueeze(-1), heads_kv).squeeze(-1)
    grad_out, q, k, v, _ = folded
    grad_q, grad_k, grad_v = attend_heads_backward(
        grad_out, delta, q, k, v, fold_mask(attn_mask, query, key), lse_first, scale
    )
    return (
        heads_last(grad_q, heads).to(query.dtype).contiguous(),
        grad_k.transpose(1, 2).contiguous().to(key.dtype),
        grad_v.transpose(1, 2).contiguous().to(value.dtype),
    )


@attend_backward.register_fake
def _(grad_output, grad_lse, query, key, value, attn_mask, output, lse, scale):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, attn_mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, attn_mask, *output)


def _backward(ctx, grad_output, grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, attn_mask, output, lse = ctx.saved_tensors
    grads = attend_backward(grad_output, grad_lse, query, key, value, attn_mask, output, lse, ctx.scale)
    return *grads, None, None


attend.register_autograd(_backward, setup_context=_save)


# ---- heads-first pieces, shared with the windowed op ----


def attend_heads(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`[B, H, Sq, D]`, `[B, H, Sk, D]`, `[B, H, Sk, Dv]` to `[B, H, Sq, Dv]` and the log-sum-exp `[B, H, Sq]`.

    Every query must see a key.
    """
    if query.device.type == "cpu":
        return _attend_flash(query, key, value, attn_mask, scale)
    return _attend_chunks(query, key, value, attn_mask, scale)


def clear_empty(output: Tensor, lse: Tensor, attn_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros and `-inf` for queries without a visible key: what the kernels leave there changes between versions."""
    empty = (attn_mask == float("-inf")).all(-1)
    return output.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, float("-inf"))


def _attend_flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    width, width_v = query.shape[-1], value.shape[-1]
    if width != width_v:  # the kernel wants one head dim; zero channels change neither logits nor outputs
        wide = max(width, width_v)
        query, key, value = (torch.nn.functional.pad(x, (0, wide - x.shape[-1])) for x in (query, key, value))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=attn_mask, scale=scale
    )
    return output[..., :width_v], lse


def _attend_chunks(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    wide = accumulator(query.dtype)
    output = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=wide)
    for rows in _query_chunks(query, key):
        logits = _logits(query, key, attn_mask, scale, rows)
        chunk_lse = logits.logsumexp(-1)
        weights = (logits - finite(chunk_lse).unsqueeze(-1)).exp()
        output[:, :, rows] = (weights @ value.to(wide)).to(query.dtype)
        lse[:, :, rows] = chunk_lse
    return output, lse


def attend_heads_backward(
    grad_output: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_heads` in the accumulation dtype; `delta` comes from `lse_delta`."""
    wide = accumulator(query.dtype)
    key, value = key.to(wide), value.to(wide)
    grad_q = torch.empty_like(query, dtype=wide, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (key, value))
    for rows in _query_chunks(query, key):
        weights = (_logits(query, key, attn_mask, scale, rows) - finite(lse[:, :, rows]).unsqueeze(-1)).exp()
        chunk_grad = grad_output[:, :, rows].to(wide)
        grad_v += weights.transpose(-1, -2) @ chunk_grad
        grad_logits = weights * (chunk_grad @ value.transpose(-1, -2) - delta[:, :, rows].unsqueeze(-1))
        grad_q[:, :, rows] = grad_logits @ key * scale
        grad_k += grad_logits.transpose(-1, -2) @ query[:, :, rows].to(wide) * scale
    return grad_q, grad_k, grad_v


def lse_delta(grad_output: Tensor, grad_lse: Tensor, output: Tensor) -> Tensor:
    """What the softmax gradient subtracts per query: `rowsum(dO * O) - dLSE`, in the accumulation dtype."""
    wide = accumulator(output.dtype)
    return (grad_output.to(wide) * output.to(wide)).sum(-1) - grad_lse.to(wide)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, sums and log-sum-exp: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def heads_first(x: Tensor, heads_kv: int) -> Tensor:
    """`[B, S, H, D]` to `[B, Hkv, S * H / Hkv, D]`: the query heads of a group become queries of its key head."""
    b, s, heads, d = x.shape
    if heads == heads_kv:
        return x.transpose(1, 2)
    group = heads // heads_kv
    return x.view(b, s, heads_kv, group, d).transpose(1, 2).reshape(b, heads_kv, s * group, d)


def heads_last(x: Tensor, heads: int) -> Tensor:
    """The inverse of `heads_first`."""
    b, heads_kv, rows, d = x.shape
    group = heads // heads_kv
    queries = rows // group
    return x.unflatten(2, (queries, group)).transpose(1, 2).reshape(b, queries, heads, d)


def fold_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A 4-D additive mask for the folded queries of `heads_first`."""
    if attn_mask is None:
        return None
    group = query.shape[2] // key.shape[2]
    mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if group > 1 and mask.shape[1] > 1:  # one mask per query head
        mask = mask.expand(-1, -1, query.shape[1], -1).unflatten(1, (key.shape[2], group))
        return mask.transpose(2, 3).flatten(2, 3)
    return mask.repeat_interleave(group, dim=2) if group > 1 and mask.shape[2] > 1 else mask


def _query_chunks(query: Tensor, key: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    return [slice(start, min(start + step, query.shape[2])) for start in range(0, query.shape[2], step)]


def _logits(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float, rows: slice) -> Tensor:
    wide = accumulator(query.dtype)
    logits = (query[:, :, rows].to(wide) * scale) @ key.to(wide).transpose(-1, -2)
    if attn_mask is None:
        return logits
    return logits + (attn_mask[:, :, rows] if attn_mask.shape[2] > 1 else attn_mask)


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """`x.logsumexp(dim)` whose gradient is zero, not NaN, where everything along `dim` is `-inf`."""
    top = finite(x.detach().amax(dim, keepdim=True))
    total = (x - top).exp().sum(dim)
    empty = total == 0
    return (top.squeeze(dim) + total.masked_fill(empty, 1.0).log()).masked_fill(empty, float("-inf"))


def finite(lse: Tensor) -> Tensor:
    """The log-sum-exp with 0 where a query has no keys: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def refuse_forward_mode(backend: str, *tensors: Tensor) -> None:
    """Custom ops have no forward-mode derivative, and torch would take zero for it without a word."""
    if backend == "dense" or torch.compiler.is_compiling():
        return
    if any(unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"backend={backend!r} has no forward-mode derivative: use backend='dense'")
