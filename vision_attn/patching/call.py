"""One attention call of a patched layer: to the operator when its tokens match the layout, densely otherwise.

The decision, in order:

1. No forward of the model is running, so that no layout is known: dense and listed, or an error with `strict`.
2. The operators are switched off in this denoising step, a guider perturbs this layer's attention, or the layer's map
   is too coarse for the operator of this step: dense.
3. The layout does not describe the call's tokens: dense and listed. This is how cross-attention passes. A layer whose
   self-attention calls in a whole forward all have another length than its layout says is an error with `strict`.
4. The operator cannot honour the call (mask, causal, dropout): where only the mask is in the way and the operator is a
   masked softmax, it becomes a mask on dense attention, and the call is listed with that reason; else the call is dense
   and listed, or an error with `strict`.
5. Otherwise the operator runs, on heads-last tensors that all have the layout's full length and as many heads.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vision_attn.errors import PatchError, UnsupportedError
from vision_attn.layout import TokenLayout
from vision_attn.patching.cell import CLOSED, in_backward
from vision_attn.patching.masked import masked_softmax
from vision_attn.patching.stages import due, too_coarse


class Attention(NamedTuple):
    """The arguments of one attention call, bound by name.

    Attributes:
        query: `[B, S_q, Hq, D]`.
        key: `[B, S_k, Hk, D]`.
        value: `[B, S_k, Hk, Dv]`.
        attn_mask: SDPA-style mask, a BlockMask, or `None`.
        dropout_p: Dropout probability.
        is_causal: Whether the call is causal.
        scale: Factor on the scores, `None` = `1/sqrt(D)`.
        unknown: Names of further arguments that are set.
        parallel_config: Not `None` under context parallelism.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: Any
    dropout_p: float
    is_causal: bool
    scale: float | None
    unknown: Sequence[str] = ()
    parallel_config: Any = None


