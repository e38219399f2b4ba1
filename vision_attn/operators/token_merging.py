"""Token merging: tokens are grouped with the most similar of a few destinations, and a group goes on as its mean.

Source: Token Merging for Fast Stable Diffusion (arXiv 2303.17604), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vision_attn.operators.arguments import no_autocast


@dataclass(frozen=True)
class Groups:
    """Which tokens go together.

    Attributes:
        index: Group of each token, `[B, N]`, of the destinations first.
        count: Number of groups.
    """

    index: Tensor
    count: int

    def merge(self, x: Tensor) -> Tensor:
        """Means of the groups: `[B, N, ...]` to `[B, count, ...]`, summed in float32 or above."""
        flat = x.flatten(2)
        wide = flat.to(torch.promote_types(x.dtype, torch.float32))
        index = self.index[..., None].expand_as(flat)
        sums = wide.new_zeros(x.shape[0], self.count, flat.shape[2]).scatter_add(1, index, wide)
        sizes = wide.new_zeros(x.shape[0], self.count).scatter_add(1, self.index, torch.ones_like(wide[..., 0]))
        return (sums / sizes[..., None]).to(x.dtype).unflatten(2, x.shape[2:])

    def unmerge(self, x: Tensor) -> Tensor:
        """What each token's group has: `[B, count, ...]` to `[B, N, ...]`."""
        index = self.index.reshape(*self.index.shape, *(1,) * (x.ndim - 2))
        return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def destinations(grid: tuple[int, ...], cell: tuple[int, int], random: bool, device: torch.device) -> Tensor:
    """One token per whole cell of rows and columns of a grid: the first of the cell, or with `random` any."""
    frames, rows, columns = (1, 1, *grid)[-3:]
    shape = (frames, rows // cell[0], columns // cell[1])
    frame, y, x = torch.meshgrid(*(torch.arange(size, device=device) for size in shape), indexing="ij")
    y, x = y * cell[0], x * cell[1]
    if random:
        # Not randint: inductor cannot index by its result.
        chosen = torch.rand(*shape, math.prod(cell), device=device).argmax(-1)
        y, x = y + chosen // cell[1], x + chosen % cell[1]
    return ((frame * rows + y) * columns + x).flatten()


@torch.no_grad()
def group(similarity: Tensor, destination: Tensor, numbers: tuple[int, ...]) -> list[Groups]:
    """Merge so many of the tokens that are no destinations, those first that are most similar to one.

    Args:
        similarity: What tells similar tokens by the cosine, `[B, N, C]`.
        destination: Tokens that the others are merged into, `[n]`.
        numbers: How many to merge; one result each.
    """
    batch, tokens, _ = similarity.shape
    taken = torch.zeros(tokens, dtype=torch.bool, device=similarity.device).scatter(0, destination, True)
    # Stable, so that equal flags keep the tokens' order.
    source = taken.to(torch.uint8).argsort(stable=True)[: tokens - destination.numel()]
    with no_autocast(similarity):
        unit = normalize(similarity.to(torch.promote_types(similarity.dtype, torch.float32)), dim=-1)
        best, nearest = (unit[:, source] @ unit[:, destination].transpose(1, 2)).max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    own = torch.arange(destination.numel(), device=order.device)
    results = []
    for number in numbers:
        index = order.new_zeros(batch, tokens)
        index[:, destination] = own
        index[:, source] = torch.where(rank < number, nearest, destination.numel() + rank - number)
        results.append(Groups(index, tokens - number))
    return results
