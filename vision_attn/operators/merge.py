"""Exact merge of attentions over disjoint key sets by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vision_attn.backends import merge
from vision_attn.operators.arguments import FLOATS


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint key sets.

    `lse = log(sum_p exp(lse_p))`, `out = sum_p exp(lse_p - lse) * out_p`.

    Args:
        outputs: One `[B, S, H, D]` (or `[B, *grid, H, D]`) per key set.
        lses: Their natural log-sum-exp, `[B, S, H]` (or `[B, *grid, H]`); `-inf` where a query saw no key.

    Returns:
        The merged output in the outputs' dtype and the merged log-sum-exp, as `natten.merge_attentions` does.
        Differentiable in everything.

    Raises:
        ValueError: nothing to merge, or shapes and numbers that differ.
        TypeError: not tensors.

    Source: Online softmax (arXiv 1805.02867); FlashAttention (arXiv 2205.14135), section 3.1.

    Example:
        >>> import torch
        >>> out, lse = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2)
        >>> merged, merged_lse = merge_attention([out, out], [lse, lse])
        >>> torch.allclose(merged, out)
        True
    """
    for name, given in (("outputs", outputs), ("lses", lses)):
        if not isinstance(given, Sequence):
            raise TypeError(f"merge_attention: {name} must be a list of tensors, got {type(given).__name__}")
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attention: outputs and lses must be equally many, at least one, got {len(outputs)} and {len(lses)}"
        )
    for name, tensors in (("outputs", outputs), ("lses", lses)):
        for x in tensors:
            if not isinstance(x, Tensor):
                raise TypeError(f"merge_attention: {name} must be tensors, got {type(x).__name__}")
            if x.dtype not in FLOATS:
                raise TypeError(f"merge_attention: {name} must be floating point of 16 to 64 bits, got {x.dtype}")
            if x.shape != tensors[0].shape or x.dtype != tensors[0].dtype:
                expected, found = (f"{tuple(t.shape)} {t.dtype}" for t in (tensors[0], x))
                raise ValueError(f"merge_attention: {name} must all be {expected}, got {found}")
            if x.device != outputs[0].device:
                raise ValueError(f"merge_attention: {name} must all be on {outputs[0].device}, got {x.device}")
    if lses[0].shape != outputs[0].shape[:-1]:
        raise ValueError(
            f"merge_attention: lses must have shape {tuple(outputs[0].shape[:-1])}, got {tuple(lses[0].shape)}"
        )
    return merge(outputs, lses)
