"""Token layouts of UNets: one grid per resolution level, read from the feature map that enters a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vision_attn.layout import TokenLayout
from vision_attn.patching.layouts.family import Family
from vision_attn.patching.layouts.image import CROSS_ATTENTION

TEMPORAL = "temporal attention: one token per frame"


def _feature_map(block: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Pixels of a feature map `[B or B * T, C, Y, X]`, row-major."""
    return TokenLayout(tuple(call["hidden_states"].shape[-2:]))


def _feature_map_with_text(block: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """Keys are text, then the pixels; queries are the pixels alone (added key and value projections)."""
    text = call["encoder_hidden_states"]
    if text is None:
        return None
    return TokenLayout(tuple(call["hidden_states"].shape[-2:]), text_before=text.shape[1])


def _unet_block(block: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """Blocks that concatenate text to the keys are told apart by their name; the others hold the pixels alone."""
    if "SimpleCrossAttn" in type(block).__name__:
        return _feature_map_with_text(block, call)
    if getattr(getattr(block, "config", None), "only_cross_attention", False):
        return None  # the first attention sees the text as well, and there may be as much text as pixels
    return _feature_map(block, call)


def _kandinsky3(block: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """Pixels; only the first attention of a level is without text."""
    return TokenLayout(tuple(call["x"].shape[-2:])) if call["context"] is None else None


def _stable_cascade(block: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """Queries are the pixels; keys are the pixels, then the conditions, or the conditions alone."""
    if not block.self_attn:
        return None
    return TokenLayout(tuple(call["x"].shape[-2:]), text_after=call["kv"].shape[1])


def _uvit(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Codebook indices `[B, Y, X]`, halved by the down block of a model that has one."""
    rows, columns = call["input_ids"].shape[1:]
    factor = 2 if model.config.downsample else 1
    return TokenLayout((rows // factor, columns // factor))


def relative_sizes(model: Any, names: Sequence[str]) -> dict[str, int]:
    """How many times coarser the map of each layer is than the finest of them, on each axis; 1 where nothing tells."""
    sizes = {name: downsampling(model, name) for name in names}
    finest = min(sizes.values(), default=1)
    return {name: size // finest for name, size in sizes.items()}


def tells_levels(model: Any) -> bool:
    """Whether the blocks of a model with several levels say where they halve their maps."""
    return len(getattr(model, "down_blocks", ())) < 2 or any(_halvings(model, "down"))


def _halvings(model: Any, way: str) -> list[bool]:
    """Of each block on the way down or up, whether it changes the size of its map."""
    names = f"{way}samplers", f"base_{way}samplers"  # the second in a ControlNet-XS
    blocks = getattr(model, f"{way}_blocks", ())
    return [any(getattr(block, name, None) for name in names) for block in blocks]


def downsampling(model: Any, name: str) -> int:
    """How often the sample is halved on the way to a layer, as a factor."""
    stage, _, rest = name.partition(".")
    down, up = _halvings(model, "down"), _halvings(model, "up")
    number = rest.partition(".")[0]
    if stage == "down_blocks" and number.isdigit():
        return 2 ** sum(down[: int(number)])
    if stage == "up_blocks" and number.isdigit():
        return 2 ** max(0, sum(down) - sum(up[: int(number)]))
    return 2 ** sum(down) if stage == "mid_block" else 1


_SKIP = (
    ("*temporal*", TEMPORAL),
    ("*temp_attentions*", TEMPORAL),
    ("*motion_modules*", TEMPORAL),
    ("transformer_in.*", TEMPORAL),
    ("*.fuser.*", "attention to the boxes of GLIGEN"),
    ("*.attn2", CROSS_ATTENTION),
)

# Blocks that call attention themselves, on a feature map of the size they are given; resampling comes after it.
_BLOCKS = (
    "AttnDownBlock2D",
    "AttnUpBlock2D",
    "AttnSkipDownBlock2D",
    "AttnSkipUpBlock2D",
    "UNetMidBlock2D",
    "KCrossAttnDownBlock2D",
    "KCrossAttnUpBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "SimpleCrossAttnUpBlock2D",
    "UNetMidBlock2DSimpleCrossAttn",
)

UNET_FAMILIES: tuple[Family, ...] = (
    Family(
        "unet",
        (
            "UNet2DConditionModel",
            "UNet2DModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "UNetSpatioTemporalConditionModel",
            "I2VGenXLUNet",
            "DreamLiteUNetModel",
            "UNetControlNetXSModel",
            "ControlNetModel",
            "ControlNetUnionModel",
            "SparseControlNetModel",
        ),
        _unet_block,
        scope=(
            "Transformer2DModel",
            "DreamLiteTransformer2DModel",
            "TransformerSpatioTemporalModel",
            *_BLOCKS,
        ),
        skip=_SKIP,
        timesteps=-1,
    ),
    Family(
        "kandinsky3",
        ("Kandinsky3UNet",),
        _kandinsky3,
        scope=("Kandinsky3AttentionBlock",),
        skip=(
            ("add_time_condition.*", "attention pooling of text"),
            ("*.attentions.[1-9]*.attention", CROSS_ATTENTION),
        ),
    ),
    Family("stable_cascade", ("StableCascadeUNet",), _stable_cascade, scope=("SDCascadeAttnBlock",)),
    Family(
        "uvit",
        ("UVit2DModel",),
        _uvit,
        skip=(("down_block.*", CROSS_ATTENTION), ("up_block.*", CROSS_ATTENTION), ("*.attn2", CROSS_ATTENTION)),
    ),
)

REFUSED_UNET: dict[str, str] = {
    "UNet1DModel": "its sequences are one-dimensional signals, not images",
    "MotionAdapter": "it only carries weights: patch the UNetMotionModel made from it",
    "ControlNetXSAdapter": "it only carries weights: patch the UNetControlNetXSModel made from it",
}
