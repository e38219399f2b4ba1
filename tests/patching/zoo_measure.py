"""Where the tokens of a model really are: touch one of them and see which rows of queries and keys move.

For the measurement every attention returns its queries, group norms do nothing, and padded convolutions keep their
centre tap only. Then nothing mixes tokens before or between the attention layers, so that touching one image token
must move exactly one row in each of them.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from zoo_case import Case, Inputs, change

from vision_attn.layout import TokenLayout
from vision_attn.patching.layouts import Family, family_of


@dataclass
class AttentionCall:
    """One attention call: `[B, S, H, D]`, and the layout that its module's family claims (`None`: none for it)."""

    name: str
    query: torch.Tensor
    key: torch.Tensor
    layout: TokenLayout | None

    @property
    def matches(self) -> bool:
        """Whether the call holds the tokens of its layout."""
        layout = self.layout
        return (
            layout is not None
            and self.key.shape[1] == layout.tokens
            and self.query.shape[1] in (layout.tokens, layout.image_tokens)
        )


@dataclass
class Recorder:
    """Records the attention calls of one forward."""

    model: nn.Module
    family: Family
    calls: list[AttentionCall] = field(default_factory=list)
    layouts: dict[str, TokenLayout | None] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)

    def attention(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        name = self.running[-1]
        scope = max((scope for scope in self.layouts if encloses(scope, name)), key=len, default=None)
        layout = None if scope is None else self.layouts[scope]
        if self.family.skip_reason(name) is not None:
            layout = None
        if layout is not None:
            layout = self.family.layout_for(name, layout, key.shape[1])
        self.calls.append(AttentionCall(name, query.detach().clone(), key.detach().clone(), layout))
        return query

    def run(self, inputs: Inputs, touch_scope: Callable[[str, Inputs], None] | None = None) -> list[AttentionCall]:
        """Run the model and return its attention calls in order."""
        self.calls = []
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, module in self.model.named_modules():
                if _is_scope(self.family, name, module):
                    stack.enter_context(self._read_layout(name, module, touch_scope))
                if is_attention(module):
                    stack.enter_context(self._follow(name, module))
            self.model(**inputs)
        return self.calls

    @contextlib.contextmanager
    def _read_layout(self, name: str, module: nn.Module, touch: Any) -> Iterator[None]:
        def read(module: nn.Module, args: Any, kwargs: Any) -> Any:
            call = bound_arguments(module, args, kwargs)
            if touch is not None:
                touch(name, call)
            self.layouts[name] = self.family.layout(module, call)
            if touch is not None:
                variadic = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in (2, 4)]
                return (), {key: value for key, value in call.items() if key not in variadic}
            return None

        handle = module.register_forward_pre_hook(read, with_kwargs=True)
        yield
        handle.remove()

    @contextlib.contextmanager
    def _follow(self, name: str, module: nn.Module) -> Iterator[None]:
        handles = (
            module.register_forward_pre_hook(lambda *_: self.running.append(name)),
            module.register_forward_hook(lambda *_: self.running.pop() and None),
        )
        yield
        for handle in handles:
            handle.remove()


def encloses(scope: str, name: str) -> bool:
    """Whether the module `name` is inside `scope`."""
    return scope == "" or name.startswith(scope + ".")


def _is_scope(family: Family, name: str, module: nn.Module) -> bool:
    return name == "" if family.scope is None else type(module).__name__ in family.scope


def is_attention(module: nn.Module) -> bool:
    """Whether a module makes attention calls through a processor."""
    return getattr(module, "processor", None) is not None


def bound_arguments(module: nn.Module, args: Any, kwargs: Any) -> Inputs:
    """Arguments of a forward by name, defaults applied."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@contextlib.contextmanager
def recording(case: Case) -> Iterator[Recorder]:
    """A recorder on a new model of the case, in which nothing mixes tokens."""
    model = case.build()
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and any(_padding(module)):
            _keep_centre(module)
    recorder = Recorder(model, family_of(model))

    stock_sdpa = nn.functional.scaled_dot_product_attention

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not recorder.running:  # attention pooling of a prompt
            return stock_sdpa(query, key, value, *args, **kwargs)
        return recorder.attention(query.transpose(1, 2), key.transpose(1, 2)).transpose(1, 2)

    def dispatch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return recorder.attention(query, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "group_norm", lambda x, *_, **__: x)
        patch.setattr(nn.functional, "scaled_dot_product_attention", sdpa)
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.models.") and hasattr(module, "dispatch_attention_fn"):
                patch.setattr(module, "dispatch_attention_fn", dispatch)
        yield recorder


def _padding(convolution: Any) -> tuple[int, ...]:
    return (1,) if isinstance(convolution.padding, str) else tuple(convolution.padding)


def _keep_centre(convolution: Any) -> None:
    centre = tuple(size // 2 for size in convolution.kernel_size)
    with torch.no_grad():
        tap = convolution.weight[(slice(None), slice(None), *centre)].clone()
        convolution.weight.zero_()
        convolution.weight[(slice(None), slice(None), *centre)] = tap


def moved_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Rows of `[B, S, H, D]` that differ."""
    scale = before.abs().max().clamp_min(1e-12)
    difference = (after - before).abs().amax(dim=(0, 2, 3)) / scale
    return (difference > 1e-6).nonzero().flatten().tolist()


def corners(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All corners of a grid and one token inside."""
    ends = [sorted({0, size - 1}) for size in grid]
    return [*itertools.product(*ends), tuple(size // 2 for size in grid)]


def flat(token: tuple[int, ...], grid: tuple[int, ...]) -> int:
    """Row-major index of a token."""
    index = 0
    for position, size in zip(token, grid, strict=True):
        index = index * size + position
    return index


def touch_feature_map(pixel: tuple[int, int], scope: str) -> Callable[[str, Inputs], None]:
    """Touch one pixel of the feature map `[B, C, Y, X]` that enters the module `scope`."""

    def touch(name: str, call: Inputs) -> None:
        if name != scope:
            return
        key = "x" if "x" in call else "hidden_states"
        call[key] = call[key].clone()
        call[key][:, :, pixel[0], pixel[1]] += change(call[key].shape[1])

    return touch
