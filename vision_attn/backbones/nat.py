"""NAT and DiNAT: hierarchical transformers of (dilated) neighborhood attention, for images of any size.

Source: NAT (arXiv 2204.07143), table 2; DiNAT (arXiv 2209.15001), tables 1 and 2. State dict keys are those of the
released weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vision_attn.backbones.pyramid import Level, LevelPyramid, default_cfg, drop_path_rates, initialise, register

# Gathered keys and values of a piece of rows hold at most so many elements.
_GATHERED = 2**24


class NeighborhoodAttention2d(nn.Module):
    """Neighborhood attention of a map with a learned bias per relative position.

    Args:
        dim: Channels.
        num_heads: Heads, which divide `dim`.
        kernel_size: Side of the window in tokens, odd; a smaller map is attended whole.
        dilation: Step between the keys of a window; clipped where the map is smaller than the dilated window. The
            released code pads such maps with zeros that take part in the softmax.
        qkv_bias: Whether the projection to query, key and value has a bias.
        attn_drop: Dropout of the attention map.
        proj_drop: Dropout of the output.

    Raises:
        ValueError: a number that does not fit the others.

    Source: arXiv 2204.07143, section 3.1; arXiv 2209.15001, section 3.2.
    """

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int = 7, dilation: int = 1, qkv_bias: bool = True,
        attn_drop: float = 0.0, proj_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"NeighborhoodAttention2d: num_heads must divide dim={dim}, got {num_heads}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"NeighborhoodAttention2d: kernel_size must be odd and at least 1, got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"NeighborhoodAttention2d: dilation must be at least 1, got {dilation}")
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(trunc_normal_(torch.zeros(num_heads, side, side), std=0.02))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, C]` to the same."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        rows, row_steps = self.window(x.shape[1], x.device)
        columns, column_steps = self.window(x.shape[2], x.device)
        per_row = key[:, 0].numel() * rows.shape[1] * columns.shape[1]
        piece = max(1, _GATHERED // max(per_row, 1))
        outputs = []
        for top in range(0, x.shape[1], piece):
            part = slice(top, top + piece)
            k, v = (t[:, rows[part]][:, :, :, columns] for t in (key, value))  # [B, y, Ky, X, Kx, H, D]
            bias = self.rpb[:, row_steps[part, :, None, None], column_steps]  # [H, y, Ky, X, Kx]
            outputs.append(self._attend(query[:, part], k, v, bias))
        return self.proj_drop(self.proj(torch.cat(outputs, 1)))

    def window(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys of each token on an axis of this length, and their rows in the bias table, both `[length, keys]`."""
        kernel = min(self.kernel_size, length)
        dilation = min(self.dilation, length // kernel)
        token = torch.arange(length, device=device)
        residue, place = token % dilation, token // dilation
        members = (length - residue + dilation - 1) // dilation
        start = torch.minimum((place - kernel // 2).clamp(min=0), members - kernel)
        keys = start[:, None] + torch.arange(kernel, device=device)
        return residue[:, None] + keys * dilation, keys - place[:, None] + self.kernel_size - 1

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """`[B, y, X, C]` from queries `[B, y, X, H, D]` and gathered keys and values."""
        key, value = (x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5) for x in (key, value))  # [B, y, X, H, Ky*Kx, D]
        logits = query.unsqueeze(-2) * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
        logits = logits + bias.permute(1, 3, 0, 2, 4).flatten(3).unsqueeze(-2)
        return (self.attn_drop(logits.softmax(-1)) @ value).flatten(3)


class NeighborhoodBlock(nn.Module):
    """Neighborhood attention and an MLP, each with a norm before and a residual around.

    Args:
        dim: Channels.
        num_heads: Heads.
        kernel_size: Side of the window.
        dilation: Step between its keys.
        mlp_ratio: Hidden channels of the MLP over `dim`.
        drop_path: Rate of stochastic depth.
        layer_scale: Start of the learned scales of both residuals; None for none.
        options: Further arguments of `NeighborhoodAttention2d`.
    """

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int, dilation: int, mlp_ratio: float, drop_path: float,
        layer_scale: float | None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2d(dim, num_heads, kernel_size, dilation, **options)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=options.get("proj_drop", 0.0))
        self.drop_path = DropPath(drop_path)
        self.gamma1, self.gamma2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, C]` to the same."""
        x = x + self.drop_path(_scaled(self.attn(self.norm1(x)), self.gamma1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class Tokenizer(nn.Module):
    """Two convolutions that make tokens `[B, Y, X, dim]` of a quarter of the image's rows and columns."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(channels, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, rows, columns]` to `[B, Y, X, dim]`."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsampler(nn.Module):
    """A convolution that halves a map and doubles its channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, dim]` to `[B, ceil(Y / 2), ceil(X / 2), 2 * dim]`."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NeighborhoodTransformer(LevelPyramid):
    """NAT; with dilations, DiNAT.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for none.
        global_pool: `"avg"` or `""`.
        embed_dim: Channels of the first stage; each further one doubles them.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        kernel_size: Side of the windows.
        dilations: The largest dilation per stage, which every second block has; 1 for none.
        mlp_ratio: Of the MLPs.
        layer_scale: Start of the residuals' learned scales; None for none.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        attn_drop_rate: Dropout of attention maps.
        drop_path_rate: Rate of stochastic depth in the last block.

    Raises:
        ValueError: a number that does not fit the others.
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5), num_heads: Sequence[int] = (2, 4, 8, 16), kernel_size: int = 7,
        dilations: Sequence[int] = (1, 1, 1, 1), mlp_ratio: float = 3.0, layer_scale: float | None = None,
        drop_rate: float = 0.0, proj_drop_rate: float = 0.0, attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        dims = [embed_dim * 2**index for index in range(len(depths))]
        super().__init__(dims, num_classes, global_pool, drop_rate)
        for name, given in (("num_heads", num_heads), ("dilations", dilations)):
            if len(given) != len(depths):
                raise ValueError(f"NeighborhoodTransformer: {name} must have {len(depths)} values, got {given}")
        self.patch_embed = Tokenizer(in_chans, embed_dim)
        self.levels = nn.ModuleList()
        for index, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            block = partial(
                NeighborhoodBlock, dims[index], num_heads[index], kernel_size, mlp_ratio=mlp_ratio,
                layer_scale=layer_scale, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
            )  # fmt: skip
            dilated = (dilations[index] if place % 2 else 1 for place in range(len(rates)))
            blocks = [block(dilation=dilation, drop_path=rate) for dilation, rate in zip(dilated, rates, strict=True)]
            self.levels.append(Level(blocks, Downsampler(dims[index]) if index + 1 < len(dims) else None))
        self.norm = nn.LayerNorm(dims[-1])
        self.apply(initialise)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


