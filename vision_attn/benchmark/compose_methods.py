"""The ways to draw that `vision-attn compose-bench` compares, by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from vision_attn.benchmark.compose_bench import PLAIN, Method
from vision_attn.guidance.structured import MODES

_STRUCTURED = {f"structured-{mode}": mode for mode in MODES}
_LOSSES = ("a-star", "attend-and-excite")
_BOTH = "structured+a-star"
METHODS = (PLAIN, *_STRUCTURED, *_LOSSES, _BOTH)


def build_methods(pipe: Any, names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Method]:
    """Callables with the stock pipeline's signature.

    Args:
        pipe: A stock Stable Diffusion pipeline.
        names: Of `METHODS`; the plain one comes first whether it is named or not.
        settings: Per loss, arguments of `AStarPipeline`'s call that suit the model.

    Raises:
        ValueError: an unknown name.
    """
    require_methods(names)
    return {name: _method(pipe, name, settings) for name in dict.fromkeys((PLAIN, *names))}


def require_methods(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is not of `METHODS`."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"build_methods: methods must be of {', '.join(METHODS)}, got {unknown[0]!r}")


def _method(pipe: Any, name: str, settings: Mapping[str, Mapping[str, Any]]) -> Method:
    from vision_attn.pipelines import AStarPipeline, StructuredDiffusionPipeline

    if name == PLAIN:
        return pipe
    if name in _STRUCTURED:
        return functools.partial(StructuredDiffusionPipeline.from_pipe(pipe), mode=_STRUCTURED[name])
    if name == _BOTH:
        guided = AStarPipeline.from_pipe(StructuredDiffusionPipeline.from_pipe(pipe))
        return functools.partial(guided, **settings.get("a-star", {}))
    return functools.partial(AStarPipeline.from_pipe(pipe), loss=name, **settings.get(name, {}))
