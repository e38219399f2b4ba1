"""How much of a model's time is attention, measured at the attention calls themselves."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.benchmark.timing import synchronize


class AttentionClock:
    """Counts and times attention calls of one or more models while `watch` is open.

    Two kinds of calls are counted: `torch.nn.functional.scaled_dot_product_attention`, which stock processors end in,
    and the operator that a patch has put in its place. An operator that calls the former is counted once. Projections,
    normalisation and rotary embedding are not attention here.

    Args:
        model: Only calls made during its `forward` count, so text encoders and decoders do not; a sequence of models
            for a pipeline that denoises with more than one.
        device: Waited for before and after each call: the clock slows a GPU down, hence not for latency.

    Attributes:
        seconds: Time inside attention calls.
        calls: Number of attention calls.
        flops: Floating point operations of those calls: the operator's own `cost`, and `2 S_q S_k (D + Dv)` per head
            for dense calls; None as soon as an operator does not know its cost.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], device: torch.device | str = "cpu") -> None:
        self.models = (model,) if isinstance(model, nn.Module) else tuple(model)
        self.device = device
        self.seconds = 0.0
        self.calls = 0
        self.flops: int | None = 0
        self._forward_depth = 0
        self._call_depth = 0

    @contextlib.contextmanager
    def watch(self, operator: Any = None) -> Iterator[AttentionClock]:
        """Time attention inside the block.

        Args:
            operator: The operator object that attention is patched with, if any. Its class is wrapped for the length
                of the block, so that the patch sees the very same object as without the clock.
        """
        handles = [model.register_forward_pre_hook(self._enter_model) for model in self.models]
        handles += [model.register_forward_hook(self._leave_model, always_call=True) for model in self.models]
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_replaced(F, "scaled_dot_product_attention", self._timed, _dense_flops))
                if operator is not None:
                    stack.enter_context(_replaced(type(operator), "__call__", self._timed, _operator_flops))
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _timed(self, attention: Callable[..., Any], flops: Callable[..., int | None]) -> Callable[..., Any]:
        @functools.wraps(attention)
        def timed_attention(*args: Any, **kwargs: Any) -> Any:
            if self._forward_depth == 0 or self._call_depth > 0:
                return attention(*args, **kwargs)
            self._call_depth += 1
            synchronize(self.device)
            start = time.perf_counter()
            try:
                result = attention(*args, **kwargs)
                synchronize(self.device)
            finally:
                self._call_depth -= 1
            self.seconds += time.perf_counter() - start
            self.calls += 1
            spent = flops(*args, **kwargs)
            self.flops = None if self.flops is None or spent is None else self.flops + spent
            return result

        return timed_attention

    def _enter_model(self, module: nn.Module, args: Any) -> None:
        self._forward_depth += 1

    def _leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._forward_depth -= 1


def _dense_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    """`[..., H, S, D]` as in `scaled_dot_product_attention`."""
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _operator_flops(
    operator: Any, query: Tensor, key: Tensor, value: Tensor, /, layout: Any, **rest: Any
) -> int | None:
    """`[B, S, H, D]`, as operator objects take it; their `cost` is optional."""
    batch, _, heads, head_dim = query.shape
    cost_of = getattr(operator, "cost", None)
    cost = None if cost_of is None else cost_of(layout, heads, head_dim)
    return None if cost is None else batch * int(cost.flops)


@contextlib.contextmanager
def _replaced(
    owner: Any, name: str, wrap: Callable[..., Callable[..., Any]], flops: Callable[..., int | None]
) -> Iterator[None]:
    """Put `wrap(owner.name)` in its place inside the block; an inherited attribute is inherited again after."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, wrap(before, flops))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
