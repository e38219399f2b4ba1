"""Train a tiny variant of each backbone on a small task: `python -m vision_attn.backbones.quick_train`.

Minutes on a CPU, to see that a backbone learns and what its attention costs; no statement about ImageNet.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from vision_attn.backbones import create_model
from vision_attn.backbones.quick_data import SIDE_PX, TASKS, Task
from vision_attn.operators import Agent, HiLo, Neighborhood
from vision_attn.patching import patch

BATCH = 32
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 1.5e-3, 0.05, 0.1
EPOCHS = {"shapes": 5, "digits": 30}
MOVED_PX = 4


@dataclass(frozen=True)
class Variant:
    """A tiny model.

    Args:
        name: For `timm.create_model`.
        arguments: What makes it tiny.
        operator: What takes the place of its attention while it learns and is tested; None for its own.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    operator: Any = None


def convolutional_stem(**arguments: Any) -> nn.Module:
    """Three convolutions to 8x8 tokens of 64 channels, from which vision transformers learn small tasks better.

    Source: Early Convolutions Help Transformers See Better (arXiv 2106.14881).
    """
    stem = ConvStem(arguments["in_chans"], channels=(16, 32, 64))
    return HybridEmbed(stem, **{**arguments, "proj": False})


_VIT = {
    "img_size": SIDE_PX, "patch_size": 1, "embed_layer": convolutional_stem, "embed_dim": 64, "depth": 4,
    "num_heads": 4, "mlp_ratio": 2.0,
}  # fmt: skip
_STAGES = {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
_SIZED = {**_STAGES, "img_size": SIDE_PX}
_DIMS = (16, 32, 64, 128)
_SWIN = {"window_size": 4, "agents": (9, 9, 9, 4), "agent_blocks": (1, 1, 0, 0)}
_CSWIN = {"num_heads": (2, 2, 4, 8), "agents": (9, 9, None, None), "stripes": (None, None, 2, None)}
_NAT = {"depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 8), "embed_dim": 16, "kernel_size": 3}
_BIFORMER = {"depths": (1, 1, 2, 1), "regions": 4, "topks": (1, 2, 4, None), "head_dim": 16}

VARIANTS = {
    "vit": Variant("vit_tiny_patch16_224", _VIT),
    "vit-agent": Variant("vit_tiny_patch16_224", _VIT, Agent(16)),
    "vit-gna": Variant("vit_tiny_patch16_224", _VIT, Neighborhood(5)),
    "vit-hilo": Variant("vit_tiny_patch16_224", _VIT, HiLo(0.5, 2)),
    "agent-deit": Variant("va_agent_deit_tiny_patch16_224", {**_VIT, "agents": 16}),
    "agent-pvt": Variant("va_agent_pvt_tiny", {**_SIZED, "embed_dims": _DIMS, "agents": (9, 9, 9, 4)}),
    "agent-swin": Variant("va_agent_swin_tiny", {**_SIZED, **_SWIN, "embed_dim": 16}),
    "agent-cswin": Variant("va_agent_cswin_tiny", {**_SIZED, **_CSWIN, "embed_dim": 16}),
    "nat": Variant("va_nat_mini", _NAT),
    "dinat": Variant("va_dinat_mini", {**_NAT, "dilations": (5, 2, 1, 1)}),
    "biformer": Variant("va_biformer_tiny", {**_BIFORMER, "embed_dims": _DIMS}),
    "litv2": Variant("va_litv2_small", {**_STAGES, "embed_dim": 16}),
    "crossformer": Variant("va_crossformer_tiny", {**_STAGES, "embed_dim": 16, "group_size": 4}),
}


@dataclass(frozen=True)
class Result:
    """What a training run gave.

    Args:
        variant: Key of `VARIANTS`.
        task: Key of `TASKS`.
        parameters: Of the model.
        accuracy: Share of the test images whose class comes out right.
        images_per_second: Of training, forward and backward, over the whole run.
    """

    variant: str
    task: str
    parameters: int
    accuracy: float
    images_per_second: float


def train(
    variant: Variant, task: Task, epochs: int, seed: int = 0, on_step: Callable[[float], object] = lambda loss: None
) -> nn.Module:
    """Train a variant with AdamW and a cosine schedule.

    Args:
        variant: What to train.
        task: On what.
        epochs: Passes over the images, at least 1.
        seed: Of weights and order.
        on_step: Told each step's loss.

    Returns:
        The model in eval mode, patched if the variant has an operator.

    Raises:
        RuntimeError: The loss is not finite.
    """
    torch.manual_seed(seed)
    model = create_model(variant.name, num_classes=task.classes, **variant.arguments).train()
    if variant.operator is not None:
        patch(model, variant.operator)
    steps = epochs * math.ceil(len(task.train) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
    for _ in range(epochs):
        for batch in torch.randperm(len(task.train)).split(BATCH):
            loss = cross_entropy(model(_moved(task.train[batch])), task.train_labels[batch])
            if not loss.isfinite():
                raise RuntimeError(f"quick_train: the loss of {variant.name} must be finite, got {loss.item()}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step(loss.item())
    return model.eval()


def _rate(step: int, steps: int) -> float:
    """Factor on the learning rate: a rise, then half a cosine."""
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _moved(images: Tensor) -> Tensor:
    """The batch moved by a few pixels, borders repeated, so that small tasks are not learned by heart."""
    rows, columns = torch.randint(0, 2 * MOVED_PX + 1, (2,)).tolist()
    padded = nn.functional.pad(images, (MOVED_PX,) * 4, mode="replicate")
    return padded[:, :, rows : rows + images.shape[2], columns : columns + images.shape[3]]


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """Share of the test images whose class comes out right."""
    right = sum(
        int((model(images).argmax(-1) == labels).sum())
        for images, labels in zip(task.test.split(BATCH), task.test_labels.split(BATCH), strict=True)
    )
    return right / len(task.test)


def run(variants: Sequence[str], tasks: Sequence[str], epochs: int | None, seed: int) -> Iterator[Result]:
    """Train each variant on each task, with a progress bar.

    Args:
        variants: Keys of `VARIANTS`.
        tasks: Keys of `TASKS`.
        epochs: Passes over the images; None for `EPOCHS`.
        seed: Of data, weights and order.
    """
    made = {name: TASKS[name](seed) for name in tasks}  # all at once: what is missing is told before hours of work
    for task_name, task in made.items():
        passes = EPOCHS[task_name] if epochs is None else epochs
        for name in variants:
            steps = passes * math.ceil(len(task.train) / BATCH)
            with tqdm(total=steps, desc=f"{name}, {task_name}", unit="step", leave=False, dynamic_ncols=True) as bar:

                def on_step(loss: float, bar: Any = bar) -> None:
                    bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
                    bar.update()

                start = time.perf_counter()
                model = train(VARIANTS[name], task, passes, seed, on_step)
                seconds = time.perf_counter() - start
            parameters = sum(parameter.numel() for parameter in model.parameters())
            yield Result(name, task_name, parameters, accuracy(model, task), passes * len(task.train) / seconds)


def markdown(results: Sequence[Result]) -> str:
    """Results as a table, one row per variant."""
    tasks = list(dict.fromkeys(result.task for result in results))
    found = {(result.variant, result.task): result for result in results}
    header = ["backbone", "parameters", *(f"{task}, accuracy" for task in tasks), "training images/s"]
    rows = [header, ["---"] * len(header)]
    for name in dict.fromkeys(result.variant for result in results):
        own = [found[name, task] for task in tasks if (name, task) in found]
        rates = [result.images_per_second for result in own]
        accuracies = [f"{found[name, task].accuracy:.1%}" if (name, task) in found else "-" for task in tasks]
        rows.append([name, f"{own[0].parameters:,}", *accuracies, f"{statistics.mean(rates):.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vision_attn.backbones.quick_train", description=__doc__)
    add = parser.add_argument
    names = [*VARIANTS, "all"]
    add("--model", nargs="+", choices=names, default=["all"], metavar="MODEL", help=", ".join(names))
    add("--data", nargs="+", choices=TASKS, default=list(TASKS), metavar="DATA", help=", ".join(TASKS))
    add("--epochs", type=whole_number, help=f"passes over the images, by default {EPOCHS}")
    add("--seed", type=seed_number, default=0, help="of data, weights and order")
    add("--threads", type=whole_number, help="threads of PyTorch")
    add("--out", type=Path, help="a .json file for the results")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        parser.error(f"--out must be a file in a folder that exists, got {options.out}")
    variants = list(VARIANTS) if "all" in options.model else options.model
    results: list[Result] = []
    interrupted = False
    try:
        for result in run(variants, options.data, options.epochs, options.seed):
            results.append(result)
            rate = f"{result.images_per_second:.0f} images/s"
            tqdm.write(f"{result.variant}, {result.task}: {result.accuracy:.1%}, {rate}")
    except ImportError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        interrupted = True
    print(markdown(results))
    if options.out is not None:
        _write(options.out, json.dumps([asdict(result) for result in results], indent=2) + "\n")
    if interrupted:
        print(f"quick_train: interrupted after {len(results)} results", file=sys.stderr)
        raise SystemExit(130)


def _write(path: Path, text: str) -> None:
    """All of the file or nothing of it."""
    partial_file = path.with_name(f".{path.name}.part")
    partial_file.write_text(text)
    partial_file.replace(path)


def whole_number(text: str) -> int:
    """What the user typed, at least 1; the name is in argparse's message for other text."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def seed_number(text: str) -> int:
    """What the user typed, at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


if __name__ == "__main__":
    main()
