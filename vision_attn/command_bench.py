"""What `vision-attn bench` and `compose-bench` run, checked before any work.

Heavy imports stand inside the functions, as in `cli`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vision_attn.command_input import load, parse_size

if TYPE_CHECKING:
    from vision_attn.benchmark.compose_bench import Method, Task
    from vision_attn.benchmark.generation import Request

GRID = "64x64"
HEADS, HEAD_DIM = 8, 64
_CAPTIONS = 150


def attention_suite(
    ops: Sequence[str] | None, grid: str | None, heads: int, head_dim: int, options: Mapping[str, Any]
) -> Callable[..., Any]:
    """One attention call against its rivals, for given operators or the standard cases.

    Args:
        ops: Operators as text; None for the standard cases, which have grids of their own.
        grid: Rows x columns, for `ops` only.
        heads: Number of heads.
        head_dim: Channels per head.
        options: Of `bench_report`.

    Raises:
        ValueError: a grid without operators, an operator or a grid without rival.
    """
    import vision_attn as va
    from vision_attn.benchmark.attention_bench import STANDARD_CASES, Case, bench_report

    size = parse_size(GRID if grid is None else grid, "--grid")
    if grid is not None and not ops:
        raise ValueError(f"--grid must come with --ops, got {grid!r} alone: the standard cases have grids of their own")
    own = [Case(va.parse(text), size, heads, head_dim) for text in ops or ()]
    cases = own or [replace(case, heads=heads, head_dim=head_dim) for case in STANDARD_CASES]
    return functools.partial(bench_report, cases, scaling=not own, **options)


def backbone_suite(ops: Sequence[str] | None, given: Sequence[str], options: Mapping[str, Any]) -> Callable[..., Any]:
    """A ViT-S with its own attention and with operators in its place.

    Args:
        ops: Operators as text; None for the default ones.
        given: Options that the user set and that have no meaning here.
        options: Of `backbone_report`.

    Raises:
        ValueError: there are any such, or an unknown operator.
    """
    import vision_attn as va
    from vision_attn.benchmark.backbone_bench import OPERATORS, backbone_report

    if given:
        raise ValueError(
            f"{given[0]} must be left out with --suite backbones: the model has its own heads and grids, and its "
            "stock attention is the rival"
        )
    return functools.partial(backbone_report, [va.parse(text) for text in ops] if ops else OPERATORS, **options)


def guidance_suite(given: Sequence[str], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The gradient by which guidance moves latents, with and without what makes it cheap.

    Args:
        given: Options that the user set and that have no meaning here.
        options: Of `guidance_report`.

    Raises:
        ValueError: there are any such.
    """
    from vision_attn.benchmark.guidance_bench import guidance_report

    if given:
        raise ValueError(f"{given[0]} must be left out with --suite guidance: the model has its own attention")
    return functools.partial(guidance_report, **options)


def compose_task(
    model: str,
    methods: Sequence[str],
    split: str,
    captions: int | None,
    seeds: int,
    tuning: bool,
    request: Request,
    device: str,
    dtype: str,
) -> tuple[dict[str, Method], Task, dict[str, Any]]:
    """The methods, what they draw, and what the report says about them.

    Args:
        model: With captions of the shapes data.
        methods: Names.
        split: Of the captions.
        captions: Number of them; None for 150, or as many as there are.
        seeds: Pictures per caption.
        tuning: Whether to take the captions for choosing settings.
        request: Steps and guidance scale, as far as the user gave them.
        device: Where it runs.
        dtype: Of the model.

    Raises:
        ValueError: an unknown method or split, too many captions.
        NotImplementedError: a model that is no Stable Diffusion pipeline.
    """
    from vision_attn.benchmark.compose_bench import Task
    from vision_attn.benchmark.compose_methods import build_methods, require_methods
    from vision_attn.guidance.structured import require_unet
    from vision_attn.pipelines.loading import run_defaults
    from vision_attn.shapes.splits import caption_count, split_captions

    require_methods(methods)
    count = min(_CAPTIONS, caption_count(split, tuning=tuning)) if captions is None else captions
    texts = split_captions(split, count, tuning=tuning)
    pipe, request = load(model, replace(request, prompt=texts[0]), device, dtype)
    require_unet("compose-bench", pipe)
    options = request.arguments(pipe)
    del options["prompt"]
    settings = run_defaults(model).get("guidance", {})
    about = {
        "model": model,
        "split": f"{split}, for tuning" if tuning else split,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        **{f"settings of {name}": own for name, own in settings.items()},
    }
    return build_methods(pipe, methods, settings), Task(tuple(texts), seeds, options), about
