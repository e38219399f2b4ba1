"""Windowed attention through the NATTEN package, where it is installed with its kernels."""

from __future__ import annotations

from torch import Tensor

from vision_attn.kernels.reach import Box


def natten_windowed(query: Tensor, key: Tensor, value: Tensor, reach: Box, scale: float) -> tuple[Tensor, Tensor]:
    """Neighborhood attention by `natten.na1d/na2d/na3d`; arguments as `window_attention`, boxes only."""
    import natten

    if scale == 0:  # natten reads 0 as "not given"
        query, scale = query * 0, 1.0
    call = getattr(natten, f"na{len(reach.grid)}d")
    on_grid = (x.unflatten(1, reach.grid).contiguous() for x in (query, key, value))
    output, lse = call(
        *on_grid,
        kernel_size=reach.kernel_size,
        stride=reach.stride,
        dilation=reach.dilation,
        is_causal=reach.is_causal,
        scale=scale,
        return_lse=True,
    )
    last = len(reach.grid)
    return output.flatten(1, last), lse.flatten(1, last)
