"""Loops of assembly code: basic blocks, dominators, natural loops.

Source: Aho, Lam, Sethi, Ullman, Compilers (2nd edition), section 9.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Jump:
    """Where an instruction may go other than to the next one.

    Attributes:
        target: Its index; None for the end of the program.
        always: Whether it never goes on to the next instruction.
    """

    target: int | None
    always: bool


def natural_loops(length: int, jumps: dict[int, Jump]) -> list[list[int]]:
    """Instructions of each loop, those of loops in it included, in the order of the loops' first instructions.

    A branch backwards is a loop only if its target cannot be gone round on the way from the start: compilers also move
    rare blocks out of the way and branch back.

    Args:
        length: Number of instructions.
        jumps: Of the instructions that have one, by index.
    """
    starts = sorted({0, *(j.target for j in jumps.values() if j.target is not None), *(at + 1 for at in jumps)})
    starts = [start for start in starts if start < length]
    blocks = [range(start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True)]
    number = {start: block for block, start in enumerate(starts)}
    following = [_following(block, jumps, number) for block in blocks]
    dominators = _dominators(following)
    loops: dict[int, set[int]] = {}
    for block, targets in enumerate(following):
        for target in targets:
            if target in dominators[block]:
                loops.setdefault(target, {target}).update(_reaching(block, target, following))
    return [
        [instruction for block in sorted(body) for instruction in blocks[block]]
        for _header, body in sorted(loops.items())
    ]


def _following(block: range, jumps: dict[int, Jump], number: dict[int, int]) -> list[int]:
    jump = jumps.get(block[-1])
    targets = [] if jump is None or jump.target is None else [number[jump.target]]
    if (jump is None or not jump.always) and block.stop in number:
        targets.append(number[block.stop])
    return targets


def _dominators(following: Sequence[Sequence[int]]) -> list[set[int]]:
    """Per block, those on every path to it; of a block that nothing reaches, none."""
    before: list[list[int]] = [[] for _ in following]
    for block, targets in enumerate(following):
        for target in targets:
            before[target].append(block)
    found: list[set[int] | None] = [None] * len(following)
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in range(1, len(following)):
            known = [found[b] for b in before[block] if found[b] is not None]
            if known:
                new = {block}.union(set.intersection(*known))  # type: ignore[arg-type]
                changed, found[block] = changed or new != found[block], new
    return [dominators or set() for dominators in found]


def _reaching(block: int, header: int, following: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which a loop's last one is reached without its header."""
    body, stack = {header}, [block]
    while stack:
        current = stack.pop()
        if current not in body:
            body.add(current)
            stack += [b for b, targets in enumerate(following) if current in targets]
    return body
