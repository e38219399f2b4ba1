"""Maps of where a model's image looks at which token, with gradient, of forwards that compute what they always do.

Softmax over the prompt's tokens is computed anew from queries and keys, for wanted layers only: whichever kernel the
layers use, none of them gives probabilities.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.guidance.text_attention import text_attention
from vision_attn.patching.cell import in_backward
from vision_attn.patching.hooks import bind, forward_arguments


class _Stop(Exception):
    """Raised inside a forward whose maps are complete."""


class AttentionCapture:
    """Maps of the image's attention to its text, of the forwards inside a `with` block.

    A UNet has cross-attention. In the joint attention of SD3 and FLUX most of a pixel's attention goes to other pixels;
    the maps are of its text tokens alone, so that a pixel's attention to all of them is 1. Text of SD3 is that of CLIP,
    77 tokens, and then that of T5.

    With gradient checkpointing the gradient is to be taken inside of the block, too. Compiled code, which may not know
    of hooks, rests inside of the block: everything runs eagerly there.

    Args:
        model: A UNet of SD 1, SD 2 or SDXL, or a transformer of SD3 or FLUX.
        layers: Globs on names of attention modules. None: of a UNet all of the resolution, of a transformer all, the
            single blocks of FLUX among them.
        resolution: Rows and columns of the maps; None for those of `layers`, or without these for a quarter of the
            sample's: 16x16 for SD at 512 px, 32x32 for SDXL at 1024 px. A transformer has its token grid only.
        tokens: Positions of each concept's tokens, as `token_groups` gives them; None where only `probabilities` are
            wanted.
        text: Positions that share a pixel's attention, one list per sample, the others get none; None for all.
            Without BOS and padding, which take most of the attention and mean nothing, maps are of the words.
        stop: Whether a forward ends after the last wanted layer and gives None. The gradient of the maps is the same;
            what comes after them is not computed.

    Attributes:
        names: The layers whose maps were taken in the last forward.

    Raises:
        TypeError: no model.
        ValueError: at once, no such layers, a resolution or positions of another form; at the forward, no layer or
            several resolutions, a mask of the text, positions that the text does not have.
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
        text: Sequence[Sequence[int]] | None = None,
        stop: bool = False,
    ) -> None:
        _check(model, resolution, tokens, text)
        model = getattr(model, "_orig_mod", model)  # of torch.compile, which would be the first part of every name
        self.model, self.resolution, self.tokens, self.text, self.stop = model, resolution, tokens, text, stop
        self.names: list[str] = []
        self._chosen = layers is not None
        self._attention = text_attention(model, layers)
        self._arguments = forward_arguments(model)
        self._sum: Tensor | None = None
        self._grid: tuple[int, int] = (0, 0)
        self._waiting: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> AttentionCapture:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            stack.enter_context(self._attention.watched(self._wants, self._take))
            if self.stop:
                stack.enter_context(_stopping(self.model))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = bind(*self._arguments, args, kwargs)
        grids = self._attention.grids(call)
        self._grid = self._wanted_grid(grids, self._attention.coarsest(call))
        self.names = [name for name, grid in grids.items() if grid == self._grid]
        self._waiting, self._sum = set(self.names), None

    def _wanted_grid(self, grids: dict[str, tuple[int, int]], coarsest: tuple[int, int]) -> tuple[int, int]:
        there = sorted(set(grids.values()))
        if self.resolution is None and self._chosen and len(there) == 1:
            return there[0]
        wanted = coarsest if self.resolution is None else (self.resolution[0], self.resolution[1])
        if wanted not in there or (self.resolution is None and self._chosen):
            raise ValueError(
                f"AttentionCapture: resolution must be one of {there} for this sample, got {self.resolution}"
            )
        return wanted

    def _take(self, name: str, query: Tensor, key: Tensor, scale: float) -> None:
        probabilities = _probabilities(query, key, scale, self.text)
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
        _check_positions("tokens", self.tokens, probabilities.shape[-1])
        return torch.stack([probabilities[..., list(group)].mean(-1) for group in self.tokens], 1)


def _check(model: Any, resolution: Any, tokens: Any, text: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"AttentionCapture: model must be a UNet or a transformer, got {type(model).__name__}: give pipe.unet or "
            "pipe.transformer"
        )
    if resolution is not None and not (isinstance(resolution, Sequence) and len(resolution) == 2):
        raise ValueError(f"AttentionCapture: resolution must be rows and columns such as (16, 16), got {resolution!r}")
    for name, lists in (("tokens", tokens), ("text", text)):
        if lists is not None and not (len(lists) and all(isinstance(own, Sequence) for own in lists)):
            raise ValueError(
                f"AttentionCapture: {name} must be lists of positions such as [[2], [5, 6]], got {lists!r}"
            )


def _probabilities(query: Tensor, key: Tensor, scale: float, text: Sequence[Sequence[int]] | None) -> Tensor:
    """`[B, S, T]`, mean over heads, in float32 or above."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = (tensor.to(wide).transpose(1, 2) for tensor in (query, key))
    if text is None:
        return (scale * q @ k.transpose(-1, -2)).softmax(-1).mean(1)
    _check_positions("text", text, key.shape[1])
    if len(text) != len(key):
        raise ValueError(f"AttentionCapture: text must be one list per sample, {len(key)}, got {len(text)}")
    # Columns are picked before the softmax: of FLUX's 512 text tokens few are words, and maps are kept for backward.
    most = max(map(len, text))
    places = torch.tensor([[*own, *[own[0]] * (most - len(own))] for own in text], device=key.device)
    filled = torch.tensor([[number >= len(own) for number in range(most)] for own in text], device=key.device)
    k = k.gather(2, places[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(filled[:, None, None], -torch.inf)
    shares = scores.softmax(-1).mean(1)
    return shares.new_zeros(*shares.shape[:2], key.shape[1]).scatter_add(2, places[:, None].expand_as(shares), shares)


def _check_positions(name: str, lists: Sequence[Sequence[int]], count: int) -> None:
    for own in lists:
        if not own or not all(0 <= token < count for token in own):
            raise ValueError(f"AttentionCapture: {name} must hold positions from 0 to {count - 1}, got {list(own)}")


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
