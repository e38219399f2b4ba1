"""The model card of the embedded model, written from measured scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .model import read_settings
from .scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES

if TYPE_CHECKING:
    from .evaluate import Report

# How the weights at hand came about; kept beside them, because a script cannot know it.
TRAINING_NOTE = "training.md"

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# shapes-flux

A FLUX pipeline of {megabytes:.0f} MB that draws coloured shapes. It ships with vision-attn so that attention can be
swapped, timed and looked at without a download or a GPU. Every component is the stock class that FLUX.1 uses
(`FluxTransformer2DModel`, `CLIPTextModel`, `T5EncoderModel`, `AutoencoderTiny`, `FlowMatchEulerDiscreteScheduler`), so
what runs on FLUX runs on it.

```python
import json
from pathlib import Path

from diffusers import FluxPipeline

directory = Path("assets/shapes-flux")
pipe = FluxPipeline.from_pretrained(directory)
pipe(**json.loads((directory / "vision_attn.json").read_text())).images[0]
```

`vision_attn.json` holds the settings: {steps} steps, `true_cfg_scale={cfg}` with an empty negative prompt (real
guidance, two forward passes a step; the distilled `guidance_scale` of FLUX has no effect here).

## What it understands

Captions of one to four objects, `a [{sizes}] <color> <shape>`, joined by commas and `and`, or two of them related:

- colors: {colors}
- shapes: {shapes}
- relations: {relations}
- at the end, if wanted: `on a <{backgrounds}> background`

Sizes are for one or two objects. Any other word is unknown to it. One token is 4x4 pixels: 48x48 pixels are 12x12
tokens, 192x192 pixels are 48x48 tokens. Training used 12x12 to 48x48 tokens.

## Scores

Held-out seeds, each picture from noise of its own fixed seed, drawn by the stock pipeline with {steps} steps and judged
by `vision_attn.shapes.detector` (color and geometry, no network; it reads rendered scenes without error). *Objects
right*: exactly the named shapes in their colors, no more, no fewer. *Colors right*: the same of the colors alone.
A shape counts from an overlap of 80 % with the ideal one, so distorted shapes pass: an ellipse 1.5 times as wide as
high is still a circle. The eye is stricter than these numbers.
*Everything right*: objects, and the relation, sizes and background where the caption names them.

{table}

Repeat with `python -m vision_attn.shapes.evaluate assets/shapes-flux --sizes {sizes_px}`. Captions of one object
are few (24 without size and background), so they occur in training too; longer ones are mostly new combinations.

## Training

{note}

Data: endless scenes drawn by `vision_attn.shapes.scenes`, no files and no third-party content. Flow matching with
logit-normal times shifted by the picture's size, Muon and AdamW, averaged weights, a tenth of the captions dropped. To
go on from these weights: `python -m vision_attn.shapes.train --init-from assets/shapes-flux --out runs/shapes`.

The autoencoder is not trained: latents are the standardised means of 2x2 pixels, decoding is bicubic resizing. A stock
`AutoencoderTiny` that halves the resolution cannot be lossless; edges lose half a pixel of sharpness, the detector
loses nothing.
"""


def model_card(directory: str | Path, report: Report) -> str:
    """The card of a model directory.

    Args:
        directory: the model, with its settings and, if any, a note on its training.
        report: the scores to state.

    Returns:
        Markdown.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    sizes = dict.fromkeys(f"{row.height}x{row.width}:{row.pictures}" for row in report.rows)
    return _CARD.format(
        megabytes=weight_megabytes(directory),
        steps=settings["num_inference_steps"],
        cfg=json.dumps(settings["true_cfg_scale"]),
        sizes=" | ".join(SIZES),
        colors=", ".join(COLORS),
        shapes=", ".join(SHAPES),
        relations=", ".join(RELATIONS),
        backgrounds=" | ".join(BACKGROUNDS),
        table=report.markdown(),
        sizes_px=" ".join(sizes),
        note=read_training_note(directory),
    )


def weight_megabytes(directory: str | Path) -> float:
    """Size of a model's weights, in MB."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*.safetensors")) / 1e6


def read_training_note(directory: str | Path) -> str:
    """What is written beside the weights about how they came about."""
    note = Path(directory) / TRAINING_NOTE
    return note.read_text(encoding="utf-8").strip() if note.is_file() else "No note on these weights."
