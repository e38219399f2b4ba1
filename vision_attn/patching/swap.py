"""Swapping attention: `patch`, `unpatch` and the `Patch` they work on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from vision_attn.errors import PatchError
from vision_attn.patching.diffusers import (
    Plan,
    attention_modules,
    call_module,
    denoisers,
    left_out,
    models_of,
    plan,
    timestep_direction,
)
from vision_attn.patching.grids import check_grid
from vision_attn.patching.installation import Installation, installations
from vision_attn.patching.ltx2_decoder import OwnWindow, check_arguments, is_decoder, plan_decoder
from vision_attn.patching.report import Call, Routed, Skipped, table
from vision_attn.patching.selection import make_rules, require_matches, rules_for
from vision_attn.patching.stages import check_stages
from vision_attn.patching.steps import OUTSIDE, StepTracker, check_steps
from vision_attn.patching.timm import check_timm_arguments, is_timm, plan_timm, timm_attention


class Patch:
    """Attention operators in a model or pipeline; a context manager that removes them on exit.

    Attributes:
        routed: The patched layers, each with `.name` and `.operator`.
        skipped: Attention that was left alone, each with `.name` and `.reason`.
    """

    def __init__(self, installed: Iterable[Installation], left_out: Iterable[Skipped] = ()) -> None:
        self._installations = list(installed)
        self._left_out = list(left_out)
        self._removed = False

    @property
    def routed(self) -> list[Routed]:
        """Layers whose attention goes to an operator: `.name`, `.operator`."""
        return [
            Routed(layer.name, layer.operator)
            for installation in self._installations
            for layer in installation.layers
            if layer.name not in installation.lost
        ]

    @property
    def skipped(self) -> list[Skipped]:
        """What keeps its attention: `.name`, `.reason`.

        Layers left as they are, layers that have lost their operator since, and denoising models of the pipeline that
        the patch does not reach.
        """
        layers = [
            skipped
            for installation in self._installations
            for skipped in [
                *installation.skipped,
                *(Skipped(name, reason) for name, reason in installation.lost.items()),
            ]
        ]
        return [*layers, *self._left_out]

    @property
    def calls(self) -> dict[str, list[Call]]:
        """Attention calls of the last forward (with `steps=`: of the last run) by layer: `.kind`, `.reason`, `.layout`.

        Layers inside compiled graphs list nothing.
        """
        return {
            layer.name: list(layer.calls)
            for installation in self._installations
            for layer in installation.layers
            if layer.calls and installation.current
        }

    def parameters(self) -> Iterator[nn.Parameter]:
        """Learned parameters of the operators, layer by layer."""
        yield from (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Learned parameters with their keys, `<attention module>.processor.<name>`."""
        for installation in self._installations:
            for layer in installation.layers:
                for name, parameter in layer.parameters.items():
                    yield f"{layer.name}.processor.{name}", parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Learned parameters by key, detached."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy learned parameters from a dict with the keys of `state_dict()`.

        Raises:
            KeyError: Missing or unexpected keys.
            TypeError: Something that is no tensor.
            ValueError: A tensor of another shape.
        """
        own = dict(self.named_parameters())
        missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        if missing or unexpected:
            raise KeyError(
                f"load_state_dict: state_dict must have the keys of this patch, got missing {missing[:3]} and "
                f"unexpected {unexpected[:3]}: compare with Patch.state_dict()"
            )
        for name, parameter in own.items():
            if not isinstance(state_dict[name], torch.Tensor):
                raise TypeError(f"load_state_dict: {name} must be a tensor, got a {type(state_dict[name]).__name__}")
            if parameter.shape != state_dict[name].shape:
                raise ValueError(
                    f"load_state_dict: {name} must have shape {tuple(parameter.shape)}, got "
                    f"{tuple(state_dict[name].shape)}"
                )
        for name, parameter in own.items():
            parameter.copy_(state_dict[name])

    def remove(self) -> None:
        """Put the original attention back; calling it again does nothing."""
        self._removed = True
        for installation in self._installations:
            installation.remove()

    def __enter__(self) -> Patch:
        if self._removed:
            raise PatchError("patch: a patch must be entered before it is removed, got a removed one: call patch again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<Patch: {len(self.routed)} layers routed, {len(self.skipped)} skipped>"

    def __str__(self) -> str:
        calls = self.calls
        rows: list[tuple[str, ...]] = [
            (layer.name, str(layer.operator), _calls_text(calls.get(layer.name, []))) for layer in self.routed
        ]
        rows += [(layer.name, "-", layer.reason) for layer in self.skipped]
        return table(rows, ("layer", "operator", "calls"))


def patch(
    target: Any,
    op: Any = None,
    *,
    layers: Any = None,
    steps: Any = None,
    grid: Any = None,
    strict: bool = True,
    trainable: bool = False,
) -> Patch:
    """Swap the spatial self- and joint attention of a diffusers pipeline or model, or of a timm model, for an operator.

    Each attention keeps its projections, norms and positions; only the attention call itself goes to `op`. Weights,
    LoRA, offloading, gradient checkpointing and saving work as on the stock model; so does `torch.compile`, with one
    graph per token grid (give it `dynamic=False`). IP-Adapters, fused projections and other new processors are routed
    again at the next forward. With gradient checkpointing call `backward` before the next forward: recomputed layers
    use the token grid of the last one. One thread at a time may run a patched model.

    Args:
        target: A diffusers pipeline, transformer, UNet or LTX-2.5 diffusion video decoder; or a timm model, also with
            `features_only=True`: a vision transformer (ViT, DeiT, DINOv2, DINOv3, SigLIP, EVA, BEiT, NaFlexViT), whose
            class and register tokens see everything and are seen by all, or Swin, MaxViT, CoAtNet, DaViT, PVTv2 or
            Hiera, where the grid of an operator is what one attention sees: a window, a mask unit or the map of a
            stage. It takes `op`, `layers` and `strict` only.
        op: An operator object such as `va.Clear(radius=8)`; left out when `layers` is a dict. The LTX-2.5 decoder is
            made of neighborhood attention: left out for it, each layer keeps its own window, in linear memory.
        layers: `None` for every self- and joint attention, a glob or list of globs on module names, a predicate on
            names, or `{glob: operator}`, of which the first match counts.
        steps: Range or set of denoising steps (the first is 0) in which the operator is active; dense otherwise. In a
            dict `{range(20): operator, range(20, 50): other}` operators take turns, the first that has a step counts;
            `op` is then left out. With gradient checkpointing call `backward` in each step. A model
            without its pipeline is followed by its timesteps alone, and a run begins when they turn back from clean to
            noisy: runs that begin less noisy than the last one ended cannot be told from its next step.
        grid: Token grid `(Y, X)` or `(T, Y, X)` for a model whose layout is not known or cannot be read in a compiled
            graph; an error where the model says another. The image tokens are taken to be the last of the sequence; a
            `TokenLayout` says otherwise.
        strict: Raise when a layer runs outside of a forward of its model (`model.forward(...)` skips the hooks), when a
            self-attention call cannot go to its operator (a mask it refuses, causal or dropped-out attention; windows
            under a mask or bias that they refuse are computed exactly, but densely, which `Patch.calls` tells), after a
            forward in which a layer's self-attention never had the tokens of its layout or no operator was called at
            all, and when a layer lost its processor to another. With `False` such calls are dense and listed in
            `Patch.calls`. Cross-attention stays dense in both cases.
        trainable: Register learned operator parameters in the model, so that its optimizers and state dict have them.

    Returns:
        The patch: a report, and a context manager that removes it.

    Raises:
        PatchError: Nothing to route, an unknown or refused model, a layer that is patched already, context parallelism.
        TypeError, ValueError: An argument that is none of the above; operators with learned parameters by steps.

    Example:
        >>> import diffusers, torch, vision_attn as va
        >>> model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> with va.patch(model, va.Dense()) as p:
        ...     [layer.name for layer in p.routed]
        ['transformer_blocks.0.attn1']
    """
    if is_timm(target):
        check_timm_arguments(target, grid=grid, steps=steps, trainable=trainable)
        rules = make_rules(op, layers)
        require_matches(rules, [("", name) for name, _ in timm_attention(target)])
        return _installed([plan_timm(target, rules, strict)], [])
    models = denoisers(target)
    stages = check_stages(op, layers, steps) if isinstance(steps, Mapping) else None
    op = op if stages is None else stages
    if op is None and not isinstance(layers, Mapping) and all(is_decoder(model) for _, model in models):
        op = OwnWindow()
    rules = make_rules(op, layers) if stages is None else rules_for(stages, layers)
    given = None if grid is None else check_grid(grid)
    numbers = stages if stages is not None or steps is None else check_steps(steps)
    require_matches(
        rules, [(prefix, name) for prefix, model in models for name, _ in attention_modules(call_module(model))]
    )
    pipeline = target if not isinstance(target, nn.Module) else None
    tracker = None if numbers is None else StepTracker(numbers, pipeline, timestep_direction(models))
    plans = []
    for prefix, model in models:
        if is_decoder(model):
            check_arguments(model, grid=grid, steps=steps, trainable=trainable)
            plans.append(plan_decoder(prefix, model, rules, strict))
        else:
            plans.append(plan(prefix, model, rules, given, strict, trainable, tracker))
    return _installed(plans, left_out(target, models))


def _installed(plans: Sequence[Plan], others: Iterable[Skipped]) -> Patch:
    if not any(planned.routed for planned in plans):
        skipped = [left for planned in plans for left in planned.skipped]
        skipped.sort(key=lambda left: left.reason == "not selected by layers")  # those that were selected first
        reasons = "; ".join(f"{left.name}: {left.reason}" for left in skipped[:3])
        raise PatchError(
            f"patch: layers must leave at least one attention to route, got none: {reasons or 'no attention'}"
        )
    return Patch([planned.install() for planned in plans], others)


def unpatch(target: Any) -> None:
    """Remove every patch of a pipeline or model; the identical original processors are back.

    Args:
        target: What was patched, or what holds it: patches of a model's parts and of a pipeline's ControlNets end as
            well. An unpatched target is left as it is.

    Raises:
        TypeError: Not a pipeline or model.
    """
    for model in models_of(target).values():
        for module in list(model.modules()):
            for installation in reversed(installations(module)):
                installation.remove()


def _calls_text(calls: list[Call]) -> str:
    outside = sum(call.reason.startswith(OUTSIDE) for call in calls)
    texts = [
        f"{call.kind}{f' ({call.reason})' if call.reason else ''}"
        for call in calls
        if outside < 2 or not call.reason.startswith(OUTSIDE)
    ]
    return ", ".join([*texts, *([f"dense ({outside} denoising steps are not in steps)"] if outside > 1 else [])])
