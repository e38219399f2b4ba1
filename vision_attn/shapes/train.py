"""Trains shapes-flux on the endless scenes: `python -m vision_attn.shapes.train --out runs/shapes`.

Flow matching: `x = (1 - sigma) * latents + sigma * noise`, the transformer predicts `noise - latents`. Pictures of
several sizes are mixed, one size per step, with about the same number of tokens in each step.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .model import (
    MAX_SEQUENCE_LENGTH,
    PIXELS_PER_TOKEN,
    build_pipeline,
    default_settings,
    save_pipeline,
    trained_parameters,
)
from .scenes import KINDS, render, sample_scene
from .trainer import RunConfig, Trainer, add_run_options, load_shipped, run, run_settings

if TYPE_CHECKING:
    from diffusers import FluxPipeline

# (rows, columns) of the token grid, and its share of the steps before and after `_MIXED_FROM` of the run.
_GRIDS: tuple[tuple[tuple[int, int], float, float], ...] = (
    ((12, 12), 0.72, 0.30),
    ((12, 16), 0.05, 0.04),
    ((16, 12), 0.05, 0.04),
    ((16, 16), 0.10, 0.08),
    ((24, 24), 0.04, 0.10),
    ((32, 32), 0.02, 0.14),
    ((48, 48), 0.02, 0.30),
)
_MIXED_FROM = 0.55
# Shares of the kinds of scene (one, two, relation, many) in the first `_SIMPLE_UNTIL` of the run and after it.
_SIMPLE_KINDS = (0.45, 0.35, 0.15, 0.05)
_ALL_KINDS = (0.10, 0.48, 0.32, 0.10)
_SIMPLE_UNTIL = 0.15
_DROPPED_CAPTIONS = 0.1


@dataclass(frozen=True)
class FluxConfig(RunConfig):
    """Everything that decides the weights of a run; sizes in tokens."""

    tokens_per_step: int = 4704
    # Where the schedule of kinds and sizes starts: 0 for a new model, 1 to refine one that has seen everything.
    curriculum_start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_step < 12 * 12 + MAX_SEQUENCE_LENGTH:
            raise ValueError(f"FluxConfig: tokens_per_step must be at least 168, got {self.tokens_per_step}: use 4704")

    def curriculum_at(self, step: int) -> float:
        """How far the schedule of kinds and sizes is, 0 to 1."""
        return self.curriculum_start + (1 - self.curriculum_start) * step / self.steps


@dataclass(frozen=True)
class Batch:
    """Packed clean latents `[B, Y*X, 12]` of one grid (Y, X) with their captions (empty where dropped)."""

    latents: Tensor
    captions: list[str]
    grid: tuple[int, int]


def flow_shift(tokens: int) -> float:
    """Time shift for a number of image tokens: 3 at 144 tokens, growing with the root of the side.

    Which color and shape goes where is decided while noise still hides the shapes: at 3 two fifths of the times lie
    above a noise level of 0.8, at 1.5 one sixth. Larger pictures of the same shapes are more redundant, so the same
    noise hides less of them (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).
    """
    return 3.0 * (tokens / 144) ** 0.25


def sample_batch(pipeline: FluxPipeline, config: FluxConfig, step: int) -> Batch:
    """Draws the scenes of one step and encodes them with the pipeline's autoencoder."""
    rng = np.random.default_rng([config.seed, step])
    progress = config.curriculum_at(step)
    shares = np.array([late if progress >= _MIXED_FROM else early for _, early, late in _GRIDS])
    grid = _GRIDS[rng.choice(len(_GRIDS), p=shares / shares.sum())][0]
    kinds = _SIMPLE_KINDS if progress < _SIMPLE_UNTIL else _ALL_KINDS
    count = max(1, config.tokens_per_step // (grid[0] * grid[1] + MAX_SEQUENCE_LENGTH))
    pictures, captions = [], []
    for index in range(count):
        kind = KINDS[rng.choice(len(KINDS), p=kinds)]
        height, width = PIXELS_PER_TOKEN * grid[0], PIXELS_PER_TOKEN * grid[1]
        scene = sample_scene([config.seed, step, index], height, width, kind)
        pictures.append(render(scene))
        dropped, sentence = rng.random(2)
        text = scene.caption if sentence > 0.1 else scene.caption[0].upper() + scene.caption[1:] + "."
        captions.append("" if dropped < _DROPPED_CAPTIONS else text)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latents * pipeline.vae.config.scaling_factor
    packed = pipeline._pack_latents(latents, count, latents.shape[1], latents.shape[2], latents.shape[3])
    return Batch(packed, captions, grid)


class FluxTrainer(Trainer):
    """Trains the transformer and both text encoders of a `FluxPipeline` in place.

    Args:
        pipeline: a pipeline in float32.
        config: what decides the weights.
        compiled: compile the transformer's blocks, once per token grid: on two CPU cores 25 s and a step takes two
            thirds of the time. Sums are then taken in another order, so weights differ from those of an eager run.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder", "text_encoder_2")
    config: FluxConfig

    def __init__(self, pipeline: FluxPipeline, config: FluxConfig, compiled: bool = False) -> None:
        super().__init__(pipeline, config)
        if compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(_GRIDS))
            pipeline.transformer.compile_repeated_blocks(dynamic=False)

    @classmethod
    def trained(cls, modules: nn.Module) -> list[Tensor]:
        """All but what must stay as it began, see `trained_parameters`."""
        return trained_parameters(modules)

    def step_loss(self) -> Tensor:
        """The loss of the scenes of this step."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        return self.loss(sample_batch(self.pipeline, self.config, self.step), generator)

    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token sequence `[B, 24, 128]` and pooled vector `[B, 64]` as the pipeline computes them, with gradients."""
        options = {
            "padding": "max_length",
            "max_length": MAX_SEQUENCE_LENGTH,
            "truncation": True,
            "return_tensors": "pt",
        }
        pooled = self.pipeline.text_encoder(self.pipeline.tokenizer(captions, **options).input_ids).pooler_output
        return self.pipeline.text_encoder_2(self.pipeline.tokenizer_2(captions, **options).input_ids)[0], pooled

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean squared error of the predicted velocity."""
        count, tokens, _ = batch.latents.shape
        noise = torch.randn(batch.latents.shape, generator=generator)
        shift = flow_shift(tokens)
        sigma = torch.sigmoid(torch.randn(count, generator=generator))  # logit-normal times
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        level = sigma[:, None, None]
        noisy = (1 - level) * batch.latents + level * noise
        sequence, pooled = self.embed(batch.captions)
        with self.autocast, _attention_backend(tokens):
            velocity = self.pipeline.transformer(
                hidden_states=noisy,
                timestep=sigma,
                pooled_projections=pooled,
                encoder_hidden_states=sequence,
                txt_ids=torch.zeros(sequence.shape[1], 3),
                img_ids=self.pipeline._prepare_latent_image_ids(count, *batch.grid, "cpu", torch.float32),
                return_dict=False,
            )[0]
        return nn.functional.mse_loss(velocity.float(), noise - batch.latents)

    def scores(self) -> dict[str, float]:
        """Shares of right pictures, 8 of each kind."""
        from .evaluate import evaluate

        pipeline = self.averaged_pipeline().to(torch.bfloat16)
        return evaluate(pipeline, captions_per_kind=8, sizes=((48, 48),), num_inference_steps=16).rates()

    def export(self, directory: Path) -> None:
        """Writes the averaged weights."""
        save_pipeline(self.averaged_pipeline(), directory, default_settings())


def _attention_backend(tokens: int) -> AbstractContextManager[Any]:
    """Plain matrix attention for short sequences: 48 ms at 168 tokens, where torch's CPU flash kernel takes 106 ms."""
    if tokens > 1024:
        return nullcontext()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return sdpa_kernel(SDPBackend.MATH)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    defaults = FluxConfig()
    parser = argparse.ArgumentParser(prog="python -m vision_attn.shapes.train", description="Train shapes-flux.")
    add_run_options(parser, defaults)
    parser.add_argument("--tokens-per-step", type=int, default=defaults.tokens_per_step)
    parser.add_argument(
        "--curriculum-start", type=float, default=None, help="0 new model, 1 refine (default with --init-from)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer's blocks (needs a C++ compiler)"
    )
    options = parser.parse_args(arguments)
    start = options.curriculum_start
    config = FluxConfig(
        **run_settings(options),
        tokens_per_step=options.tokens_per_step,
        curriculum_start=float(options.init_from is not None) if start is None else start,
    )
    pipeline = build_pipeline(config.seed)
    if options.init_from:
        load_shipped(pipeline, options.init_from, FluxTrainer.models)
    run(FluxTrainer(pipeline, config, compiled=options.compile), options)


if __name__ == "__main__":
    main()
