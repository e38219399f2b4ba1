"""Dry runs that show that swapping attention in a model does what it says."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vision_attn.errors import PatchError
from vision_attn.layout import TokenLayout
from vision_attn.operators import Clear, Dense, Neighborhood
from vision_attn.patching.diffusers import attention_modules, call_module, denoisers
from vision_attn.patching.dry_inputs import dry_inputs
from vision_attn.patching.hooks import bind, forward_arguments
from vision_attn.patching.installation import installations
from vision_attn.patching.ltx2_decoder import is_decoder
from vision_attn.patching.report import table
from vision_attn.patching.swap import Patch, patch
from vision_attn.patching.timm import is_timm, timm_attention

EVERYTHING = 10**6
"""A window that covers any grid, in tokens."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest root-mean-square difference to dense attention, relative to the output's, that rounding may cause."""

LATENT_NAMES = ("hidden_states", "sample", "x")


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What.
        passed: `True`, `False`, or `None` when it does not apply to this model.
        detail: What was measured.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass
class Verification:
    """What `verify` checked on each model; prints as a table."""

    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        marks = {True: "ok", False: "FAILED", None: "-"}
        return table(
            [(check.name, marks[check.passed], check.detail) for check in self.checks], ("check", "", "detail")
        )


def verify(target: Any, *, inputs: Mapping[str, Any] | None = None) -> Verification:
    """Check on dry runs that attention of a pipeline or model can be swapped exactly.

    Checked are: `Dense` gives the same bits; a window that covers the grid equals dense attention; a small window
    changes the output; which attention calls go to the operator; that a touched latent pixel moves the one token that
    the layout says (where nothing mixes pixels before the first attention); that removal gives the identical
    processors, parameter names and output back. Weights are not changed and the target is left unpatched.

    Args:
        target: A diffusers pipeline or model, or a timm model.
        inputs: For a pipeline, arguments of its call (a prompt and a small size are the default); for a model,
            arguments of its forward. Without them inputs are made up from the model's configuration.

    Returns:
        The checks, all passed; `print` it.

    Raises:
        PatchError: A check failed (the message holds the whole table), the target is patched, or it cannot be patched.
        ValueError: `inputs` are needed: nothing is known about what the model takes.

    Example:
        >>> import diffusers, vision_attn as va
        >>> model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
        >>> va.verify(model).passed
        True
    """
    report = Verification()
    for name, model in denoisers(target):
        if installations(model):
            raise PatchError(
                f"verify: target must be unpatched, got a patched {type(call_module(model)).__name__}: unpatch it"
            )
        arguments = _model_inputs(target, model, inputs)
        report.checks += _verify_model(name, model, arguments)
    if not report.passed:
        raise PatchError(f"verify: target must pass every check, got\n{report}")
    return report


def _verify_model(prefix: str, model: nn.Module, inputs: Mapping[str, Any]) -> list[Check]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return list((_decoder_checks if is_decoder(model) else _checks)(prefix, model, inputs))
    finally:
        for module, training in modes:
            module.training = training


def _checks(prefix: str, model: Any, inputs: Mapping[str, Any]) -> list[Check]:
    def run() -> torch.Tensor:
        output = _output(model(**copy.deepcopy(dict(inputs))))
        # A classifier that starts at zero (Hiera's) would hide every difference.
        return output if output.any() or not is_timm(model) else _output(model.forward_features(**inputs))

    def check(name: str, passed: bool | None, detail: str) -> Check:
        return Check(prefix + name, passed, detail)

    processors = dict(_processors(model))
    keys = list(model.state_dict())
    stock = run()
    checks = [check("finite output", bool(stock.isfinite().all()), f"{tuple(stock.shape)} {stock.dtype}")]
    with patch(model, Dense(), strict=False) as dense:
        checks.append(check("Dense is bit-identical", torch.equal(run(), stock), f"{len(dense.routed)} layers"))
    for name, op in (("neighborhood", Neighborhood(EVERYTHING)), ("clear", Clear(EVERYTHING))):
        with patch(model, op, strict=False) as full:
            error = _relative_error(run(), stock)
            checks.append(
                check(f"{name} over the whole grid is dense", error <= TOLERANCE[stock.dtype], f"{error:.1e}")
            )
            if name == "clear":
                checks.append(check("attention calls", *_call_summary(full)))
    with patch(model, Clear(1), strict=False):
        error = _relative_error(run(), stock)
        checks.append(check("a window of one token is not dense", error > 0, f"{error:.1e}"))
    checks.append(check("a pixel moves its token", *_token_of_pixel(model, inputs)))
    checks.append(check("removal gives the output back", torch.equal(run(), stock), "same bits"))
    same = (
        all(processor is processors[name] for name, processor in _processors(model))
        and list(model.state_dict()) == keys
    )
    checks.append(
        check("removal gives processors and keys back", same, f"{len(processors)} processors, {len(keys)} keys")
    )
    return checks


