"""Dense attention with a differentiable bias as a custom op over Triton kernels, and agent attention made of two of it.

`softmax(query_scale * Q A^T + query_bias) · softmax(scale * A K^T + agent_bias) · V` (arXiv 2312.08874, equation 5):
agents first collect from all keys, then every query reads the agents. No logits exist in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .biased_kernels import _biased_backward_dkv_kernel, _biased_backward_dq_kernel, _biased_forward_kernel
from .launch import LaunchConfig, architecture_of, choose, cut, launch_options
from .tensors import (
    NAMESPACE,
    delta_of,
    empty_like,
    head_constants,
    on_device,
    per_query_head,
    pointer,
    power_of_two,
    strides,
    sum_groups,
    unit_rows,
)

# Programs that a GPU should have per multiprocessor before a loop is not split further.
_PROGRAMS_PER_MULTIPROCESSOR = 2


def agent(
    query: Tensor, key: Tensor, value: Tensor, agents: Tensor, agent_bias: Tensor | None, query_bias: Tensor | None,
    scale: float, query_scale: float,
) -> Tensor:  # fmt: skip
    """Agent attention of `[B, S, H, D]` tensors with `[B, n, H, D]` agents; biases and limits as for `biased`."""
    collected, _ = biased(agents, key, value, agent_bias, scale)
    return biased(query, agents, collected, query_bias, query_scale)[0]


@torch.library.custom_op(f"{NAMESPACE}::biased", mutates_args=())
def biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query over every key with a bias on the logits.

    Args:
        query: `[B, Sq, H, D]`, float16, bfloat16 or float32, D up to 256.
        key: `[B, Sk, Hkv, D]`, at least one token.
        value: `[B, Sk, Hkv, Dv]`.
        bias: Broadcastable to `[B, H, Sq, Sk]`; `-inf` hides a pair. None for none.
        scale: Factor on the logits.

    Returns:
        Output `[B, Sq, H, Dv]` in the query's dtype and natural log-sum-exp `[B, Sq, H]` in float32.
    """
    return forward(Call(query, key, value, bias, scale))


@biased.register_fake
def _(query, key, value, bias, scale):  # type: ignore[no-untyped-def]
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::biased_backward", mutates_args=())
def biased_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    bias_gradient: bool,
) -> list[Tensor]:
    """Gradients of `biased` for query, key, value and, if asked for, the bias."""
    return backward(Call(query, key, value, bias, scale), output, lse, grad_output, grad_lse, bias_gradient)


@biased_backward.register_fake
def _(grad_output, grad_lse, query, key, value, bias, output, lse, scale, bias_gradient):  # type: ignore[no-untyped-def]
    return [empty_like(x) for x in (query, key, value, *([bias] if bias_gradient else []))]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, bias, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, bias, *output)


def _backward(ctx, grad_output, grad_lse):  # type: ignore[no-untyped-def]
    bias_gradient = ctx.needs_input_grad[3]
    grads = biased_backward(grad_output, grad_lse, *ctx.saved_tensors, ctx.scale, bias_gradient)
    return *grads[:3], grads[3] if bias_gradient else None, None


