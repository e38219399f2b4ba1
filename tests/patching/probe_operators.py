"""Operators for tests of `patch`: plain masked attention, written without the package's own code."""

from __future__ import annotations

import dataclasses

import torch

import vision_attn as va


def heads_last_sdpa(query, key, value, **options):
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def disc_mask(layout: va.TokenLayout, radius: float) -> torch.Tensor:
    """`[S, S]`: image tokens see image tokens nearer than `radius`, text sees and is seen by all."""
    axes = torch.meshgrid(*(torch.arange(n) for n in layout.grid), indexing="ij")
    places = torch.stack(axes, -1).reshape(-1, len(layout.grid)).double()
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    mask[layout.image_slice, layout.image_slice] = torch.cdist(places, places) < radius - 1e-9
    return mask


@dataclasses.dataclass(frozen=True)
class Disc:
    """CLEAR's window by an explicit mask."""

    radius: float = 2

    def __call__(self, query, key, value, layout, scale=None, attn_mask=None):
        assert query.shape[1] == key.shape[1] == value.shape[1] == layout.tokens
        assert query.shape[2] == key.shape[2] == value.shape[2]
        mask = disc_mask(layout, self.radius)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            mask = mask & attn_mask
        elif attn_mask is not None:
            mask = attn_mask.masked_fill(~mask, float("-inf"))
        return heads_last_sdpa(query, key, value, attn_mask=mask, scale=scale)


@dataclasses.dataclass(frozen=True)
class Maskless:
    """Takes no attention mask at all."""

    radius: float = 2

    def __call__(self, query, key, value, layout, scale=None):
        return Disc(self.radius)(query, key, value, layout, scale)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Dense attention that is not `va.Dense`: patched calls really pass through the operator path."""

    def __call__(self, query, key, value, layout, scale=None, attn_mask=None):
        assert query.shape[1] == key.shape[1] == value.shape[1] == layout.tokens
        assert query.shape[2] == key.shape[2] == value.shape[2]
        return heads_last_sdpa(query, key, value, attn_mask=attn_mask, scale=scale)


@dataclasses.dataclass(frozen=True)
class Fussy:
    """Refuses every mask."""

    def __call__(self, query, key, value, layout, scale=None, attn_mask=None):
        if attn_mask is not None:
            raise va.UnsupportedError(f"Fussy: attn_mask must be None, got shape {tuple(attn_mask.shape)}")
        return heads_last_sdpa(query, key, value, scale=scale)
