"""The model card of shapes-sd, written from measured scores."""

from __future__ import annotations

from pathlib import Path

from .card import read_training_note, weight_megabytes
from .model import read_settings
from .scenes import BACKGROUNDS, COLORS, SHAPES, SIZES
from .splits import HELD_OUT_PAIRS

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# shapes-sd

A Stable Diffusion pipeline of {megabytes:.0f} MB that draws coloured shapes. It ships with vision-attn so that
compositional guidance can be measured without a download or a GPU. Every component is a stock class
(`UNet2DConditionModel`, `CLIPTextModel`, `AutoencoderTiny`, `DDIMScheduler`), so what runs on Stable Diffusion runs on
it; DDIM, Euler, DPM++ 2M and UniPC take its scheduler's configuration.

```python
import json
from pathlib import Path

from diffusers import StableDiffusionPipeline

directory = Path("assets/shapes-sd")
pipe = StableDiffusionPipeline.from_pretrained(directory)
settings = json.loads((directory / "vision_attn.json").read_text())
settings.pop("guidance")  # arguments of AStarPipeline that suit this model
pipe(**settings).images[0]
```

The UNet sees latents of 32x32 for pictures of 64x64 pixels (half the picture's sides); cross-attention is at 16x16 and
8x8. It predicts velocity, as Stable Diffusion 2 does. The text encoder was trained with it and is causal: a token holds
what came before it, other objects included.

## What it understands

Captions of objects, `a [{sizes}] <color> <shape>`, joined by commas and `and`, with ` on a <{backgrounds}> background`
at the end if wanted:

- colors: {colors}
- shapes: {shapes}

Training showed one or two objects, and never {pairs}.
Both are what guidance is measured on.

## Scores

Captions that are the same for everybody (`vision_attn.shapes.splits`), each picture from noise of its own fixed seed,
drawn by the stock pipeline with {steps} DDIM steps and `guidance_scale={scale:g}`, judged by
`vision_attn.shapes.detector`. *Objects right*: exactly the named shapes in their colors, no more, no fewer. *Colors
right*: the same of the colors alone.

{table}

Words leak into later ones, as the text encoder is causal. {leak}

Repeat with `python -m vision_attn.shapes.evaluate_sd assets/shapes-sd`.

## Training

{note}

Data: endless scenes drawn by `vision_attn.shapes.scenes`, no files and no third-party content. Repeat with
`python -m vision_attn.shapes.train_sd --out runs/shapes-sd`. The autoencoder is not trained: latents are the
standardised means of 2x2 pixels, decoding is bicubic resizing.
"""


def sd_card(directory: str | Path, table: str, leak: str) -> str:
    """The card of a model directory.

    Args:
        directory: the model, with its settings and, if any, a note on its training.
        table: the scores, in Markdown.
        leak: a sentence on what the text encoder mixes.

    Returns:
        Markdown.
    """
    settings = read_settings(directory)
    return _CARD.format(
        megabytes=weight_megabytes(directory),
        sizes=" | ".join(SIZES),
        backgrounds=" | ".join(BACKGROUNDS),
        colors=", ".join(COLORS),
        shapes=", ".join(SHAPES),
        pairs=" or ".join(sorted(f"a {color} {shape}" for color, shape in HELD_OUT_PAIRS)),
        steps=settings["num_inference_steps"],
        scale=settings["guidance_scale"],
        table=table,
        leak=leak,
        note=read_training_note(directory),
    )