biased.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class Call:
    """The arguments of `biased`."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scale: float

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def full_bias(self) -> tuple[Tensor | None, tuple[int, ...]]:
        """The bias in place, and its strides for `[B, H, Sq, Sk]`."""
        if self.bias is None:
            return None, (0, 0, 0, 0)
        shape = self.query.shape[0], self.query.shape[2], self.query.shape[1], self.key.shape[1]
        return self.bias, self.bias.expand(shape).stride()

    def config(self, kernel: str) -> LaunchConfig:
        """The launch of a kernel on this device."""
        head_dim = max(self.query.shape[3], self.value.shape[3])
        config = choose(kernel, head_dim, self.query.dtype, architecture_of(self.query.device))
        return cut(config, kernel, power_of_two(self.query.shape[1]), power_of_two(self.key.shape[1]))


def splits_for(device: torch.device, programs: int, steps: int) -> int:
    """Into how many parts to cut a loop of `steps` so that a GPU's multiprocessors all have programs."""
    if device.type != "cuda":
        return 1
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(steps, wanted // max(programs, 1)))


def forward(call: Call, config: LaunchConfig | None = None, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """`biased` with a chosen launch and number of splits of the keys; None takes those of this device."""
    query, key, value = (unit_rows(x) for x in (call.query, call.key, call.value))
    batch, queries, heads, _ = query.shape
    config = config or call.config("biased_forward")
    programs = batch * heads * -(-queries // config.q_tokens)
    splits = splits or splits_for(query.device, programs, -(-key.shape[1] // config.kv_tokens))
    dtype = query.dtype if splits == 1 else torch.float32
    outputs = query.new_empty(splits, batch, queries, heads, value.shape[3], dtype=dtype)
    lses = query.new_empty(splits, batch, queries, heads, dtype=torch.float32)
    bias, bias_strides = call.full_bias
    if programs:
        with on_device(query):
            _biased_forward_kernel[(programs * splits,)](
                query, key, value, pointer(bias, query), outputs, lses,
                strides(query), strides(key), strides(value), bias_strides, _split_strides(outputs),
                _split_strides(lses), heads, call.groups, call.scale, queries, key.shape[1], splits,
                HAS_BIAS=bias is not None, **_constants(config, key, value),
            )  # fmt: skip
    if splits == 1:
        return outputs[0], lses[0]
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == float("-inf"), 0)).exp().unsqueeze(-1)
    return (weights * outputs).sum(0).to(query.dtype), lse


def backward(
    call: Call,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    bias_gradient: bool,
    configs: tuple[LaunchConfig, LaunchConfig] | None = None,
    splits: tuple[int, int] | None = None,
) -> list[Tensor]:
    """`biased_backward` with chosen launches and splits, for dQ (of the keys) and for dK and dV (of the queries)."""
    query, key, value = (unit_rows(x) for x in (call.query, call.key, call.value))
    grad_output = unit_rows(grad_output)
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    config_dq, config_dkv = configs or (call.config("biased_backward_dq"), call.config("biased_backward_dkv"))
    programs_dq = batch * heads * -(-queries // config_dq.q_tokens)
    programs_dkv = batch * heads * -(-keys // config_dkv.kv_tokens)
    splits_dq, splits_dkv = splits or (
        splits_for(query.device, programs_dq, -(-keys // config_dq.kv_tokens)),
        splits_for(query.device, programs_dkv, -(-queries // config_dkv.q_tokens)),
    )
    grads_q = per_query_head(query, query, splits_dq)
    grads_k, grads_v = (per_query_head(x, query, splits_dkv) for x in (key, value))
    bias, bias_strides = call.full_bias
    grad_bias = query.new_empty(batch, heads, queries, keys, dtype=torch.float32) if bias_gradient else None
    if programs_dq == 0:
        leaves = (query, key, value, call.bias) if bias_gradient else (query, key, value)
        return [empty_like(x).zero_() for x in leaves if x is not None]
    delta = delta_of(output, grad_output, grad_lse, lse)
    shared = query, key, value, pointer(bias, query), grad_output, lse, delta
    moves = strides(query), strides(key), strides(value), bias_strides, strides(grad_output), lse.stride()
    with on_device(query):
        _biased_backward_dq_kernel[(programs_dq * splits_dq,)](
            *shared, grads_q, pointer(grad_bias, query),
            *moves, _split_strides(grads_q), (0, 0, 0, 0) if grad_bias is None else grad_bias.stride(),
            heads, call.groups, call.scale, queries, keys, splits_dq,
            HAS_BIAS=bias is not None, BIAS_GRAD=bias_gradient, **_constants(config_dq, key, value),
        )  # fmt: skip
        _biased_backward_dkv_kernel[(programs_dkv * splits_dkv,)](
            *shared, grads_k, grads_v,
            *moves, _split_strides(grads_k), _split_strides(grads_v),
            heads, call.groups, call.scale, queries, keys, splits_dkv,
            HAS_BIAS=bias is not None, **_constants(config_dkv, key, value),
        )  # fmt: skip
    pairs = (grads_q, query), (grads_k, key), (grads_v, value)
    grads = [sum_groups(parts[0] if len(parts) == 1 else parts.sum(0), like) for parts, like in pairs]
    if grad_bias is None or call.bias is None:
        return grads
    return [*grads, grad_bias.sum_to_size(call.bias.shape).to(call.bias.dtype).contiguous()]


def _split_strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of batch, token, head and split."""
    return x.stride(1), x.stride(2), x.stride(3), x.stride(0)


def _constants(config: LaunchConfig, key: Tensor, value: Tensor) -> dict[str, Any]:
    tiles = {"BLOCK_Q": config.q_tokens, "BLOCK_K": config.kv_tokens}
    return tiles | launch_options(config) | head_constants(key, value)