def attend(operator: Any, layer: Any, call: Attention, dense: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Compute one attention call of `layer` by `operator` or by `dense()`.

    Args:
        operator: The operator object of the layer.
        layer: The `Layer` that is running.
        call: Its arguments.
        dense: The call upstream would have made, `[B, S_q, Hq, Dv]`.

    Raises:
        PatchError: Context parallelism; an operator that returns something else than attention; with `layer.strict`, a
            call that should go to the operator and cannot.
    """
    if call.parallel_config is not None:
        raise PatchError(
            f"patch: context parallelism must be off for a patched layer, got parallel_config on {layer.name!r}: "
            "remove the patch, or run without enable_parallelism()"
        )
    operator = due(operator, layer.switch.stage)
    recomputes = in_backward()
    if recomputes:
        _check_recomputation(layer)
    elif not layer.switch.open and not torch.compiler.is_compiling():
        _note_outside(layer)
        return dense()
    if layer.observers:
        _show(layer, call)
    if not layer.switch.active:
        layer.note("dense", layer.switch.reason, None)
        return dense()
    if _scores_are_skipped():
        layer.note("dense", "a guider skips the attention scores", None)
        layer.served = True
        return dense()
    coarse = too_coarse(operator, layer.size)
    if coarse:
        layer.note("dense", coarse, None)
        layer.served = True
        return dense()
    queries, keys = call.query.shape[1], call.key.shape[1]
    layout, problem = match(layer, queries, keys)
    if layout is None:
        self_attention = queries == keys
        if self_attention and recomputes:
            raise PatchError(
                f"patch: {layer.name!r} must be recomputed with the tokens of its forward, {problem}: with gradient "
                "checkpointing, call backward before the next forward"
            )
        layer.note_unmatched(problem, self_attention)
        return dense()
    if is_dense(operator):
        layer.note("operator", "", layout)
        return dense()
    problem = _obstacle(call)
    if not problem:
        try:
            output = _operate(operator, layer, layout, call)
        except UnsupportedError as error:
            problem = str(error)
        else:
            layer.note("operator", "", layout)
            return output
        masked = None if layer.initial else masked_softmax(operator, layout, call.attn_mask)
        if masked is not None:
            output = _operate(masked, layer, layout, call)
            layer.note("operator", f"{AS_MASK}: {problem}", layout)
            return output
    if layer.strict:
        raise PatchError(f"patch: {operator} cannot honour the call of {layer.name!r}: {problem}: {_FIX}")
    layer.note("dense", problem, layout)
    return dense()


AS_MASK = "as a mask on dense attention, exact but no faster"
_FIX = "leave the layer out with layers=, or pass strict=False to compute such calls densely (Patch.calls lists them)"


def _show(layer: Any, call: Attention) -> None:
    """Let observers see a call that the layout describes, whatever computes it."""
    layout, _ = match(layer, call.query.shape[1], call.key.shape[1])
    if layout is not None:
        for observe in list(layer.observers):
            observe(call, layout)


def _note_outside(layer: Any) -> None:
    if layer.strict:
        raise PatchError(
            f"patch: {layer.name!r} must run in a forward of its model, got a call while {CLOSED}: call model(...), as "
            "model.forward(...) and calls of single blocks do not tell the token grid, or pass strict=False"
        )
    layer.note("dense", CLOSED, None)


def _check_recomputation(layer: Any) -> None:
    """The layout of recomputed layers is that of the last forward with checkpoints."""
    cell = layer.cell
    cell.awaits_backward = False
    if cell.ambiguous:
        grid = None if cell.recomputed is None else cell.recomputed.grid
        raise PatchError(
            f"patch: {layer.name!r} must be recomputed with the token grid and the operator of its forward, got "
            f"forwards of several grids or steps before it, the last {grid}: with gradient checkpointing, call "
            "backward before the next forward"
        )


def _scores_are_skipped() -> bool:
    """Whether perturbed-attention guidance is about to replace what stock attention gives by its values."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in modes)


def match(layer: Any, queries: int, keys: int) -> tuple[TokenLayout | None, str]:
    """The layout of a call with so many query and key tokens, or `None` and why it has none."""
    cell = layer.cell
    layout = cell.layout
    if layout is None:
        return None, cell.reason
    if layer.image_only:
        layout = TokenLayout(layout.grid)
    if cell.open_before or cell.open_after:
        layout = _opened(layout, cell.open_before, keys)
        fits = queries == keys == layout.tokens  # keys of any length fit: image queries may well attend to text alone
    else:
        fits = keys == layout.tokens and (queries == keys or queries == layout.image_tokens)
    if fits:
        return layout, ""
    return None, (
        f"got {queries} query and {keys} key tokens where the layout has {layout.tokens} "
        f"({layout.text_before} before, grid {layout.grid}, {layout.text_after} after)"
    )


def _opened(layout: TokenLayout, before: bool, keys: int) -> TokenLayout:
    """The layout with as many tokens on its open side as the call has."""
    if before:
        rest = keys - layout.image_tokens - layout.text_after
        return dataclasses.replace(layout, text_before=rest) if rest >= 0 else layout
    rest = keys - layout.image_tokens - layout.text_before
    return dataclasses.replace(layout, text_after=rest) if rest >= 0 else layout


def _obstacle(call: Attention) -> str:
    """What no operator can honour; empty when there is nothing."""
    if call.is_causal:
        return "is_causal=True"
    if call.dropout_p:
        return f"dropout_p={call.dropout_p}"
    if call.unknown:
        return f"argument {call.unknown[0]!r} is not known to operators"
    return ""


def is_dense(operator: Any) -> bool:
    """Whether the operator is `Dense`."""
    # Dense is what the model does anyway: upstream's own call, with its masks and its backend, bit for bit.
    return getattr(operator, "operator_name", None) == "dense"


def _operate(operator: Any, layer: Any, layout: TokenLayout, call: Attention) -> torch.Tensor:
    """Call the operator on tensors that all have the layout's tokens and the query's heads."""
    query, key, value, attn_mask = call.query, call.key, call.value, call.attn_mask
    image_queries = query.shape[1] != layout.tokens
    options: dict[str, Any] = layer.options(operator, query)
    if attn_mask is not None:
        attn_mask = _honourable_mask(operator, attn_mask)
    if attn_mask is not None:
        options["attn_mask"] = _pad_mask(attn_mask, layout) if image_queries else attn_mask
    if image_queries:
        query = _pad_queries(query, layout)
    if key.shape[2] != query.shape[2]:
        groups = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    output = operator(query, key, value, layout, scale=call.scale, **options)
    check_output(operator, layer.name, output, query, value)
    return output[:, layout.image_slice] if image_queries else output


def check_output(operator: Any, name: str, output: Any, query: torch.Tensor, value: torch.Tensor) -> None:
    """Check what an operator returned for the layer `name`.

    Raises:
        PatchError: No tensor, or one of another shape or dtype than attention has.
    """
    shape, dtype = (*query.shape[:3], value.shape[3]), query.dtype
    if not isinstance(output, torch.Tensor):
        got = f"a {type(output).__name__}"
    elif tuple(output.shape) != shape:
        got = f"{tuple(output.shape)}"
    elif output.dtype != dtype and not torch.is_autocast_enabled(query.device.type):  # autocast chooses dtypes itself
        got = f"{output.dtype}"
    else:
        return
    raise PatchError(
        f"patch: {operator} must return a tensor of shape {shape} and dtype {dtype} for {name!r}, got {got}: mend its "
        "__call__"
    )


def _honourable_mask(operator: Any, attn_mask: Any) -> torch.Tensor | None:
    """The mask to pass on; `None` for one that hides nothing."""
    if not isinstance(attn_mask, torch.Tensor):
        raise UnsupportedError(f"attn_mask of type {type(attn_mask).__name__}")
    attn_mask = _unexpanded(attn_mask)
    if accepts_mask(type(operator)):
        return attn_mask
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            f"attn_mask of shape {tuple(attn_mask.shape)} needs a gradient, and the operator takes none"
        )
    if not torch.compiler.is_compiling() and hides_nothing(attn_mask):
        return None
    raise UnsupportedError(f"attn_mask of shape {tuple(attn_mask.shape)}, and the operator takes none")


def _unexpanded(attn_mask: torch.Tensor) -> torch.Tensor:
    """One row of a mask that was expanded over heads or queries: operators then see that it is the same for all."""
    for axis in range(attn_mask.ndim - 1):
        if attn_mask.stride(axis) == 0:
            attn_mask = attn_mask.narrow(axis, 0, 1)
    return attn_mask


def accepts_mask(operator_class: Any) -> bool:
    """Whether the operator's `__call__` names `attn_mask`."""
    return "attn_mask" in inspect.signature(operator_class.__call__).parameters


def hides_nothing(attn_mask: torch.Tensor) -> bool:
    """Whether every key is visible to every query and unbiased (reads the mask: one synchronisation on a GPU)."""
    return bool(attn_mask.all()) if attn_mask.dtype == torch.bool else not bool(attn_mask.any())


def _pad_queries(query: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Zero queries for the text tokens of a call whose queries are the image tokens only."""
    return torch.nn.functional.pad(query, (0, 0, 0, 0, layout.text_before, layout.text_after))


def _pad_mask(attn_mask: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Rows that see everything for the padded queries."""
    if attn_mask.ndim < 2 or attn_mask.shape[-2] == 1:
        return attn_mask
    visible = True if attn_mask.dtype == torch.bool else 0.0
    return torch.nn.functional.pad(attn_mask, (0, 0, layout.text_before, layout.text_after), value=visible)
