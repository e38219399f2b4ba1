"""What the agent models share of timm's bookkeeping: configurations, and weights of another image size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from vision_attn.backbones.pyramid import default_cfg

# The axis along which each position bias of rows or columns runs.
_AXES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}


def agent_cfg(**changes: Any) -> dict[str, Any]:
    """A pretrained configuration; the released weights are on a cloud drive that serves no direct links."""
    return default_cfg(
        **{
            "pool_size": None,
            "crop_pct": 0.9,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "license": "apache-2.0",
            "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
            "paper_ids": "arXiv:2312.08874",
            **changes,
        }
    )


def position_biases(model: nn.Module) -> set[str]:
    """Names of the position biases of agent attention, which take no weight decay."""
    endings = (*_AXES, "an_bias", "na_bias", "ac_bias", "ca_bias")
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in endings}


def resize_biases(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict with the position biases of rows and columns interpolated to the model's maps."""
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    resized = dict(state_dict)
    for name, value in state_dict.items():
        axis = _AXES.get(name.rpartition(".")[2])
        if axis is not None and name in own and value.shape != own[name]:
            resized[name] = _resize_axis(value, axis, own[name][axis])
    return resized


def _resize_axis(bias: Tensor, axis: int, size: int) -> Tensor:
    last = bias.transpose(axis, -1)
    flat = interpolate(last.reshape(1, -1, last.shape[-1]), size=size, mode="linear", align_corners=False)
    return flat.reshape(*last.shape[:-1], size).transpose(axis, -1)
