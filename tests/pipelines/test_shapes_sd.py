"""The embedded Stable Diffusion: it is small, draws under every scheduler, and A-STAR does to it what it should."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from vision_attn.guidance import jensen_shannon_loss, symmetric_kl_loss
from vision_attn.pipelines import AStarPipeline, StructuredDiffusionPipeline
from vision_attn.pipelines.loading import find_model, load_pipeline, run_defaults
from vision_attn.shapes.detector import score
from vision_attn.shapes.splits import split_captions

DEFAULTS = run_defaults("shapes-sd")
SIZE = {name: DEFAULTS[name] for name in ("height", "width", "num_inference_steps", "guidance_scale")}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("shapes-sd")


def noise(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_it_is_a_small_stock_pipeline(pipe: Any) -> None:
    assert type(pipe) is diffusers.StableDiffusionPipeline
    folder = find_model("shapes-sd")
    assert isinstance(folder, Path)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25_000_000
    assert "Scores" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"],
)
def test_every_scheduler_draws_what_the_caption_says(pipe: Any, scheduler: str) -> None:
    captions = split_captions("one", 4) + split_captions("two", 4)
    stock = pipe.scheduler
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # numpy's, of Euler's sigmas
        pipe.scheduler = getattr(diffusers, scheduler).from_config(stock.config)
        try:
            images = pipe(captions, generator=noise(8), **SIZE).images
        finally:
            pipe.scheduler = stock
    right = [score(image, caption).objects for image, caption in zip(images, captions, strict=True)]
    assert sum(right) >= 7, right


def test_guidance_lowers_the_loss_of_every_caption_it_was_not_tuned_on(pipe: Any) -> None:
    captions = split_captions("three", 4)
    settings = SIZE | {"resolution": DEFAULTS["guidance"]["a-star"]["resolution"], "output_type": "latent"}
    guided = AStarPipeline.from_pipe(pipe)
    moved, still = (
        guided(captions, generator=noise(4), step_size=size, **settings).losses
        for size in (DEFAULTS["guidance"]["a-star"]["step_size"], 1e-12)
    )
    assert len(moved) == len(still) == 10
    assert moved[0] == still[0]
    assert all(one < other for one, other in zip(moved[-1], still[-1], strict=True))


@pytest.mark.parametrize("divergence", [symmetric_kl_loss, jensen_shannon_loss])
def test_divergences_of_words_that_belong_together_are_losses_too(pipe: Any, divergence: Any) -> None:
    def loss(maps: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        return divergence(maps, [(0, 1), (2, 3)])

    settings = SIZE | {"resolution": (16, 16), "output_type": "latent", "num_inference_steps": 6, "loss": loss}
    caption, concepts = "a green circle and a purple star", ["green", "circle", "purple", "star"]
    guided = AStarPipeline.from_pipe(pipe)
    moved, still = (
        guided(caption, concepts=concepts, generator=noise(1), step_size=size, **settings).losses
        for size in (20.0, 1e-12)
    )
    assert moved[0] == still[0]
    assert moved[-1][0] < still[-1][0]


def test_structured_text_changes_pictures_and_only_where_asked(pipe: Any) -> None:
    structured = StructuredDiffusionPipeline.from_pipe(pipe)
    options = SIZE | {"num_inference_steps": 4, "output_type": "pt"}
    caption = "a red circle and a blue square"
    plain = pipe(caption, generator=noise(1), **options).images
    for mode in ("paper", "covering", "replace", "conjunction"):
        assert not torch.equal(structured(caption, mode=mode, generator=noise(1), **options).images, plain)
        assert torch.equal(structured(caption, mode=mode, strength=0, generator=noise(1), **options).images, plain)
