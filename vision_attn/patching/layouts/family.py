"""What attention swapping knows about one model family: where its image tokens are in the sequence.

Everything is found by class *name*, so that nothing here imports diffusers and a subclass of a known model is served
like the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from vision_attn.errors import PatchError
from vision_attn.layout import TokenLayout

if TYPE_CHECKING:
    from torch import nn

LayoutFunction = Callable[["nn.Module", Mapping[str, Any]], TokenLayout | None]
GridLayoutFunction = Callable[["nn.Module", Mapping[str, Any], tuple[int, ...]], TokenLayout]


@dataclass(frozen=True)
class Family:
    """The models that lay out their tokens in the same way.

    Attributes:
        name: Short name, such as `"flux"`.
        classes: Names of the model classes served.
        layout: `layout(scope module, forward arguments by name with defaults applied)` gives the token layout of the
            main sequence in this call, or `None` when this call has none that can be told.
        scope: `None` when the model's own forward arguments tell the layout; otherwise the class names of the
            submodules whose arguments do (a UNet has one grid per level). Each attention uses the nearest enclosing
            scope; one outside of every scope has no layout.
        skip: `(glob on the attention module's name, reason)`: attention that is no spatial self or joint attention.
        image_only: Globs on names of attention modules whose sequence is the image tokens alone although the main
            sequence has text as well (second attention of SD 3.5, image refiners).
        layout_of_grid: `layout_of_grid(scope module, arguments, grid)` does the same for a grid that the user gives,
            in families whose `layout` reads the values of tensors: that is not possible inside a compiled graph.
        open_end: Sequences go on after the grid for as many tokens as each call has (Mochi calls attention once per
            sample, with that sample's valid text; image refiners hold pads or references behind the image).
        in_parts: Attention is also called on parts of the sequence that do not hold the image (Qwen-Image 2.1 attends
            segment by segment while it fills its cache): such calls stay dense, and that is no mistake.
        timesteps: Where the timesteps of the model go in a run, from noisy to clean: -1 falling, 1 rising, 0 not the
            same for all its classes or not known.
    """

    name: str
    classes: tuple[str, ...]
    layout: LayoutFunction
    scope: tuple[str, ...] | None = None
    skip: tuple[tuple[str, str], ...] = ()
    image_only: tuple[str, ...] = ()
    layout_of_grid: GridLayoutFunction | None = None
    open_end: bool = False
    in_parts: bool = False
    timesteps: int = 0

    def layout_for(self, name: str, layout: TokenLayout, key_tokens: int) -> TokenLayout:
        """Give the layout of one attention call, from that of the main sequence.

        Args:
            name: Name of the attention module in the model.
            layout: What `self.layout` said about this forward.
            key_tokens: Length of the call's keys.

        Returns:
            `layout` itself; the grid alone for a module of `image_only`; with `open_end`, as many tokens after the grid
            as the keys have.
        """
        if any(fnmatchcase(name, pattern) for pattern in self.image_only):
            layout = TokenLayout(layout.grid)
        rest = key_tokens - layout.text_before - layout.image_tokens
        return replace(layout, text_after=rest) if self.open_end and rest >= 0 else layout

    def skip_reason(self, name: str) -> str | None:
        """Say why the attention module of this name is no spatial self or joint attention; `None` when it is."""
        return next((reason for pattern, reason in self.skip if fnmatchcase(name, pattern)), None)


def find_family(model: nn.Module, families: Iterable[Family], refused: Mapping[str, str]) -> Family:
    """Find the family of a model by the names of its class and base classes, the most derived first.

    Args:
        model: A diffusers transformer, UNet or decoder.
        families: Families to choose from.
        refused: Class name to the reason why attention of that class is not swapped.

    Returns:
        The first family that serves one of the class names.

    Raises:
        PatchError: The class is refused, or nothing is known about it.
    """
    by_class = {name: family for family in families for name in family.classes}
    for cls in type(model).__mro__:
        if cls.__name__ in by_class:
            return by_class[cls.__name__]
        if cls.__name__ in refused:
            raise PatchError(
                f"patch: target must have a supported attention, got {cls.__name__}: {refused[cls.__name__]}"
            )
    raise PatchError(
        f"patch: target must be a model whose token layout is known, got {type(model).__name__}: pass grid=(Y, X) or "
        "grid=(T, Y, X), or a TokenLayout when the sequence holds text as well; "
        "`python -m vision_attn.patching.layouts` lists the known classes"
    )
