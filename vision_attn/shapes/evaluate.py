"""Scores a model directory with the detector: `python -m vision_attn.shapes.evaluate assets/shapes-flux`.

The captions come from seeds that training never draws, and every picture starts from noise of its own fixed seed, so a
score does not depend on the batch size. Pictures are made by the stock `FluxPipeline`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .card import model_card
from .detector import Score, score
from .model import MAX_SEQUENCE_LENGTH, PIXELS_PER_TOKEN, read_settings
from .scenes import KINDS, Scene, sample_scene

if TYPE_CHECKING:
    from diffusers import FluxPipeline

# First word of the seeds of held-out scenes; training seeds start with the run's seed, which is small.
_HELD_OUT = 20_011_203
_TOKENS_PER_BATCH = 9000


@dataclass(frozen=True)
class KindScore:
    """Shares of the pictures of one kind and size that are right; `right` is objects, relation, sizes, background."""

    kind: str
    height: int
    width: int
    pictures: int
    objects: float
    colors: float
    right: float


@dataclass(frozen=True)
class Report:
    """The scores of one evaluation and the generation settings they were made with."""

    rows: tuple[KindScore, ...]
    num_inference_steps: int
    true_cfg_scale: float

    def rates(self) -> dict[str, float]:
        """`{"two 48x48": objects, "two 48x48 right": all of it}`, heights before widths."""
        table = {}
        for row in self.rows:
            table[f"{row.kind} {row.height}x{row.width}"] = row.objects
            table[f"{row.kind} {row.height}x{row.width} right"] = row.right
        return table

    def markdown(self) -> str:
        """The table of the model card."""
        lines = [
            "| size (px) | captions | pictures | objects right | colors right | everything right |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            shares = " | ".join(f"{100 * value:.0f} %" for value in (row.objects, row.colors, row.right))
            lines.append(f"| {row.height}x{row.width} | {_TITLES[row.kind]} | {row.pictures} | {shares} |")
        return "\n".join(lines)


_TITLES = {
    "one": "one object",
    "two": "two objects",
    "relation": "two objects, related",
    "many": "three or four objects",
}


def held_out_scenes(kind: str, count: int, height: int = 48, width: int = 48) -> list[Scene]:
    """The first `count` held-out scenes of a kind; the captions are the same at every size."""
    captions = [sample_scene([_HELD_OUT, KINDS.index(kind), index], kind=kind).spec for index in range(count)]
    return [Scene(height, width, spec, spec.background or "white", ()) for spec in captions]


def generate(
    pipeline: FluxPipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    height: int,
    width: int,
    num_inference_steps: int = 20,
    true_cfg_scale: float = 3.0,
) -> list[np.ndarray]:
    """Draws one `[height, width, 3]` uint8 picture for each caption from noise of its own seed."""
    pictures: list[np.ndarray] = []
    size = max(
        1, _TOKENS_PER_BATCH // ((height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN) + MAX_SEQUENCE_LENGTH)
    )
    for start in range(0, len(captions), size):
        chunk = list(captions[start : start + size])
        result = pipeline(
            chunk,
            negative_prompt=[""] * len(chunk),
            true_cfg_scale=true_cfg_scale,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + size]],
            output_type="pt",
        )
        batch = (result.images.float().clamp(0, 1) * 255).round().byte()
        pictures.extend(batch.permute(0, 2, 3, 1).cpu().numpy())
    return pictures


def evaluate(
    pipeline: FluxPipeline,
    captions_per_kind: int = 50,
    sizes: Sequence[tuple[int, int]] = ((48, 48),),
    num_inference_steps: int = 20,
    true_cfg_scale: float = 3.0,
) -> Report:
    """Draws the held-out captions at each (height, width) and scores them.

    Args:
        pipeline: a stock pipeline with the embedded model's tokenizers.
        captions_per_kind: held-out captions of each of the four kinds; 50 for the card's 200.
        sizes: (height, width) in pixels, multiples of 4.
        num_inference_steps: denoising steps.
        true_cfg_scale: guidance; two forward passes a step above 1.

    Returns:
        The shares of right pictures for each size and kind.

    Raises:
        ValueError: no captions asked for.
    """
    if captions_per_kind < 1:
        raise ValueError(f"evaluate: captions_per_kind must be at least 1, got {captions_per_kind}: use 50")
    rows = []
    for height, width in sizes:
        for kind in KINDS:
            scenes = held_out_scenes(kind, captions_per_kind, height, width)
            captions = [scene.caption for scene in scenes]
            seeds = [1000 * KINDS.index(kind) + index for index in range(captions_per_kind)]
            pictures = generate(pipeline, captions, seeds, height, width, num_inference_steps, true_cfg_scale)
            scores = [score(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
            rows.append(_summary(kind, height, width, scores))
    return Report(tuple(rows), num_inference_steps, true_cfg_scale)


def _summary(kind: str, height: int, width: int, scores: Sequence[Score]) -> KindScore:
    shares = {
        name: sum(getattr(item, name) for item in scores) / len(scores) for name in ("objects", "colors", "right")
    }
    return KindScore(kind, height, width, len(scores), **shares)


def _parse_size(text: str) -> tuple[int, int, int | None]:
    """`48x64` or, with its own number of captions per kind, `256x256:4`."""
    match = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"size must look like 48x64 (height x width in pixels) or 256x256:4, got {text!r}"
        )
    return int(match[1]), int(match[2]), None if match[3] is None else int(match[3])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vision_attn.shapes.evaluate", description="Score a model directory."
    )
    parser.add_argument("directory", type=Path)
    sizes_help = "height x width in pixels; 256x256:4 draws 4 captions of each kind at that size"
    parser.add_argument("--sizes", type=_parse_size, nargs="+", default=[(48, 48, None)], help=sizes_help)
    parser.add_argument("--captions-per-kind", type=int, default=50)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--true-cfg-scale", type=float, help="guidance (default: the model's)")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    parser.add_argument("--card", action="store_true", help="write the scores into the directory's README.md")
    options = parser.parse_args(arguments)
    from diffusers import FluxPipeline

    settings = read_settings(options.directory)
    pipeline = FluxPipeline.from_pretrained(options.directory, local_files_only=True)
    pipeline.set_progress_bar_config(desc="steps", leave=False)
    steps = settings["num_inference_steps"] if options.steps is None else options.steps
    scale = settings["true_cfg_scale"] if options.true_cfg_scale is None else options.true_cfg_scale
    rows: list[KindScore] = []
    for height, width, count in options.sizes:
        captions = options.captions_per_kind if count is None else count
        rows.extend(evaluate(pipeline, captions, [(height, width)], steps, scale).rows)
    report = Report(tuple(rows), steps, scale)
    print(report.markdown())
    if options.card:
        (options.directory / "README.md").write_text(model_card(options.directory, report), encoding="utf-8")
    if options.json is not None:
        content: dict[str, Any] = asdict(report)
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
