"""Trains shapes-sd on the endless scenes: `python -m vision_attn.shapes.train_sd --out runs/shapes-sd`.

Diffusion with Stable Diffusion 2's schedule and velocity target. Captions hold one or two objects, and never one of
`HELD_OUT_PAIRS`: new pairs of color and shape, and three objects, are what the model is asked for later. Pictures are
48x48 pixels first and 64x64 after that.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .model import save_pipeline
from .model_sd import PIXELS, build_sd_pipeline, default_sd_settings
from .scenes import Scene, render, sample_scene
from .splits import has_held_out_pair
from .trainer import RunConfig, Trainer, add_run_options, load_shipped, run, run_settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_SMALL_PIXELS = 48
_DROPPED_CAPTIONS = 0.1
# Times are `1000 * u ** _TIME_POWER` for uniform u: two fifths lie above a noise-to-signal ratio of 4, where it is
# decided which color and shape goes where.
_TIME_POWER = 0.6


@dataclass(frozen=True)
class SDConfig(RunConfig):
    """What decides the weights of a run.

    `pictures` are those of a step at 64x64 pixels; at 48x48 there are 16/9 as many. `small_until` is the share of the
    run that draws these, `one_object` the share of captions with one object after the first tenth of the run.
    """

    learning_rate: float = 1e-3
    pictures: int = 32
    small_until: float = 0.5
    one_object: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures < 1:
            raise ValueError(f"SDConfig: pictures must be at least 1, got {self.pictures}: use 32")


@dataclass(frozen=True)
class SDBatch:
    """Clean latents `[B, 3, Y, X]` with their captions (empty where dropped)."""

    latents: Tensor
    captions: list[str]


def training_scene(seed: tuple[int, ...], side: int, kind: str) -> Scene:
    """The first scene of the seed without a held-out pair."""
    attempt = 0
    while has_held_out_pair((scene := sample_scene([*seed, attempt], side, side, kind)).spec):
        attempt += 1
    return scene


def sample_sd_batch(pipeline: StableDiffusionPipeline, config: SDConfig, step: int) -> SDBatch:
    """Draws the scenes of one step and encodes them with the pipeline's autoencoder."""
    rng = np.random.default_rng([config.seed, step])
    progress = step / config.steps
    side = _SMALL_PIXELS if progress < config.small_until else PIXELS
    single = 0.5 if progress < 0.1 else config.one_object
    pictures, captions = [], []
    for index in range(config.pictures * PIXELS**2 // side**2):
        kind, dropped, sentence = rng.random(3)
        scene = training_scene((config.seed, step, index), side, "one" if kind < single else "two")
        pictures.append(render(scene))
        text = scene.caption if sentence > 0.1 else scene.caption[0].upper() + scene.caption[1:] + "."
        captions.append("" if dropped < _DROPPED_CAPTIONS else text)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latents * pipeline.vae.config.scaling_factor
    return SDBatch(latents, captions)


class SDTrainer(Trainer):
    """Trains the UNet and the text encoder of a `StableDiffusionPipeline` in place."""

    models: ClassVar[tuple[str, ...]] = ("unet", "text_encoder")
    config: SDConfig

    def step_loss(self) -> Tensor:
        """Mean squared error of the predicted velocity (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
        batch = sample_sd_batch(self.pipeline, self.config, self.step)
        return self.loss(batch, torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step))

    def loss(self, batch: SDBatch, generator: torch.Generator) -> Tensor:
        """As `step_loss`, of a given batch."""
        noise = torch.randn(batch.latents.shape, generator=generator)
        scheduler = self.pipeline.scheduler
        uniform = torch.rand(len(noise), generator=generator)
        times = (scheduler.config.num_train_timesteps * uniform**_TIME_POWER).long()
        noisy = scheduler.add_noise(batch.latents, noise, times)
        text = self.pipeline.text_encoder(self.tokens(batch.captions))[0]
        with self.autocast:
            velocity = self.pipeline.unet(noisy, times, text, return_dict=False)[0]
        return nn.functional.mse_loss(velocity.float(), scheduler.get_velocity(batch.latents, noise, times))

    def tokens(self, captions: list[str]) -> Tensor:
        """Token numbers `[B, T]` as the pipeline makes them."""
        tokenizer = self.pipeline.tokenizer
        return tokenizer(
            captions,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def scores(self) -> dict[str, float]:
        """Shares of pictures with the right objects."""
        from .evaluate_sd import quick_scores

        side = _SMALL_PIXELS if self.step / self.config.steps < self.config.small_until else PIXELS
        return quick_scores(self.averaged_pipeline(), side)

    def export(self, directory: Path) -> None:
        """Writes the averaged weights."""
        save_pipeline(self.averaged_pipeline(), directory, default_sd_settings())


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    defaults = SDConfig()
    parser = argparse.ArgumentParser(prog="python -m vision_attn.shapes.train_sd", description="Train shapes-sd.")
    add_run_options(parser, defaults)
    parser.add_argument("--pictures", type=int, default=defaults.pictures, help="pictures of 64x64 pixels in a step")
    parser.add_argument("--small-until", type=float, default=defaults.small_until, help="share of the run at 48x48")
    parser.add_argument("--one-object", type=float, default=defaults.one_object, help="share of such captions")
    options = parser.parse_args(arguments)
    config = SDConfig(
        **run_settings(options),
        pictures=options.pictures,
        small_until=options.small_until,
        one_object=options.one_object,
    )
    pipeline = build_sd_pipeline(config.seed)
    if options.init_from:
        load_shipped(pipeline, options.init_from, SDTrainer.models)
    run(SDTrainer(pipeline, config), options)


if __name__ == "__main__":
    main()
