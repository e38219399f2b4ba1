"""The moves of latents in one run of a pipeline: which concepts, how far, and before which steps.

A-STAR around a pipeline, as its callback and as a block of a modular one make the same moves, these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from vision_attn.guidance.latents import LatentGuide, MapLoss, step_sizes
from vision_attn.pipelines.denoiser import Denoiser

_FORGETFUL = ("PNDMScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler")


@dataclass(frozen=True)
class Settings:
    """How latents are moved: arguments of `AStarPipeline`'s call, by their names there."""

    loss: str | MapLoss = "a-star"
    step_size: float = 20.0
    share: float = 0.5
    refine: Mapping[int, float] = field(default_factory=dict)
    iterations: int = 20
    threshold: float = 0.5
    mode: str = "relative"
    layers: str | Sequence[str] | None = None
    resolution: tuple[int, int] | None = None
    return_maps: bool = False


class Moves:
    """What one run does to its latents.

    Args:
        where: Who asks, for messages.
        denoiser: The run.
        concepts: Of each of its prompts, as of `Denoiser.concepts`.
        settings: How to move.
        uncorrected: Whether the caller keeps the scheduler from correcting the steps before moves.

    Attributes:
        moved: Steps before which latents move.

    Raises:
        NotImplementedError: a scheduler that goes back to latents of its own (PNDM, Heun, KDPM2, single-step
            DPM-Solver, SA-Solver; UniPC if it corrects).
        ValueError, TypeError: concepts that a prompt does not have, settings out of range.
    """

    def __init__(
        self, where: str, denoiser: Denoiser, concepts: Sequence[Any], settings: Settings, *, uncorrected: bool = False
    ) -> None:
        _check_scheduler(where, denoiser.pipe.scheduler, uncorrected)
        self.denoiser, self.settings = denoiser, settings
        self._concepts = [
            names
            for prompt, own in zip(denoiser.prompts, concepts, strict=True)
            for names in [denoiser.concepts(where, prompt, own)] * denoiser.images
        ]
        self.guide = LatentGuide(
            denoiser.module, [list(names.values()) for names in self._concepts], text=denoiser.words(),
            loss=settings.loss, threshold=settings.threshold, mode=settings.mode, layers=settings.layers,
            resolution=settings.resolution,
        )  # fmt: skip
        self._sizes = step_sizes(len(denoiser.timesteps), settings.step_size, settings.share)
        self.moved = [index for index, size in enumerate(self._sizes) if size]
        _check_refinement(where, settings, self.moved)

    def begin(self, noise: Tensor) -> Tensor:
        """Noise that the pipeline makes the moved latents of its first step of.

        Args:
            noise: What the pipeline would begin with.
        """
        scale = self.denoiser.noise_scale
        latents = noise * scale
        return noise + (self.before(0, latents) - latents) / scale  # the pipeline multiplies: no move changes no bit

    def before(self, index: int, latents: Tensor) -> Tensor:
        """Latents for a step.

        Args:
            index: Of the step; beyond the last one latents stay.
            latents: As the scheduler gave them.
        """
        if index >= len(self._sizes):
            return latents
        forward, size = partial(self.denoiser.forward, index=index), self._sizes[index]
        if size:
            # A step size means the same under every scheduler: it is one of what the model sees. Where latents are s
            # times as large, their gradient is s times smaller, and a move of them must be s times larger.
            size *= self.denoiser.latent_scale(index) ** 2
            target = self.settings.refine.get(index)
            return self.guide.move(latents, size, forward, target=target, iterations=self.settings.iterations)
        if self.settings.return_maps and index + 1 == len(self._sizes):
            self.guide.look(latents, forward)
        return latents

    @property
    def losses(self) -> list[list[float]]:
        """Per step so far, the loss of each image before the step's last move."""
        return self.guide.losses

    @property
    def maps(self) -> list[dict[str, Tensor]]:
        """Per image, `[Y, X]` of each concept in the last step that needed maps, on the CPU; none before that."""
        return [
            dict(zip(names, maps.cpu(), strict=True))
            for names, maps in zip(self._concepts, self.guide.maps, strict=False)
        ]


def one_per_prompt(where: str, prompt: str | Sequence[str], concepts: Any) -> tuple[list[str], list[Any]]:
    """The prompts, and the concepts of each.

    Raises:
        ValueError: concepts that are not one list per prompt.
    """
    if isinstance(prompt, str):
        return [prompt], [concepts]
    prompts = list(prompt)
    if concepts is None:
        return prompts, [None] * len(prompts)
    if isinstance(concepts, str) or len(concepts) != len(prompts):
        raise ValueError(f"{where}: concepts must be one list per prompt, {len(prompts)}, got {concepts!r}")
    return prompts, list(concepts)


def _check_scheduler(where: str, scheduler: Any, uncorrected: bool) -> None:
    """Refuse schedulers that go back to a sample that they kept: moves would be lost."""
    name = type(scheduler).__name__
    corrects = hasattr(scheduler, "disable_corrector") and not uncorrected
    if name in _FORGETFUL or getattr(scheduler, "order", 1) > 1 or corrects:
        raise NotImplementedError(
            f"{where}: scheduler must go on from the latents it is given, got {name}, which goes back to its own: use "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config), or Euler or DPM++ 2M"
        )


def _check_refinement(where: str, settings: Settings, moved: Sequence[int]) -> None:
    if not isinstance(settings.refine, Mapping):
        raise TypeError(f"{where}: refine must be a mapping of steps to losses, got {settings.refine!r}")
    strange = [step for step in settings.refine if step not in moved]
    if strange:
        raise ValueError(f"{where}: refine must name steps before which latents move, {moved} here, got {strange}")
    if settings.iterations < 0:
        raise ValueError(f"{where}: iterations must be at least 0, got {settings.iterations}")
