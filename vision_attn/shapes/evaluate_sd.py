"""Scores shapes-sd with the detector: `python -m vision_attn.shapes.evaluate_sd assets/shapes-sd`.

Captions of each split of `vision_attn.shapes.splits`, each picture from noise of its own fixed seed, drawn by the stock
`StableDiffusionPipeline`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .card_sd import sd_card
from .detector import score
from .leakage import Leakage, measure_leakage
from .model import read_settings
from .splits import SPLITS, split_captions

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_BATCH = 32
_CAPTIONS = {"one": 19, "two": 100, "new pair": 100, "three": 100}


@dataclass(frozen=True)
class SplitScore:
    """Shares of right pictures of a split: `objects` exactly as named, `colors` alone."""

    split: str
    pictures: int
    objects: float
    colors: float


def draw(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    side: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> list[np.ndarray]:
    """One `[side, side, 3]` uint8 picture for each caption; the noise of the i-th is of seed i."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(captions), _BATCH):
        chunk = list(captions[start : start + _BATCH])
        images = pipeline(
            chunk,
            height=side,
            width=side,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(chunk))],
            output_type="np",
        ).images
        pictures.extend((images.clip(0, 1) * 255).round().astype(np.uint8))
    return pictures


def evaluate_split(
    pipeline: StableDiffusionPipeline,
    split: str,
    count: int,
    side: int = 64,
    num_inference_steps: int = 20,
    guidance_scale: float = 4.0,
) -> SplitScore:
    """Draws the first captions of a split and scores them.

    Args:
        pipeline: a stock pipeline with the embedded model's tokenizer.
        split: see `split_captions`.
        count: captions.
        side: of the square pictures, in pixels.
        num_inference_steps: denoising steps.
        guidance_scale: two forward passes a step above 1.

    Raises:
        ValueError: an unknown split, an impossible count.
    """
    captions = split_captions(split, count)
    pictures = draw(pipeline, captions, side, num_inference_steps, guidance_scale)
    scores = [score(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    return SplitScore(
        split, count, *(sum(getattr(each, name) for each in scores) / count for name in ("objects", "colors"))
    )


def quick_scores(pipeline: StableDiffusionPipeline, side: int) -> dict[str, float]:
    """Shares of right objects of a dozen captions of each split, in few steps and bfloat16."""
    pipeline = pipeline.to(torch.bfloat16)
    return {split: evaluate_split(pipeline, split, 12, side, num_inference_steps=16).objects for split in SPLITS[:-1]}


def markdown(rows: Sequence[SplitScore]) -> str:
    """The table of the model card."""
    lines = ["| captions | pictures | objects right | colors right |", "|---|---|---|---|"]
    lines += [f"| {_TITLES[row.split]} | {row.pictures} | {row.objects:.0%} | {row.colors:.0%} |" for row in rows]
    return "\n".join(lines)


_TITLES = {
    "one": "one object, of a pair seen in training",
    "two": "two objects of seen pairs",
    "new pair": "two objects, at least one of a held-out pair",
    "three": "three objects, of which training shows none",
}


def leakage_text(leakage: Leakage) -> str:
    """The sentence of the model card."""
    return (
        f"Changing the color of the other object moves a shape's token by {leakage.other:.1%} of its length, changing "
        f"its own by {leakage.own:.0%}; encoding its phrase alone moves it by {leakage.alone:.0%}."
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vision_attn.shapes.evaluate_sd", description="Score shapes-sd.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--captions", type=int, help="of each split (default: 19 of one object, 100 of the others)")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    parser.add_argument("--card", action="store_true", help="write the scores into the directory's README.md")
    options = parser.parse_args(arguments)
    from diffusers import StableDiffusionPipeline

    settings = read_settings(options.directory)
    pipeline = StableDiffusionPipeline.from_pretrained(options.directory, local_files_only=True)
    pipeline.set_progress_bar_config(desc="steps", leave=False)
    rows = [
        evaluate_split(
            pipeline,
            split,
            count if options.captions is None else min(count, options.captions),
            settings["height"],
            settings["num_inference_steps"],
            settings["guidance_scale"],
        )
        for split, count in _CAPTIONS.items()
    ]
    leak = leakage_text(measure_leakage(pipeline))
    print(f"{markdown(rows)}\n\n{leak}")
    if options.card:
        card = sd_card(options.directory, markdown(rows), leak)
        (options.directory / "README.md").write_text(card, encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
