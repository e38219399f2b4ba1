"""Finding what to patch in diffusers pipelines and models, and planning it layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vision_attn.errors import PatchError
from vision_attn.layout import TokenLayout
from vision_attn.patching.cell import Cell, Switch
from vision_attn.patching.grids import GivenGrid, GivenLayout
from vision_attn.patching.hooks import LayoutFunction, forward_arguments
from vision_attn.patching.installation import Installation
from vision_attn.patching.layer import Layer
from vision_attn.patching.layouts import FAMILIES, REFUSED, Family, family_of
from vision_attn.patching.layouts.unet import relative_sizes, tells_levels
from vision_attn.patching.parameters import initial_parameters
from vision_attn.patching.report import Skipped
from vision_attn.patching.routing import Processor, Route, attention_calls, is_routed, stock_of
from vision_attn.patching.selection import Rule
from vision_attn.patching.stages import any_limit, too_coarse
from vision_attn.patching.steps import TIMESTEP_NAMES, StepTracker

DENOISER_NAMES = ("transformer", "transformer_2", "unet", "prior", "decoder", "diffusion_decoder")


def models_of(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by name, each once; or the model itself under an empty name.

    Raises:
        TypeError: Neither a diffusers pipeline nor a model.
    """
    if isinstance(target, nn.Module):
        return {"": target}
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"patch: target must be a diffusers pipeline or model, got {type(target).__name__}")
    models: dict[str, nn.Module] = {}
    for name, part in components.items():
        if isinstance(part, nn.Module) and not any(part is known for known in models.values()):
            models[name] = part
    return models


def denoisers(target: Any) -> list[tuple[str, nn.Module]]:
    """The models of a pipeline that denoise, each with a prefix for the names of its layers; or the model itself.

    Of a pipeline those whose layout is known are taken, or all denoisers when there is none.

    Raises:
        PatchError: A pipeline without denoiser.
        TypeError: Something else.
    """
    models = models_of(target)
    if isinstance(target, nn.Module):
        return list(models.items())
    found = [(name, part) for name, part in models.items() if _is_denoiser(name, part)]
    if not found:
        found = [(name, part) for name, part in models.items() if name in DENOISER_NAMES]
    if not found:
        raise PatchError(
            f"patch: target must have a transformer or unet, got {type(target).__name__} with "
            f"{', '.join(models) or 'no model'}"
        )
    return [("" if len(found) == 1 else f"{name}.", part) for name, part in found]


def left_out(target: Any, patched: Sequence[tuple[str, nn.Module]]) -> list[Skipped]:
    """Models that take part in denoising and are none of the `patched` ones, with the reason."""
    skipped = []
    for name, part in models_of(target).items():
        if any(part is model for _, model in patched) or not ("controlnet" in name or name in DENOISER_NAMES):
            continue
        cls = type(call_module(part)).__name__
        skipped.append(Skipped(name, REFUSED.get(cls, f"{cls} is not patched with the pipeline: patch it by itself")))
    return skipped


def timestep_direction(models: Sequence[tuple[str, nn.Module]]) -> int:
    """Where timesteps go in a run of these models: -1 falling, 1 rising, 0 not known."""
    for _, model in models:
        for cls in type(call_module(model)).__mro__:
            for family in FAMILIES:
                if cls.__name__ in family.classes:
                    return family.timesteps
    return 0


def _is_denoiser(name: str, model: nn.Module) -> bool:
    known = {served for family in FAMILIES for served in family.classes}
    return "controlnet" not in name and any(cls.__name__ in known for cls in type(call_module(model)).__mro__)


def call_module(model: nn.Module) -> nn.Module:
    """The model inside a `torch.compile` wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a model that have an attention processor, with their names."""
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None and callable(processor):
            yield name.replace("_orig_mod.", ""), module


