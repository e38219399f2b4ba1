"""Trains the embedded model on the endless scenes: `python -m vision_attn.shapes.train --out runs/shapes`.

Flow matching: `x = (1 - sigma) * latents + sigma * noise`, the transformer predicts `noise - latents`. Every random
draw of a step comes from (seed, step) alone, so a run continues bit for bit from a checkpoint. Weights and optimizer
state are float32; the transformer may compute in bfloat16 (autocast). Pictures of several sizes are mixed, one size per
step, with about the same number of tokens in each step.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .model import MAX_SEQUENCE_LENGTH, PIXELS_PER_TOKEN, build_pipeline, save_pipeline, trained_parameters
from .scenes import KINDS, render, sample_scene

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
TRAINED_MODELS = ("transformer", "text_encoder", "text_encoder_2")
_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the weights of a run; sizes in tokens, `steps` is the length of the whole run."""

    steps: int = 5000
    seed: int = 0
    learning_rate: float = 1.2e-3
    warmup_steps: int = 100
    tokens_per_step: int = 4704
    ema_decay: float = 0.998
    precision: str = "bfloat16"
    # Where the schedule of kinds and sizes starts: 0 for a new model, 1 to refine one that has seen everything.
    curriculum_start: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(
                f"TrainingConfig: steps must be at least 1, got {self.steps}: use thousands for a real run"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"TrainingConfig: precision must be 'float32' or 'bfloat16', got {self.precision!r}: choose one"
            )
        if self.tokens_per_step < 12 * 12 + MAX_SEQUENCE_LENGTH:
            raise ValueError(
                f"TrainingConfig: tokens_per_step must be at least 168, got {self.tokens_per_step}: use 4704"
            )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero at `steps`."""
        warmup = (step + 1) / max(self.warmup_steps, 1)
        return self.learning_rate * min(1.0, warmup, (self.steps - step) / max(self.steps - self.warmup_steps, 1))

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


def sample_batch(pipeline: FluxPipeline, config: TrainingConfig, step: int) -> Batch:
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


def build_optimizers(
    transformer: nn.Module, parameters: list[Tensor], learning_rate: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else.

    From step 125 on, a step with Muon lowered the loss as much as 1.5 steps with AdamW and took 1.2 times as long.

    Args:
        transformer: whose blocks' matrices Muon takes.
        parameters: all that is trained.
        learning_rate: of both: Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982).

    Raises:
        ImportError: a torch without Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(
            f"build_optimizers: torch must be 2.9 or newer for torch.optim.Muon, got {torch.__version__}: "
            "pip install --upgrade torch"
        )
    matrices = [p for name, p in transformer.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    taken = set(map(id, matrices))
    return (
        torch.optim.Muon(matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [p for p in parameters if id(p) not in taken], learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        ),
    )


class Trainer:
    """Trains the transformer and both text encoders of a pipeline in place.

    Args:
        pipeline: a pipeline in float32.
        config: what decides the weights.
        compiled: compile the transformer's blocks, once per token grid: on two CPU cores 25 s and a step takes two
            thirds of the time. Sums are then taken in another order, so weights differ from those of an eager run.
    """

    def __init__(self, pipeline: FluxPipeline, config: TrainingConfig, compiled: bool = False) -> None:
        self.pipeline, self.config, self.step = pipeline, config, 0
        self.modules = nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED_MODELS}).train()
        self.parameters: list[Tensor] = trained_parameters(self.modules)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizers = build_optimizers(pipeline.transformer, self.parameters, config.learning_rate)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16")
        if compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(_GRIDS))
            pipeline.transformer.compile_repeated_blocks(dynamic=False)

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

    def train_step(self) -> float:
        """One optimizer step; returns its loss."""
        batch = sample_batch(self.pipeline, self.config, self.step)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        loss = self.loss(batch, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate_at(self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.config.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        return float(loss.detach())

    def averaged_pipeline(self) -> FluxPipeline:
        """A copy of the pipeline with the averaged weights, in evaluation mode."""
        result = copy.deepcopy(self.pipeline)
        modules = nn.ModuleDict({name: getattr(result, name) for name in self.modules}).eval()
        with torch.no_grad():
            torch._foreach_copy_(trained_parameters(modules), self.average)
        return result

    def save(self, path: Path) -> None:
        """Writes a checkpoint; an interrupted write leaves the former one in place."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint of the same run.

        Raises:
            ValueError: the checkpoint was written with another configuration (its `steps` may differ).
        """
        state = torch.load(path, weights_only=True)
        here, there = asdict(self.config), dict(state["config"])
        different = [name for name in here if name != "steps" and here[name] != there.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"Trainer.load: {name} must be {there.get(name)!r} as in the checkpoint, got {here[name]!r}: "
                "use the same options or another --out"
            )
        self.step = state["step"]
        self.modules.load_state_dict(state["modules"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _attention_backend(tokens: int) -> AbstractContextManager[Any]:
    """Plain matrix attention for short sequences: 48 ms at 168 tokens, where torch's CPU flash kernel takes 106 ms."""
    if tokens > 1024:
        return nullcontext()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return sdpa_kernel(SDPBackend.MATH)