_SIZES: dict[str, dict[str, Any]] = {
    "mini": {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16)},
    "tiny": {"embed_dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16)},
    "small": {"embed_dim": 96, "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "num_heads": (6, 12, 24, 48)},
}
_DEEP = {"depths": (3, 4, 18, 5), "mlp_ratio": 2.0}
_NAT = {
    "mini": {**_SIZES["mini"]},
    "tiny": {**_SIZES["tiny"]},
    "small": {**_SIZES["small"], **_DEEP, "layer_scale": 1e-5},
    "base": {**_SIZES["base"], **_DEEP, "layer_scale": 1e-5},
}
_DINAT = {
    "mini": {**_SIZES["mini"], "dilations": (8, 4, 2, 1)},
    "tiny": {**_SIZES["tiny"], "dilations": (8, 4, 2, 1)},
    "small": {**_SIZES["small"], **_DEEP, "dilations": (8, 4, 2, 1)},
    "base": {**_SIZES["base"], **_DEEP, "dilations": (8, 4, 2, 1)},
    "large": {**_SIZES["large"], **_DEEP, "dilations": (8, 4, 2, 1)},
}
_WEIGHTS = "https://shilab.cs.uoregon.edu/projects"


def _cfg(url: str, paper: str) -> dict[str, Any]:
    origin = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
    return default_cfg(url=url, first_conv="patch_embed.proj.0", license="mit", origin_url=origin, paper_ids=paper)


def _dinat_weights(size: str) -> str:
    trained = "in22k_in1k_224" if size == "large" else "in1k_224"
    return f"{_WEIGHTS}/dinat/checkpoints/imagenet1k/dinat_{size}_{trained}.pth"


default_cfgs = generate_default_cfgs(
    {f"va_nat_{size}": _cfg(f"{_WEIGHTS}/nat/checkpoints/CLS/nat_{size}.pth", "arXiv:2204.07143") for size in _NAT}
    | {f"va_dinat_{size}": _cfg(_dinat_weights(size), "arXiv:2209.15001") for size in _DINAT}
)
va_nat_mini, va_nat_tiny, va_nat_small, va_nat_base = (
    register(NeighborhoodTransformer, f"va_nat_{size}", f"NAT-{size.title()}.", defaults)
    for size, defaults in _NAT.items()
)
va_dinat_mini, va_dinat_tiny, va_dinat_small, va_dinat_base, va_dinat_large = (
    register(NeighborhoodTransformer, f"va_dinat_{size}", f"DiNAT-{size.title()}.", defaults)
    for size, defaults in _DINAT.items()
)
