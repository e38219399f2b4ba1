"""Latents moved by the gradient of a loss of their attention maps, before a denoising step.

Source: A-STAR (arXiv 2306.14544), section 3, equation 4; Attend-and-Excite (arXiv 2301.13826), section 4.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.guidance.capture import AttentionCapture
from vision_attn.guidance.losses import attend_and_excite_loss, retention_loss, segregation_loss
from vision_attn.guidance.maps import binarize, concept_maps

MapLoss = Callable[[Tensor, "Tensor | None"], Tensor]
"""A loss of maps `[n, Y, X]` of one sample and of the masks of the step before, None in the first."""

_FLOAT16_SCALE = 1024.0  # gradients are about 1e-5, near the end of what float16 can say


def a_star_loss(maps: Tensor, masks: Tensor | None) -> Tensor:
    """Segregation, and from the second step on retention: equation 4 of A-STAR before the gradient."""
    loss = segregation_loss(maps)
    return loss if masks is None else loss + retention_loss(maps, masks)


LOSSES: dict[str, MapLoss] = {
    "a-star": a_star_loss,
    "attend-and-excite": lambda maps, masks: attend_and_excite_loss(maps),
}


class LatentGuide:
    """Moves latents down the gradient of a loss, step after step of one run.

    Args:
        model: The denoiser, see `AttentionCapture`; its parameters get no gradient.
        groups: Per sample, the token positions of each concept.
        text: Per sample, the positions of the tokens that compete for a pixel's attention; None for all but the first
            and the last, where the first is BOS.
        loss: A name of `LOSSES`, or a function of maps and masks.
        threshold: Of the masks, see `binarize`.
        mode: Of the masks, see `binarize`.
        layers: Whose maps are taken, see `AttentionCapture`.
        resolution: Of the maps, see `AttentionCapture`.

    Attributes:
        losses: Per step so far, the loss of each sample before its last move.
        maps: Of each sample, `[n, Y, X]` of the last forward.

    Raises:
        ValueError, TypeError: an unknown loss, a sample without concepts.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Sequence[int]]],
        *,
        text: Sequence[Sequence[int]] | None = None,
        loss: str | MapLoss = "a-star",
        threshold: float = 0.5,
        mode: str = "relative",
        layers: str | Sequence[str] | None = None,
        resolution: tuple[int, int] | None = None,
    ) -> None:
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"LatentGuide: loss must be one of {', '.join(LOSSES)} or a function, got {loss!r}")
        if not isinstance(loss, str) and not callable(loss):
            raise TypeError(f"LatentGuide: loss must be a name or a function of maps and masks, got {loss!r}")
        if not all(groups):
            raise ValueError("LatentGuide: groups must hold at least one concept per sample, got none: name concepts")
        binarize(torch.ones(1, 1, 1), threshold, mode)  # refuses what is out of range before any work
        self.model, self.groups, self.text, self.layers, self.resolution = model, groups, text, layers, resolution
        self.loss: MapLoss = LOSSES[loss] if isinstance(loss, str) else loss
        self.threshold, self.mode = threshold, mode
        self.losses: list[list[float]] = []
        self.maps: list[Tensor] = []
        self._masks: list[Tensor | None] = [None] * len(groups)

    def move(
        self,
        latents: Tensor,
        step_size: float,
        forward: Callable[[Tensor], object],
        *,
        target: float | None = None,
        iterations: int = 20,
    ) -> Tensor:
        """Latents for the next denoising step.

        Args:
            latents: `[B, ...]`, a row per sample of `groups`.
            step_size: Factor on the gradient; 0 leaves the latents as they are, bit for bit.
            forward: Calls the model on latents with the samples' own text, scaled as the scheduler wants it.
            target: Loss above which a sample moves again and again before its one move; None for that one alone.
            iterations: Of these moves, at most.

        Returns:
            Latents in the same dtype.

        Raises:
            ValueError: another number of latents than of samples.
            TypeError: a loss that is no scalar tensor with a gradient.
            RuntimeError: a loss or a gradient that is not finite.

        Source: `target` is the iterative refinement of Attend-and-Excite, algorithm 1.
        """
        maps, losses, gradient = self._look(latents, forward)
        for _ in range(iterations):
            far = losses > (math.inf if target is None else target)
            if step_size == 0 or not far.any():
                break
            steps = step_size * far.view(-1, *[1] * (latents.ndim - 1))
            latents = (latents.float() - steps * gradient).to(latents.dtype)
            maps, losses, gradient = self._look(latents, forward)
        self.losses.append(losses.tolist())
        self.maps = [each.detach() for each in maps]
        self._masks = [binarize(each, self.threshold, self.mode) for each in self.maps]
        return latents if step_size == 0 else (latents.float() - step_size * gradient).to(latents.dtype)

    @torch.no_grad()
    def look(self, latents: Tensor, forward: Callable[[Tensor], object]) -> None:
        """Take the maps, and move nothing.

        Args:
            latents: As of `move`.
            forward: As of `move`.
        """
        with self._maps(latents, forward) as maps:
            self.maps = maps

    @contextlib.contextmanager
    def _maps(self, latents: Tensor, forward: Callable[[Tensor], object]) -> Iterator[list[Tensor]]:
        """Of one forward. Gradients are to be taken inside of the block, see `AttentionCapture`."""
        if latents.shape[0] != len(self.groups):
            raise ValueError(f"LatentGuide: latents must be {len(self.groups)} samples, got {latents.shape[0]}")
        with AttentionCapture(
            self.model, layers=self.layers, resolution=self.resolution, text=self.text, stop=True
        ) as capture:
            forward(latents)
            yield [
                concept_maps(sample, groups, text=None if self.text is None else self.text[number])
                for number, (sample, groups) in enumerate(zip(capture.probabilities, self.groups, strict=True))
            ]

    def _look(self, latents: Tensor, forward: Callable[[Tensor], object]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Maps, losses, and their gradient in float32."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "LatentGuide: latents must be moved outside of torch.inference_mode(): use torch.no_grad()"
            )
        scale = _FLOAT16_SCALE if latents.dtype == torch.float16 else 1.0
        with torch.enable_grad(), _frozen(self.model):
            moved = latents.detach().clone().requires_grad_()
            with self._maps(moved, forward) as maps:
                losses = torch.stack([self._loss_of(*pair) for pair in zip(maps, self._masks, strict=True)])
                (gradient,) = torch.autograd.grad(scale * losses.sum(), moved)
        if not (losses.isfinite().all() and gradient.isfinite().all()):
            raise RuntimeError(
                f"LatentGuide: loss and gradient must be finite, got losses {losses.tolist()}: use float32 or bfloat16"
            )
        return maps, losses.detach(), gradient.float() / scale

    def _loss_of(self, maps: Tensor, masks: Tensor | None) -> Tensor:
        loss: Any = self.loss(maps, masks)
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad):
            got = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"LatentGuide: loss must give a scalar tensor with a gradient to the maps, got {got}")
        return loss


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients of parameters, for which activations would be kept."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def step_sizes(steps: int, step_size: float = 20.0, share: float = 0.5) -> list[float]:
    """A falling schedule over the first steps of a run, 0 after them.

    Args:
        steps: Of the run.
        step_size: Of the first step; it falls with the square root of a line to half of that line's start, over the
            whole run.
        share: Of the steps that get any, 0 to 1; 1 is the paper's.

    Raises:
        ValueError: a share out of range, a step size that is negative or not finite.

    Source: `20 * sqrt(linspace(1, 0.5, T))` is Attend-and-Excite's; A-STAR gives no schedule.

    Example:
        >>> [round(size, 2) for size in step_sizes(4)]
        [20.0, 18.26, 0.0, 0.0]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"step_sizes: share must be from 0 to 1, got {share}")
    if not 0 <= step_size < math.inf:
        raise ValueError(f"step_sizes: step_size must be at least 0 and finite, got {step_size}")
    line = torch.linspace(1, 0.5, steps, dtype=torch.float64).sqrt().tolist()
    last = round(share * steps)
    return [step_size * factor if index < last else 0.0 for index, factor in enumerate(line)]