def train(trainer: Trainer, out: Path, checkpoint_minutes: float = 4.0, score_every: int = 250) -> None:
    """Runs to the end of the configured steps, with a progress bar, checkpoints and a log of losses and scores.

    Args:
        trainer: where to start; it continues from `out/checkpoint.pt` if that exists.
        out: directory of the checkpoint, `log.jsonl` and, at the end, the exported `model`.
        checkpoint_minutes: between two checkpoints.
        score_every: steps between two detector scores of the averaged weights; 0 for none.
    """
    from tqdm.auto import tqdm

    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / _CHECKPOINT
    if checkpoint.exists():
        trainer.load(checkpoint)
    saved, recent = time.monotonic(), []
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        bar = tqdm(total=trainer.config.steps, initial=trainer.step, unit="step", mininterval=5)
        try:
            while trainer.step < trainer.config.steps:
                recent.append(trainer.train_step())
                bar.update()
                entry: dict[str, Any] = {}
                if trainer.step % 25 == 0:
                    entry["loss"] = round(sum(recent) / len(recent), 4)
                    bar.set_postfix(loss=entry["loss"])
                    recent = []
                if score_every and trainer.step % score_every == 0:
                    entry["scores"] = _scores(trainer)
                if entry:
                    entry = {"step": trainer.step, "seconds": round(bar.format_dict["elapsed"], 1)} | entry
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                if time.monotonic() - saved > 60 * checkpoint_minutes:
                    trainer.save(checkpoint)
                    saved = time.monotonic()
        finally:
            bar.close()
            trainer.save(checkpoint)
    save_pipeline(trainer.averaged_pipeline(), out / "model")


def _scores(trainer: Trainer) -> dict[str, float]:
    from .evaluate import evaluate

    pipeline = trainer.averaged_pipeline().to(torch.bfloat16)
    return evaluate(pipeline, captions_per_kind=8, sizes=((48, 48),), num_inference_steps=16).rates()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    defaults = TrainingConfig()
    parser = argparse.ArgumentParser(prog="python -m vision_attn.shapes.train", description="Train the embedded model.")
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of the run; continues if it has a checkpoint"
    )
    parser.add_argument("--init-from", type=Path, help="model directory whose weights a new run starts from")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="length of the whole run")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--warmup-steps", type=int, default=defaults.warmup_steps)
    parser.add_argument("--tokens-per-step", type=int, default=defaults.tokens_per_step)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default=defaults.precision)
    parser.add_argument(
        "--curriculum-start", type=float, default=None, help="0 new model, 1 refine (default with --init-from)"
    )
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--score-every", type=int, default=250, help="steps between detector scores, 0 for none")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer's blocks (needs a C++ compiler)"
    )
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    start = options.curriculum_start
    config = TrainingConfig(
        steps=options.steps,
        seed=options.seed,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        tokens_per_step=options.tokens_per_step,
        precision=options.precision,
        curriculum_start=float(options.init_from is not None) if start is None else start,
    )
    trainer = Trainer(
        load_for_training(options.init_from) if options.init_from else build_pipeline(config.seed),
        config,
        compiled=options.compile,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        train(trainer, options.out, options.checkpoint_minutes, options.score_every)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped after step {trainer.step}: run the same command again to continue") from None


def load_for_training(directory: Path) -> FluxPipeline:
    """Today's pipeline in float32 with the weights of a shipped model, so that training continues from those alone.

    Raises:
        FileNotFoundError: no pipeline in `directory`.
    """
    from diffusers import FluxPipeline

    if not (directory / "model_index.json").is_file():
        raise FileNotFoundError(
            f"load_for_training: directory must hold model_index.json, got {directory}: export a model"
        )
    shipped = FluxPipeline.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    pipeline = build_pipeline()
    for name in TRAINED_MODELS:
        getattr(pipeline, name).load_state_dict(getattr(shipped, name).state_dict())
    return pipeline


if __name__ == "__main__":
    main()
