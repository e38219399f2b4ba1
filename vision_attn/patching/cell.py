"""What the layers of one model share during a forward: the token layout, and whether operators are active."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vision_attn.layout import TokenLayout

CLOSED = "no forward of the model is running"


def in_backward() -> bool:
    """Whether gradient checkpointing is running layers again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass(eq=False)
class Cell:
    """The token layout of the current call of one scope (the model, or one level of a UNet).

    A forward pre-hook writes it before the attention layers of the scope read it. After the forward it holds what
    gradient checkpointing needs to run layers again, which happens on another thread on a GPU: hence plain attributes,
    no context variable. torch.compile traces both the write and the read.

    Attributes:
        layout: Where the image tokens are, `None` when this call has no layout.
        reason: Why there is no layout.
        open_before: As many tokens stand before the grid as each call has beyond the layout (a grid given by the user).
        open_after: The same behind the grid (`Family.open_end`).
        recomputed: The layout of the last forward with checkpoints.
        recomputed_due: What was due in that forward (`Switch.due`).
        awaits_backward: A forward with checkpoints has passed since layers were last recomputed.
        ambiguous: Such forwards had different layouts of the same length, or different operators due, which
            recomputation could not tell apart.
    """

    layout: TokenLayout | None = None
    reason: str = CLOSED
    open_before: bool = False
    open_after: bool = False
    recomputed: TokenLayout | None = None
    recomputed_due: tuple[bool, int] = (True, 0)
    awaits_backward: bool = False
    ambiguous: bool = False

    def begin(self, told: TokenLayout | str | None, checkpoints: bool, due: tuple[bool, int] = (True, 0)) -> None:
        """Note the layout of a forward, or why it has none; with `checkpoints`, of one that may be recomputed."""
        self.layout = layout = told if isinstance(told, TokenLayout) else None
        if layout is None:
            self.reason = told if isinstance(told, str) else "the token layout of this call is not known"
        if not checkpoints:
            return
        last, self.recomputed = self.recomputed, layout
        last_due, self.recomputed_due = self.recomputed_due, due
        if not self.awaits_backward:
            self.ambiguous = False
        elif due != last_due or _alike(layout, last):
            self.ambiguous = True
        self.awaits_backward = True

    def end(self) -> None:
        """Forget the layout of a forward, but for recomputation."""
        self.layout, self.reason = self.recomputed, CLOSED


def _alike(layout: TokenLayout | None, last: TokenLayout | None) -> bool:
    """Whether two layouts differ and yet have as many tokens."""
    return layout is not None and last is not None and layout.tokens == last.tokens and layout != last


@dataclass(eq=False)
class Switch:
    """Whether the operators of one model are active in this forward (`steps=`), and why not.

    Attributes:
        active: False in a denoising step that is not one of `steps`.
        reason: Why not; empty when active.
        stage: Which of the operators is due that take turns over the steps (`Stages`).
        open: Whether a forward of the model is running. A call outside of one has no layout that could be trusted.
    """

    active: bool = True
    reason: str = ""
    stage: int = 0
    open: bool = False

    @property
    def due(self) -> tuple[bool, int]:
        """What tells which operator is due."""
        return self.active, self.stage
