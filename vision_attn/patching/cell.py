"""What the layers of one model share during a forward: the token layout, and whether operators are active."""

from __future__ import annotations

from dataclasses import dataclass

from vision_attn.layout import TokenLayout


@dataclass(eq=False)
class Cell:
    """The token layout of the current call of one scope (the model, or one level of a UNet).

    A forward pre-hook writes it before the attention layers of the scope read it. It keeps its value after the forward,
    because gradient checkpointing runs layers again during the backward pass. Plain attributes, no context variable:
    torch.compile traces both the write and the read.

    Attributes:
        layout: Where the image tokens are, `None` when this call has no layout.
        reason: Why there is no layout.
        open_before: As many tokens stand before the grid as each call has beyond the layout (a grid given by the user).
        open_after: The same behind the grid (`Family.open_end`).
        awaits_backward: A forward with checkpoints has passed since layers were last recomputed.
        ambiguous: Such forwards had different layouts of the same length, which recomputation could not tell apart.
    """

    layout: TokenLayout | None = None
    reason: str = "the model has not been called"
    open_before: bool = False
    open_after: bool = False
    awaits_backward: bool = False
    ambiguous: bool = False

    def begin(self, layout: TokenLayout | None) -> None:
        """Note the layout of a forward that may be recomputed."""
        same_length = layout is not None and self.layout is not None and layout.tokens == self.layout.tokens
        if not self.awaits_backward:
            self.ambiguous = False
        elif same_length and layout != self.layout:
            self.ambiguous = True
        self.awaits_backward = True
        self.layout = layout


@dataclass(eq=False)
class Switch:
    """Whether the operators of one model are active in this forward (`steps=`), and why not."""

    active: bool = True
    reason: str = ""