def _decoder_checks(prefix: str, model: nn.Module, inputs: Mapping[str, Any]) -> list[Check]:
    """The LTX-2.5 decoder is windowed already: its own windows, not those of the whole grid, must equal stock."""

    def run() -> torch.Tensor:
        with torch.random.fork_rng():  # the decoder draws noise
            torch.manual_seed(0)
            return _output(model(**copy.deepcopy(dict(inputs))))

    processors = dict(_processors(model))
    stock = run()
    checks = [Check(f"{prefix}finite output", bool(stock.isfinite().all()), f"{tuple(stock.shape)} {stock.dtype}")]
    with patch(model, strict=False) as own:
        error = _relative_error(run(), stock)
        checks.append(Check(f"{prefix}own windows are stock", error <= TOLERANCE[stock.dtype], f"{error:.1e}"))
        checks.append(Check(f"{prefix}attention calls", *_call_summary(own)))
    with patch(model, Clear(1), strict=False):
        error = _relative_error(run(), stock)
        checks.append(Check(f"{prefix}a window of one token is not stock", error > 0, f"{error:.1e}"))
    same = all(processor is processors[name] for name, processor in _processors(model))
    checks.append(Check(f"{prefix}removal gives the output back", same and torch.equal(run(), stock), "same bits"))
    return checks


def _call_summary(patched: Patch) -> tuple[bool, str]:
    layers = [layer for installation in patched._installations for layer in installation.layers]
    served = [layer for layer in layers if layer.served]
    wrong = [layer for layer in layers if layer.unmatched and not layer.served]
    refused = [layer for layer in layers if layer.calls and not layer.served and layer not in wrong]
    text = f"{len(served)} of {len(layers)} layers by the operator, {len(patched.skipped)} skipped"
    for layer in (wrong + refused)[:1]:
        text += f"; {layer.name}: {layer.calls[0].reason}"
    return bool(served) and not wrong, text


class _FirstQuery(Exception):
    """Carries the query of the first routed attention call out of a forward."""

    def __init__(self, query: torch.Tensor, layout: TokenLayout) -> None:
        super().__init__()
        self.query = query
        self.layout = layout


