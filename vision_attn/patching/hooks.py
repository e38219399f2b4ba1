"""The hooks by which a patched model keeps its layers informed."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vision_attn.errors import PatchError
from vision_attn.layout import TokenLayout
from vision_attn.patching.cell import Cell, Switch, in_backward

if TYPE_CHECKING:
    from vision_attn.patching.installation import Installation
    from vision_attn.patching.layer import Layer

LayoutFunction = Callable[[nn.Module, Mapping[str, Any]], "TokenLayout | str | None"]


class Hook:
    """A hook on a module.

    A pickle stores it as one that does nothing: a saved model must load without this package.

    torch.compile calls the hooks of the module it is given outside of the graph, where reading tensor values (position
    ids, timesteps) and Python lists is free. There the hook's frame is kept from being compiled, and its work with it.
    Hooks of submodules, and those of `module.compile()`, are traced into the graph: `traced` is what they do there.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """Called by torch, with the keyword arguments or the output as the last argument."""
        if torch.compiler.is_compiling():
            self.traced(module, args, last)
        else:
            self.untraced(module, args, last)

    def run(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """The work of the hook."""
        raise NotImplementedError

    def traced(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """The work of the hook inside a graph."""

    @torch.compiler.disable
    def untraced(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """The work of the hook outside of graphs."""
        self.run(module, args, last)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


with contextlib.suppress(ImportError):  # not public: without it, models with position ids compile by their blocks only
    from torch._dynamo.eval_frame import skip_code

    skip_code(Hook.__call__.__code__)


class ScopeHook(Hook):
    """Forward pre-hook that writes the token layout of a scope's call into its cell.

    Args:
        module: The scope: the model, or one of its levels.
        layout: `layout(module, arguments by name)` gives the layout, or `None` or in words why there is none.
        cell: Where to write it.
        switch: That of the model's layers.
    """

    def __init__(self, module: nn.Module, layout: LayoutFunction, cell: Cell, switch: Switch) -> None:
        self.layout = layout
        self.cell = cell
        self.switch = switch
        self.names, self.defaults = forward_arguments(module)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Write the layout of this call."""
        module = getattr(module, "_orig_mod", module)
        layout = self.layout(module, bind(self.names, self.defaults, args, kwargs))
        # diffusers checkpoints whenever gradients are on, in eval mode too.
        checkpoints = not torch.compiler.is_compiling() and torch.is_grad_enabled() and not in_backward()
        self.cell.begin(layout, checkpoints and self.checkpointing(module), self.switch.due)

    def checkpointing(self, module: nn.Module) -> bool:
        """Whether the model runs its blocks again in the backward pass."""
        return bool(getattr(module, "gradient_checkpointing", False))

    def traced(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """Write the layout inside a graph: possible where it comes from shapes."""
        self.run(module, args, last)


class BlockInputHook(Hook):
    """Forward pre-hook on a transformer block that keeps its input for an operator of its attention.

    Args:
        block: The block, for the names of its forward arguments.
        layer: The patched attention in it.
    """

    def __init__(self, block: nn.Module, layer: Layer) -> None:
        self.layer = layer
        self.names, self.defaults = forward_arguments(block)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the input, `[B, S, C]`, until the attention takes it."""
        if self.layer.switch.active and getattr(self.layer.due_operator, "wants_block_input", False):
            self.layer.block_input = bind(self.names, self.defaults, args, kwargs)["hidden_states"]

    def traced(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """Keep it inside a graph."""
        self.run(module, args, last)


class BeforeForward(Hook):
    """Forward pre-hook on the model: see that the patch is still there, follow the denoising steps.

    Args:
        module: The model, for the names of its forward arguments.
        installation: Its patched layers.
    """

    def __init__(self, module: nn.Module, installation: Installation) -> None:
        self.installation = installation
        self.names, self.defaults = forward_arguments(module)

    def traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what a graph cannot do."""
        if self.installation.tracker is not None:
            raise PatchError(
                "patch: steps= must be followed outside of compiled code, got a model inside a graph: "
                "compile the model itself or its blocks, or leave steps out"
            )
        self.installation.switch.open = True

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward."""
        self.installation.enter()
        self.installation.check()
        self.installation.begin(bind(self.names, self.defaults, args, kwargs))


class AfterForward(Hook):
    """Forward hook on the model: operator calls that should have been and were not are an error when strict.

    Args:
        installation: The patched layers of the model.
    """

    def __init__(self, installation: Installation) -> None:
        self.installation = installation

    def run(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Check a forward."""
        self.installation.require_operator_calls()


class CloseForward(Hook):
    """Forward hook on the model, called after an exception too: the layers forget the forward.

    Args:
        installation: The patched layers of the model.
    """

    def __init__(self, installation: Installation) -> None:
        self.installation = installation

    def traced(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End a forward inside a graph."""
        self.installation.end()

    def run(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End a forward."""
        self.installation.leave()


def forward_arguments(module: nn.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of a module's forward arguments in order, and the defaults. Read once: binding is then traceable."""
    module = getattr(module, "_orig_mod", module)
    parameters = [
        parameter
        for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return tuple(names), defaults


def bind(
    names: Sequence[str], defaults: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, defaults applied."""
    call = dict(defaults)
    for name, value in zip(names, args):  # noqa: B905 - fewer positional arguments than names are the normal case
        call[name] = value
    call.update(kwargs)
    return call
