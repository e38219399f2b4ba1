"""Where a model's image looks at its text: queries and keys of such layers, taken from forwards that go on as they are.

A layer gives queries `[B, S, H, D]` of the image tokens, keys `[B, T, H, D]` of the text tokens, and the factor on
their scores, all of them as its softmax sees them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from vision_attn.layout import TokenLayout
from vision_attn.operators.dense import Dense
from vision_attn.patching.call import Attention
from vision_attn.patching.diffusers import attention_modules
from vision_attn.patching.layouts import family_of
from vision_attn.patching.layouts.unet import downsampling
from vision_attn.patching.routing import is_routed
from vision_attn.patching.swap import patch

JOINT = ("FluxTransformer2DModel", "SD3Transformer2DModel")

Wants = Callable[[str], bool]
Take = Callable[[str, Tensor, Tensor, float], None]
Grid = tuple[int, int]


class TextAttention(Protocol):
    """The layers of one model in which its image looks at its text."""

    def grids(self, call: Mapping[str, Any]) -> dict[str, Grid]:
        """Rows and columns of each layer's queries in a forward, in the order in which the layers run."""

    def coarsest(self, call: Mapping[str, Any]) -> Grid:
        """Rows and columns of the maps that are best known to tell concepts apart."""

    def watched(self, wants: Wants, take: Take) -> contextlib.AbstractContextManager[None]:
        """Call `take(name, query, key, scale)` in each layer of which `wants(name)` is true."""


def text_attention(model: nn.Module, layers: str | Sequence[str] | None) -> TextAttention:
    """The layers of a model that globs name; None for all that see its text.

    Raises:
        ValueError: no such layers.
        NotImplementedError: attention whose scores are not those of its projections.
    """
    joint = any(cls.__name__ in JOINT for cls in type(model).__mro__)
    return JointAttention(model, layers) if joint else CrossAttention(model, layers)


class CrossAttention:
    """Attention of a UNet to its text. What `to_q` and `to_k` give is what its softmax sees.

    Hooks on the projections leave processors alone, whichever backend they use.

    Args:
        model: A UNet of SD 1, SD 2 or SDXL.
        layers: As of `text_attention`.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str] | None) -> None:
        there = {name: part for name, part in model.named_modules() if name.endswith("attn2") and hasattr(part, "to_k")}
        self.model, self.modules = model, _chosen("cross-attention", there, layers)
        for name, part in self.modules.items():
            normed = part.norm_q is not None or part.norm_k is not None
            if normed or getattr(part, "fused_projections", False):
                given = "norms of queries and keys" if normed else "fused projections"
                raise NotImplementedError(
                    f"AttentionCapture: cross-attention must have plain projections, got {given} in {name!r}"
                )

    def grids(self, call: Mapping[str, Any]) -> dict[str, Grid]:
        """Halved as often as the blocks on the way do."""
        if call.get("encoder_attention_mask") is not None:
            raise ValueError("AttentionCapture: encoder_attention_mask must be None, its maps would be of other scores")
        return {name: _halved(call["sample"], downsampling(self.model, name)) for name in self.modules}

    def coarsest(self, call: Mapping[str, Any]) -> Grid:
        """A quarter of the sample's: 16x16 for SD at 512 px, 32x32 for SDXL at 1024 px."""
        return _halved(call["sample"], 4)

    @contextlib.contextmanager
    def watched(self, wants: Wants, take: Take) -> Iterator[None]:
        """See the outputs of the projections."""
        queries: dict[str, Tensor] = {}

        def take_query(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            if wants(name):
                queries[name] = output

        def take_key(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            if wants(name):
                part = self.modules[name]
                query, key = (tensor.unflatten(-1, (part.heads, -1)) for tensor in (queries.pop(name), output))
                take(name, query, key, part.scale)

        with contextlib.ExitStack() as stack:
            for name, part in self.modules.items():
                stack.callback(part.to_q.register_forward_hook(partial(take_query, name)).remove)
                stack.callback(part.to_k.register_forward_hook(partial(take_key, name)).remove)
            yield


class JointAttention:
    """Attention of a transformer over image and text together, as its own processors call it: normed and rotated.

    Layers that a patch holds keep their operator; the others are patched with `Dense`, which is their own attention.

    Args:
        model: A transformer of SD3 or FLUX.
        layers: As of `text_attention`.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str] | None) -> None:
        self.model, self.family = model, family_of(model)
        there = {name: part for name, part in attention_modules(model) if not self._sees_image_alone(name)}
        self.modules = _chosen("joint attention", there, layers)

    def _sees_image_alone(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.family.image_only)

    def grids(self, call: Mapping[str, Any]) -> dict[str, Grid]:
        """The token grid, of one size in all layers."""
        layout = self.family.layout(self.model, call)
        if layout is None:
            raise ValueError("AttentionCapture: img_ids must be those of one image in row-major order, got others")
        return dict.fromkeys(self.modules, (layout.grid[-2], layout.grid[-1]))

    def coarsest(self, call: Mapping[str, Any]) -> Grid:
        """The one there is."""
        return next(iter(self.grids(call).values()))

    @contextlib.contextmanager
    def watched(self, wants: Wants, take: Take) -> Iterator[None]:
        """See the calls that the processors make."""

        def look(name: str, call: Attention, layout: TokenLayout) -> None:
            if not wants(name):
                return
            if call.attn_mask is not None:
                raise ValueError(
                    f"AttentionCapture: attn_mask of {name!r} must be None, its maps would be of other scores"
                )
            text = slice(layout.text_before) if layout.text_before else slice(layout.image_slice.stop, None)
            scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
            take(name, call.query[:, layout.image_slice], call.key[:, text], scale)

        with contextlib.ExitStack() as stack:
            free = {name for name, part in self.modules.items() if not _is_patched(part)}
            if free:
                stack.enter_context(patch(self.model, Dense(), layers=free.__contains__))
            for name, part in self.modules.items():
                observers, observer = part.processor.layer.observers, partial(look, name)
                observers.append(observer)
                stack.callback(observers.remove, observer)
            yield


def _is_patched(module: Any) -> bool:
    processor = module.processor
    return is_routed(processor) and processor.layer is not None and processor.layer.installed


def _chosen(kind: str, there: Mapping[str, Any], layers: str | Sequence[str] | None) -> dict[str, Any]:
    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    chosen = {name: part for name, part in there.items() if any(fnmatchcase(name, glob) for glob in patterns)}
    if not chosen:
        some = ", ".join(map(repr, list(there)[:3])) or "none"
        raise ValueError(f"AttentionCapture: layers must name {kind}, got {layers!r}: there are {some}")
    return chosen


def _halved(sample: Tensor, factor: int) -> Grid:
    """A map after as many halvings, each rounded up."""
    rows, columns = sample.shape[-2:]
    return -(-rows // factor), -(-columns // factor)
