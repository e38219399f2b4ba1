"""Maps of where a UNet's image looks at which token, with gradient, without touching its processors.

Queries and keys are what the projections `to_q` and `to_k` give: hooks on them see all that attention needs, whichever
processor or backend goes on to use it. Softmax over the prompt's tokens is computed anew from them, for wanted layers
only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.patching.cell import in_backward
from vision_attn.patching.hooks import bind, forward_arguments
from vision_attn.patching.layouts.unet import downsampling


class _Stop(Exception):
    """Raised inside a forward whose maps are complete."""


class AttentionCapture:
    """Cross-attention maps of the forwards inside a `with` block.

    With gradient checkpointing the gradient is to be taken inside of the block, too.

    Args:
        model: A UNet of SD 1, SD 2 or SDXL.
        layers: Globs on names of cross-attention modules; None for all of the resolution.
        resolution: Rows and columns of the maps; None for those of `layers`, or without these for a quarter of the
            sample's: 16x16 for SD at 512 px, 32x32 for SDXL at 1024 px.
        tokens: Positions of each concept's tokens, as `token_groups` gives them; None where only `probabilities` are
            wanted.
        stop: Whether a forward ends after the last wanted layer and gives None. The gradient of the maps is the same;
            what comes after them is not computed.

    Attributes:
        names: The layers whose maps were taken in the last forward.

    Raises:
        ValueError: at once, no such layers; at the forward, no layer or several resolutions, a mask of the text.
        NotImplementedError: at once, attention whose scores are not those of its projections.

    Example:
        >>> import diffusers
        >>> unet = diffusers.UNet2DConditionModel(
        ...     block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        ...     attention_head_dim=2, down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        ...     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"))
        >>> with AttentionCapture(unet, tokens=[[2], [4, 5]], stop=True) as capture:
        ...     unet(torch.randn(1, 4, 16, 24), 1, torch.randn(1, 7, 16))
        >>> capture.maps.shape
        torch.Size([1, 2, 4, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Sequence[str] | None = None,
        resolution: tuple[int, int] | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
        stop: bool = False,
    ) -> None:
        self.model, self.resolution, self.tokens, self.stop = model, resolution, tokens, stop
        self.names: list[str] = []
        self._chosen = layers is not None
        self._modules = _cross_attention(model, layers)
        self._arguments = forward_arguments(model)
        self._sum: Tensor | None = None
        self._grid: tuple[int, int] = (0, 0)
        self._queries: dict[str, Tensor] = {}
        self._waiting: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> AttentionCapture:
        stack = self._stack = contextlib.ExitStack()
        stack.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        for name, part in self._modules.items():
            stack.callback(part.to_q.register_forward_hook(partial(self._take_query, name)).remove)
            stack.callback(part.to_k.register_forward_hook(partial(self._take_key, name)).remove)
        if self.stop:
            stack.enter_context(_stopping(self.model))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        self._queries.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = bind(*self._arguments, args, kwargs)
        if call.get("encoder_attention_mask") is not None:
            raise ValueError("AttentionCapture: encoder_attention_mask must be None, its maps would be of other scores")
        rows, columns = call["sample"].shape[-2:]
        grids = {name: _halved((rows, columns), downsampling(self.model, name)) for name in self._modules}
        self._grid = self._wanted_grid(grids, _halved((rows, columns), 4))
        self.names = [name for name, grid in grids.items() if grid == self._grid]
        self._waiting, self._sum = set(self.names), None

    def _wanted_grid(self, grids: dict[str, tuple[int, int]], quarter: tuple[int, int]) -> tuple[int, int]:
        there = sorted(set(grids.values()))
        if self.resolution is None and self._chosen and len(there) == 1:
            return there[0]
        wanted = quarter if self.resolution is None else (self.resolution[0], self.resolution[1])
        if wanted not in there or (self.resolution is None and self._chosen):
            raise ValueError(
                f"AttentionCapture: resolution must be one of {there} for this sample, got {self.resolution}"
            )
        return wanted

    def _take_query(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._wants(name):
            self._queries[name] = output

    def _take_key(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if not self._wants(name):
            return
        probabilities = _probabilities(self._modules[name], self._queries.pop(name), output)
        if in_backward():  # a checkpoint, which saves again what it saved in the forward
            return
        self._waiting.remove(name)
        self._sum = probabilities if self._sum is None else self._sum + probabilities
        if self.stop and not self._waiting:
            raise _Stop

    def _wants(self, name: str) -> bool:
        return name in (self.names if in_backward() else self._waiting)

    @property
    def probabilities(self) -> Tensor:
        """`[B, Y, X, T]`, the mean over heads and layers of the last forward."""
        if self._sum is None:
            raise ValueError("AttentionCapture: a forward must have run inside of the block, none has")
        return (self._sum / len(self.names)).unflatten(1, self._grid)

    @property
    def maps(self) -> Tensor:
        """`[B, n, Y, X]`: the mean over each concept's tokens."""
        if self.tokens is None:
            raise ValueError("AttentionCapture: tokens must be given for maps, got None: use probabilities")
        probabilities = self.probabilities
        last = probabilities.shape[-1] - 1
        for group in self.tokens:
            if not group or not all(0 <= token <= last for token in group):
                raise ValueError(f"AttentionCapture: tokens must hold positions from 0 to {last}, got {list(group)}")
        return torch.stack([probabilities[..., list(group)].mean(-1) for group in self.tokens], 1)


def _cross_attention(model: nn.Module, layers: str | Sequence[str] | None) -> dict[str, Any]:
    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    there = {name: part for name, part in model.named_modules() if name.endswith("attn2") and hasattr(part, "to_k")}
    chosen = {name: part for name, part in there.items() if any(fnmatchcase(name, glob) for glob in patterns)}
    if not chosen:
        some = ", ".join(map(repr, list(there)[:3])) or "none"
        raise ValueError(f"AttentionCapture: layers must name cross-attention, got {layers!r}: there are {some}")
    for name, part in chosen.items():
        normed = part.norm_q is not None or part.norm_k is not None
        if normed or getattr(part, "fused_projections", False):
            given = "norms of queries and keys" if normed else "fused projections"
            raise NotImplementedError(
                f"AttentionCapture: cross-attention must have plain projections, got {given} in {name!r}"
            )
    return chosen


def _probabilities(attention: Any, query: Tensor, key: Tensor) -> Tensor:
    """`[B, S, T]`, mean over heads, in float32 or above."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = (x.to(wide).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (query, key))
    return (attention.scale * q @ k.transpose(-1, -2)).softmax(-1).mean(1)


def _halved(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """A map after as many halvings, each rounded up."""
    return -(-size[0] // factor), -(-size[1] // factor)


@contextlib.contextmanager
def _stopping(model: nn.Module) -> Iterator[None]:
    """Have a forward of the model that raises `_Stop` give None."""
    forward, own = model.forward, model.__dict__.get("forward")

    def stopping(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except _Stop:
            return None

    model.__dict__["forward"] = stopping
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own