@dataclass
class Plan:
    """What patching one model would do; nothing is changed before `install`."""

    installation: Installation
    routed: list[tuple[nn.Module, Layer]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    scopes: list[tuple[nn.Module, LayoutFunction, Cell]] = field(default_factory=list)
    blocks: list[tuple[nn.Module, Layer]] = field(default_factory=list)

    def install(self) -> Installation:
        """Put the routed processors in and register the hooks.

        A model without routed layers is watched only when steps are counted: its steps are steps of the pipeline.
        """
        for module, layer in self.routed:
            self.installation.add(module, layer)
        self.installation.skipped = self.skipped
        if self.routed or self.installation.tracker is not None:
            self.installation.watch(self.scopes, self.blocks)
        return self.installation


def plan(
    prefix: str,
    target: nn.Module,
    rules: Sequence[Rule],
    given: TokenLayout | None,
    strict: bool,
    trainable: bool,
    tracker: StepTracker | None,
) -> Plan:
    """Decide for each attention of a model whether it is routed, and where its layout comes from.

    Raises:
        PatchError: An unknown or refused model, a layer that is patched already, context parallelism, `steps=` on a
            model without timestep, `grid=` on a model with several grids.
    """
    model = call_module(target)
    if tracker is not None and not set(forward_arguments(model)[0]) & set(TIMESTEP_NAMES):
        raise PatchError(
            f"patch: steps must be None for {type(model).__name__}, whose forward takes no timestep, got "
            f"{tracker.steps}"
        )
    family, layout = _family(model, given)
    cells = _Cells(target, model, family, layout, given)
    result = Plan(Installation(model, target, Switch(), strict, tracker))
    routes: list[Route] = []
    sizes = _sizes(model, family, rules, cells)
    for name, module in attention_modules(model):
        shown, processor = prefix + name, module.processor
        rule = next((rule for rule in rules if rule.serves(prefix, name)), None)
        cell = cells.of(name)
        reason = "not selected by layers" if rule is None else _skip_reason(model, family, name, processor, cell)
        if rule is not None and not reason:
            reason = too_coarse(rule.operator, sizes[name])
        if rule is None or cell is None or reason:
            result.skipped.append(Skipped(shown, reason))
            continue
        layer = Layer(
            shown,
            _route(routes, rule.operator),
            cell,
            result.installation.switch,
            _original(shown, processor),
            strict,
            image_only=family is not None and any(fnmatchcase(name, pattern) for pattern in family.image_only),
            in_parts=family is not None and family.in_parts,
            size=sizes[name],
            initial=initial_parameters(rule.operator),
            trainable=trainable,
        )
        result.routed.append((module, layer))
        block = _block(model, name)
        if block is not None and getattr(rule.operator, "wants_block_input", False):
            result.blocks.append((block, layer))
    result.scopes = cells.used()
    return result


def _family(model: nn.Module, given: TokenLayout | None) -> tuple[Family | None, LayoutFunction]:
    if given is None:
        family = family_of(model)
        return family, family.layout
    known = {served for family in FAMILIES for served in family.classes}
    names = [cls.__name__ for cls in type(model).__mro__]
    if not any(name in known or name in REFUSED for name in names):
        return None, GivenLayout(given)
    family = family_of(model)
    if family.scope is not None:
        raise PatchError(
            f"patch: grid must be None for {type(model).__name__}, whose layers have several grids, got {given.grid}: "
            "they are read from the feature maps"
        )
    return family, GivenLayout(given) if given.text_tokens else GivenGrid(given.grid, family)


class _Cells:
    """One cell per scope; an attention uses that of the nearest enclosing scope."""

    def __init__(
        self,
        target: nn.Module,
        model: nn.Module,
        family: Family | None,
        layout: LayoutFunction,
        given: TokenLayout | None,
    ) -> None:
        self._layout = layout
        self._asked: set[str] = set()
        open_before = family is None and given is not None and not given.text_tokens
        open_after = family is not None and family.open_end
        if family is None or family.scope is None:
            self._scopes = {"": (target, Cell(open_before=open_before, open_after=open_after))}
        else:
            self._scopes = {
                name.replace("_orig_mod.", ""): (module, Cell(open_after=open_after))
                for name, module in model.named_modules()
                if any(cls.__name__ in family.scope for cls in type(call_module(module)).__mro__)
            }

    def of(self, name: str) -> Cell | None:
        """The cell for the attention module `name`, `None` when no scope encloses it."""
        while True:
            if name in self._scopes:
                self._asked.add(name)
                return self._scopes[name][1]
            if not name:
                return None
            name = name.rpartition(".")[0]

    def used(self) -> list[tuple[nn.Module, LayoutFunction, Cell]]:
        """Scopes that some attention uses."""
        return [(module, self._layout, cell) for name, (module, cell) in self._scopes.items() if name in self._asked]


def _skip_reason(model: nn.Module, family: Family | None, name: str, processor: Processor, cell: Cell | None) -> str:
    reason = family.skip_reason(name) if family is not None else None
    doubled = getattr(getattr(model, "config", None), "double_self_attention", False)
    if reason and not (doubled and name.endswith(".attn2")):  # there the second attention sees the image again
        return reason
    if not attention_calls(type(processor)) and not is_routed(processor):
        return f"{type(processor).__name__} makes no attention call that can be routed"
    if cell is None:
        return "outside of the blocks that tell a token grid"
    return ""


def _sizes(model: nn.Module, family: Family | None, rules: Sequence[Rule], cells: _Cells) -> dict[str, int]:
    """How many times coarser the map of each layer is than the finest one that can be routed.

    Raises:
        PatchError: An operator asks for it, and the model does not tell.
    """
    names = [
        name
        for name, module in attention_modules(model)
        if not _skip_reason(model, family, name, module.processor, cells.of(name))
    ]
    limited = next((rule.operator for rule in rules if any_limit(rule.operator)), None)
    if limited is not None and not tells_levels(model):
        raise PatchError(
            f"patch: max_downsample of {limited} must be None for {type(model).__name__}, whose blocks do not tell "
            "where they halve their maps: choose the layers with layers="
        )
    return relative_sizes(model, names)


def _block(model: nn.Module, name: str) -> nn.Module | None:
    """The transformer block around an attention module, if it is of diffusers' common class."""
    around = call_module(model.get_submodule(name.rpartition(".")[0]))
    return around if any(cls.__name__ == "BasicTransformerBlock" for cls in type(around).__mro__) else None


def _route(routes: list[Route], operator: Any) -> Route:
    for route in routes:
        if route.operator is operator or _same(route.operator, operator):
            return route
    routes.append(Route(operator))
    return routes[-1]


def _same(one: Any, other: Any) -> bool:
    """Whether two operators are the same in every field, also in those that their own `==` leaves out."""
    if type(one) is not type(other):
        return False
    fields = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)]
    try:
        return all(mine is others or bool(mine == others) for mine, others in fields)
    except (RuntimeError, ValueError, TypeError):  # tensors and arrays have no one answer
        return False


def _original(name: str, processor: Processor) -> Processor:
    """The stock processor to come back to.

    Raises:
        PatchError: The layer is patched, or runs under context parallelism.
    """
    if getattr(processor, "_parallel_config", None) is not None:
        raise PatchError(
            f"patch: context parallelism must be off, got _parallel_config on {name!r}: patch a model without "
            "enable_parallelism()"
        )
    if not is_routed(processor):
        return processor
    if processor.layer is not None and processor.layer.installed:
        raise PatchError(
            f"patch: each layer must be patched once, got {name!r}, which has {processor.layer.operator}: remove that "
            "patch or leave the layer out with layers="
        )
    return stock_of(processor)