@dataclass(frozen=True)
class _Probe:
    """An operator that ends the forward with its query."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: TokenLayout,
        scale: float | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise _FirstQuery(query, layout)


def _first_query(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, TokenLayout] | None:
    try:
        with patch(model, _Probe(), strict=False):
            model(**inputs)
    except _FirstQuery as found:
        return found.query, found.layout
    return None


def _token_of_pixel(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Touch the latent under some tokens; exactly those rows of the first query must move."""
    name = next((name for name in LATENT_NAMES if isinstance(inputs.get(name), torch.Tensor)), None)
    first = _first_query(model, copy.deepcopy(dict(inputs)))
    if first is None:
        return False, "no attention call reached the operator"
    query, layout = first
    if name is None or not inputs[name].is_floating_point() or any(_mixes_pixels(part) for part in model.modules()):
        return None, f"not applicable: layout {layout.grid}, {layout.text_before} before, {layout.text_after} after"
    if len(query) != len(inputs[name]):
        return None, f"not applicable: attention in parts of the grid {layout.grid}"
    tokens = [tuple(0 for _ in layout.grid), tuple(n - 1 for n in layout.grid), tuple(n // 2 for n in layout.grid)]
    for token in tokens:
        touched = copy.deepcopy(dict(inputs))
        if not _touch(touched[name], token, layout):
            return None, f"not applicable: {name} of shape {tuple(touched[name].shape)} for grid {layout.grid}"
        again = _first_query(model, touched)
        if again is None or again[1] != layout:
            return False, f"token {token}: the layout depends on the values of {name}"
        moved = (again[0] != query).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
        expected = layout.text_before + _row_major(token, layout.grid)
        if moved != [expected]:
            return False, f"token {token} of {layout.grid} must be row {expected}, got {moved[:4]}"
    return True, f"{len(tokens)} tokens of grid {layout.grid}, {layout.text_before} before, {layout.text_after} after"


def _mixes_pixels(module: nn.Module) -> bool:
    overlapping = isinstance(module, nn.Conv2d) and max(module.stride) < max(module.kernel_size)
    return overlapping or isinstance(module, nn.GroupNorm)


def _touch(latent: torch.Tensor, token: tuple[int, ...], layout: TokenLayout) -> bool:
    """Change what one token is made of, in place; False when the latent's shape does not tell where it is."""
    if latent.ndim == 3:  # packed: one row per token, of the image or of the whole sequence
        starts = {layout.image_tokens: 0, layout.tokens: layout.text_before}
        if latent.shape[1] not in starts:
            return False
        latent[:, starts[latent.shape[1]] + _row_major(token, layout.grid)] += 1
        return True
    sizes = latent.shape[-len(layout.grid) :]
    if latent.ndim != 2 + len(layout.grid) or any(size % n for size, n in zip(sizes, layout.grid, strict=True)):
        return False
    pixel = tuple(p * (size // n) for p, size, n in zip(token, sizes, layout.grid, strict=True))
    latent.movedim((0, 1), (-2, -1))[pixel] += 1
    return True


def _row_major(token: tuple[int, ...], grid: tuple[int, ...]) -> int:
    row = 0
    for position, size in zip(token, grid, strict=True):
        row = row * size + position
    return row


def _processors(model: nn.Module) -> list[tuple[str, Any]]:
    if is_timm(model):  # whose attention modules change their class
        return [(name, type(module)) for name, module in timm_attention(model)]
    return [(name, module.processor) for name, module in attention_modules(model)]


def _relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (output.double() - reference.double()).square().mean().sqrt()
    return float(difference / reference.double().square().mean().sqrt().clamp_min(1e-30))


def _output(result: Any) -> torch.Tensor:
    """All tensors of a model's output in one row."""
    parts: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            parts.append(value)
        elif isinstance(value, Mapping):
            collect(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(result)
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


class _FirstCall(Exception):
    """Carries the arguments of a model's first call out of a pipeline."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def _model_inputs(target: Any, model: nn.Module, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(target, nn.Module):
        return dict(inputs) if inputs is not None else dry_inputs(call_module(model))
    names, _ = forward_arguments(model)

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstCall(bind(names, {}, args, kwargs))

    handles = [part.register_forward_pre_hook(capture, with_kwargs=True) for _, part in denoisers(target)]
    try:
        with torch.no_grad():
            target(**_pipeline_inputs(target, inputs or {}))
    except _FirstCall as found:
        return found.arguments
    finally:
        for handle in handles:
            handle.remove()
    raise PatchError(f"verify: target must call its {type(model).__name__}, got a pipeline run without a call")


def _pipeline_inputs(pipeline: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "prompt": "a red circle left of a blue square",
        "height": 128,
        "width": 192,
        "num_frames": 9,
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    known = inspect.signature(pipeline.__call__).parameters  # type: ignore[operator]
    return {**{name: value for name, value in defaults.items() if name in known}, **inputs}
