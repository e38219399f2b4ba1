"""Token layouts of ControlNets of transformers: they lay out tokens as the model they steer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vision_attn.layout import TokenLayout
from vision_attn.patching.layouts.family import Family
from vision_attn.patching.layouts.image import (
    CROSS_ATTENTION,
    TEXT_ONLY,
    _flux,
    _image,
    _image_text,
    _qwen,
    _text_grid,
    _z_image,
)


def _flux_controlnet(model: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """T|I; a union ControlNet puts one token for its mode in front."""
    layout = _flux(model, call)
    return None if layout is None else _behind_mode(model, layout)


def _flux_controlnet_of_grid(model: Any, call: Mapping[str, Any], grid: tuple[int, ...]) -> TokenLayout:
    return _behind_mode(model, _text_grid(model, call, grid))


def _behind_mode(model: Any, layout: TokenLayout) -> TokenLayout:
    return replace(layout, text_before=layout.text_before + 1) if model.union else layout


def _sd3_controlnet(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """I|T, or I alone in a ControlNet without text."""
    return _image(model, call) if call["encoder_hidden_states"] is None else _image_text(model, call)


CONTROLNET_FAMILIES: tuple[Family, ...] = (
    Family(
        "flux_controlnet",
        ("FluxControlNetModel",),
        _flux_controlnet,
        layout_of_grid=_flux_controlnet_of_grid,
        timesteps=-1,
    ),
    Family("sd3_controlnet", ("SD3ControlNetModel",), _sd3_controlnet, image_only=("*.attn2",), timesteps=-1),
    Family("qwen_image_controlnet", ("QwenImageControlNetModel",), _qwen, timesteps=-1),
    Family(
        "hunyuan_dit_controlnet",
        ("HunyuanDiT2DControlNetModel",),
        _image,
        skip=(("*.attn2", CROSS_ATTENTION),),
        timesteps=-1,
    ),
    Family(
        "z_image_controlnet",
        ("ZImageControlNetModel",),
        _z_image,
        skip=(("context_refiner.*", TEXT_ONLY),),
        image_only=("noise_refiner.*", "control_noise_refiner.*"),
        open_end=True,
        timesteps=1,
    ),
)

_ONE_BY_ONE = "it only holds other models: patch each of its `nets`"

REFUSED_CONTROLNET: dict[str, str] = {
    "SanaControlNetModel": "its self-attention is linear (no softmax over keys, so no window), the rest is "
    "cross-attention to text",
    "FluxMultiControlNetModel": _ONE_BY_ONE,
    "SD3MultiControlNetModel": _ONE_BY_ONE,
    "QwenImageMultiControlNetModel": _ONE_BY_ONE,
    "HunyuanDiT2DMultiControlNetModel": _ONE_BY_ONE,
    "MultiControlNetModel": _ONE_BY_ONE,
    "MultiControlNetUnionModel": _ONE_BY_ONE,
}
