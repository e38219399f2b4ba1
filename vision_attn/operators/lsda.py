"""Long-short distance attention: groups of neighbouring tokens, or of tokens a fixed interval apart.

With `interval=1` a token attends the `group x group` block it lies in; with a larger interval, tokens of its own
residue. Layers that alternate the two see the whole image after two of them.

Source: CrossFormer (arXiv 2108.00154), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from vision_attn.kernels.reach import Box
from vision_attn.layout import TokenLayout
from vision_attn.operators.neighborhood import checked_size, clipped_box
from vision_attn.operators.registry import register_operator
from vision_attn.operators.window import WindowOperator


@register_operator("lsda")
@dataclass(frozen=True)
class LSDA(WindowOperator):
    """CrossFormer's short (`interval=1`) or long (`interval > 1`) distance attention for whole sequences.

    It is `Neighborhood(group, stride=group, dilation=interval)`, clipped to the grid as there: a last group that is cut
    by the border attends the `group` tokens nearest to it. Text is seen by all and sees everything. Alternate the two
    kinds with a dict of layers.

    Args:
        group: Tokens of a group along each axis, one value or one per grid axis.
        interval: Steps between the tokens of a group, one value or one per grid axis.

    Raises:
        ValueError: a value below 1; at the call, a number of values other than the grid's axes.
        TypeError: not an integer.

    Source: arXiv 2108.00154, section 3.2, where `group` is G and `interval` I; without its position bias.
    """

    group: int | tuple[int, ...] = 7
    interval: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for name in ("group", "interval"):
            object.__setattr__(self, name, checked_size("LSDA", name, getattr(self, name)))

    def reach(self, layout: TokenLayout) -> Box:
        """The group on this layout's grid."""
        group = "group", self.group
        return clipped_box("LSDA", layout.grid, group, group, ("interval", self.interval))
