"""Token layouts of text-to-image transformers: one small pure function per way of laying out a sequence.

Each function gets the model and its forward arguments by name, and returns the layout of the sequence that attention
sees, or `None` when this call has none that can be told. T, I and R in the docstrings are text, target image and
reference images. Text, reference images, registers and pads are all `text` of a `TokenLayout`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vision_attn.layout import TokenLayout
from vision_attn.patching.layouts.family import Family
from vision_attn.patching.layouts.position_ids import (
    grid_from_ids,
    ids_table,
    leading_run,
    outside_of_graphs,
    read_grid,
    read_target,
)

Call = Mapping[str, Any]

CROSS_ATTENTION = "cross-attention to text: its keys are not the image"
TEXT_ONLY = "text only: it never sees the image"


def _spatial(grid: tuple[int, ...]) -> tuple[int, ...]:
    """A single frame is an image: `(1, Y, X)` becomes `(Y, X)`."""
    return grid[1:] if len(grid) == 3 and grid[0] == 1 else grid


def _latent_grid(model: Any, call: Call) -> tuple[int, int]:
    """Grid of a latent `[B, C, rows, columns]` cut in squares of `patch_size`."""
    rows, columns = call["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    return rows // patch, columns // patch


def _text_tokens(call: Call) -> int:
    return call["encoder_hidden_states"].shape[1]


def _image(model: Any, call: Call) -> TokenLayout:
    """I; text comes by cross-attention."""
    return TokenLayout(_latent_grid(model, call))


def _text_image(model: Any, call: Call) -> TokenLayout:
    """T|I."""
    return TokenLayout(_latent_grid(model, call), text_before=_text_tokens(call))


def _image_text(model: Any, call: Call) -> TokenLayout:
    """I|T."""
    return TokenLayout(_latent_grid(model, call), text_after=_text_tokens(call))


def _auraflow(model: Any, call: Call) -> TokenLayout:
    """Registers|T|I."""
    registers = model.register_tokens.shape[1]
    return TokenLayout(_latent_grid(model, call), text_before=registers + _text_tokens(call))


def _flux(model: Any, call: Call) -> TokenLayout | None:
    """T|I|R; references differ from the target in the first column of `img_ids`."""
    if call.get("kv_cache_mode") is not None:
        return None  # FLUX.2 with cached references attends in several calls of its own
    target, grid = read_target(call["img_ids"])
    if grid is None:
        return None
    return TokenLayout(grid, text_before=_text_tokens(call), text_after=call["hidden_states"].shape[1] - target)


def _text_grid(model: Any, call: Call, grid: tuple[int, ...]) -> TokenLayout:
    """T|I. References cannot be told from a target of another size than the user says, and are not guessed."""
    return TokenLayout(grid, text_before=_text_tokens(call))


def _flux3(model: Any, call: Call) -> TokenLayout | None:
    """T|I|R; references come as an argument of their own."""
    grid = read_grid(call["img_ids"])
    return None if grid is None else _flux3_of_grid(model, call, grid)


def _flux3_of_grid(model: Any, call: Call, grid: tuple[int, ...]) -> TokenLayout:
    references = call["image_cond_hidden_states"]
    after = 0 if references is None else references.shape[1]
    return TokenLayout(grid, text_before=_text_tokens(call), text_after=after)


def _image_shapes(call: Call) -> list[tuple[int, int, int]] | None:
    """Shapes (T, Y, X) of target and references, the same for each sample; `None` if samples differ."""
    shapes = call["img_shapes"]
    if isinstance(shapes, tuple):
        shapes = [shapes]
    samples = [[sample] if isinstance(sample[0], int) else list(sample) for sample in shapes]
    return samples[0] if all(sample == samples[0] for sample in samples) else None


def _qwen(model: Any, call: Call) -> TokenLayout | None:
    """T|I|R; layered models draw a stack of equal pictures before the reference: those are frames of one grid."""
    shapes = _image_shapes(call)
    if shapes is None:
        return None
    frames, rows, columns = shapes[0]
    if getattr(model.config, "use_layer3d_rope", False):
        frames = len(shapes) - 1
    target = frames * rows * columns
    return TokenLayout(
        _spatial((frames, rows, columns)),
        text_before=_text_tokens(call),
        text_after=call["hidden_states"].shape[1] - target,
    )


def _qwen21(model: Any, call: Call) -> TokenLayout | None:
    """T and R interleaved|I; one slot of the text stands for four tokens of a reference image."""
    shapes = _image_shapes(call)
    if shapes is None:
        return None
    references = sum(math.prod(shape) for shape in shapes[:-1])
    prefix = _text_tokens(call) - references // 4 + references
    return TokenLayout(_spatial(tuple(shapes[-1])), text_before=prefix)


def _nucleus(model: Any, call: Call) -> TokenLayout | None:
    """Queries I, keys I|T."""
    shapes = _image_shapes(call)
    return None if shapes is None else TokenLayout(_spatial(tuple(shapes[0])), text_after=_text_tokens(call))


def _lumina2(model: Any, call: Call) -> TokenLayout | None:
    """T|I with the unpadded text; prompts of different length shift the image per sample."""
    lengths = call["encoder_attention_mask"].sum(dim=1).tolist()
    if any(length != lengths[0] for length in lengths):
        return None
    return TokenLayout(_latent_grid(model, call), text_before=int(lengths[0]))


def _hidream(model: Any, call: Call) -> TokenLayout | None:
    """I|pads|T5|Llama of all blocks|Llama of this block; an image that is not square is padded to `max_seq` tokens."""
    hidden = call["hidden_states"]
    if hidden.ndim == 4:
        grid: tuple[int, int] = _latent_grid(model, call)
        square = hidden.shape[-2] == hidden.shape[-1]
        padded = grid[0] * grid[1] if square else model.max_seq
    else:
        sizes = [tuple(int(size) for size in sample) for sample in call["img_sizes"]]
        if any(size != sizes[0] for size in sizes):
            return None
        grid, padded = (sizes[0][0], sizes[0][1]), hidden.shape[1]
    llama = call["encoder_hidden_states_llama3"][0].shape[-2]
    text = call["encoder_hidden_states_t5"].shape[-2] + 2 * llama
    return TokenLayout(grid, text_after=padded - grid[0] * grid[1] + text)


def _omnigen(model: Any, call: Call) -> TokenLayout:
    """T with reference images inside|time|I."""
    prompt = call["input_ids"]
    return TokenLayout(_latent_grid(model, call), text_before=1 + (0 if prompt is None else prompt.shape[1]))


def _padded(tokens: int) -> int:
    """Z-Image pads its image and its text to multiples of 32 tokens (`SEQ_MULTI_OF` there)."""
    return -(-tokens // 32) * 32


def _z_image(model: Any, call: Call) -> TokenLayout | None:
    """I|pads|T|pads, the longest prompt of a batch deciding; the omni mode mixes several images."""
    images = call["x"]
    if isinstance(images[0], list) or any(image.shape != images[0].shape for image in images):
        return None
    frames, rows, columns = images[0].shape[1:]
    patch, frame_patch = call["patch_size"], call["f_patch_size"]
    grid = (frames // frame_patch, rows // patch, columns // patch)
    image = math.prod(grid)
    text = max(_padded(len(prompt)) for prompt in call["cap_feats"])
    return TokenLayout(_spatial(grid), text_after=_padded(image) - image + text)


def _hunyuan_image(model: Any, call: Call) -> TokenLayout:
    """I|T of both text encoders."""
    sizes = call["hidden_states"].shape[2:]
    grid = tuple(size // patch for size, patch in zip(sizes, model.config.patch_size, strict=True))
    text = _text_tokens(call)
    second = call["encoder_hidden_states_2"]
    if second is not None and model.context_embedder_2 is not None:
        text += second.shape[1]
    return TokenLayout(_spatial(grid), text_after=text)


def _ernie(model: Any, call: Call) -> TokenLayout:
    """I|T."""
    return TokenLayout(_latent_grid(model, call), text_after=call["text_bth"].shape[1])


# Ideogram4's indicator value of a token of the picture that is drawn.
_IDEOGRAM4_IMAGE = 2


@outside_of_graphs
def _ideogram4(model: Any, call: Call) -> TokenLayout | None:
    """Pads|T|I in one packed sequence, told apart by `indicator`."""
    is_image = (call["indicator"] == _IDEOGRAM4_IMAGE).cpu()
    before = leading_run(is_image[0]) if not is_image[0, 0] else 0
    image = leading_run(is_image[0, before:])
    after = is_image.shape[1] - before - image
    if is_image[0, before + image :].any() or not (is_image == is_image[:1]).all() or not is_image[0].any():
        return None
    grid = grid_from_ids(ids_table(call["position_ids"])[before : before + image])
    return None if grid is None else TokenLayout(grid, text_before=before, text_after=after)


def _krea2(model: Any, call: Call) -> TokenLayout | None:
    """T|I."""
    grid = read_grid(call["position_ids"], start=_text_tokens(call))
    return None if grid is None else _text_grid(model, call, grid)


def _fibo2(model: Any, call: Call) -> TokenLayout:
    """Gist|I|R, or I|R|gist when prompts of different length have different numbers of gist tokens."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    mask, text, config = call["encoder_attention_mask"], call["encoder_hidden_states"], model.config
    gists = compute_gist_count(
        [text.shape[2]] if mask is None else mask.sum(dim=1).tolist(),
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )
    references = sum(
        (latent.shape[2] // config.patch_size) * (latent.shape[3] // config.patch_size)
        for latent in call["context_latents"] or []
    )
    grid = _latent_grid(model, call)
    if min(gists) < max(gists):
        return TokenLayout(grid, text_after=references + max(gists))
    return TokenLayout(grid, text_before=max(gists), text_after=references)


def _joy(model: Any, call: Call) -> TokenLayout:
    """I|R|T; the last of several items is the target and moves to the front."""
    hidden = call["hidden_states"]
    items = hidden.shape[1] if hidden.ndim == 6 else 1
    grid = tuple(size // patch for size, patch in zip(hidden.shape[-3:], model.patch_size, strict=True))
    return TokenLayout(_spatial(grid), text_after=(items - 1) * math.prod(grid) + _text_tokens(call))


def _joy_plus(model: Any, call: Call) -> TokenLayout | None:
    """I|R|pads|T, of tokens that are patches already."""
    grid = tuple(call["shape_list"][0][0])
    if any(tuple(sample[0]) != grid for sample in call["shape_list"]):
        return None
    rest = call["hidden_states"].shape[1] - math.prod(grid)
    return TokenLayout(_spatial(grid), text_after=rest + _text_tokens(call))


def _legacy_transformer(model: Any, call: Call) -> TokenLayout:
    """I of a feature map `[B, C, rows, columns]`, of a latent in patches, or of `[B, tokens]` codebook indices."""
    if model.is_input_vectorized:
        return TokenLayout((model.height, model.width))
    rows, columns = call["hidden_states"].shape[-2:]
    patch = model.patch_size if model.is_input_patches else 1
    return TokenLayout((rows // patch, columns // patch))


_CROSS = (("*.attn2", CROSS_ATTENTION),)

IMAGE_FAMILIES: tuple[Family, ...] = (
    Family(
        "flux",
        (
            "FluxTransformer2DModel",
            "Flux2Transformer2DModel",
            "ChromaTransformer2DModel",
            "BriaTransformer2DModel",
            "BriaFiboTransformer2DModel",
            "LongCatImageTransformer2DModel",
            "OvisImageTransformer2DModel",
        ),
        _flux,
        layout_of_grid=_text_grid,
        timesteps=-1,
    ),
    Family(
        "flux3",
        ("Flux3Transformer2DModel",),
        _flux3,
        layout_of_grid=_flux3_of_grid,
        skip=(
            ("txt_mode_blocks.*", TEXT_ONLY),
            ("mode_blocks.image_cond.*", "reference images only"),
        ),
        image_only=("mode_blocks.image.*",),
        timesteps=-1,
    ),
    Family("qwen_image", ("QwenImageTransformer2DModel",), _qwen, timesteps=-1),
    Family("qwen_image_21", ("QwenImage21Transformer2DModel",), _qwen21, in_parts=True),
    Family("nucleus_image", ("NucleusMoEImageTransformer2DModel",), _nucleus),
    Family("sd3", ("SD3Transformer2DModel",), _image_text, image_only=("*.attn2",), timesteps=-1),
    Family("auraflow", ("AuraFlowTransformer2DModel",), _auraflow, timesteps=-1),
    Family(
        "image_tokens",
        ("PixArtTransformer2DModel", "DiTTransformer2DModel", "HunyuanDiT2DModel", "LuminaNextDiT2DModel"),
        _image,
        skip=_CROSS,
    ),
    Family("transformer_2d", ("Transformer2DModel",), _legacy_transformer, skip=_CROSS),
    Family(
        "text_image",
        (
            "CogView3PlusTransformer2DModel",
            "CogView4Transformer2DModel",
            "GlmImageTransformer2DModel",
            "PRXTransformer2DModel",
        ),
        _text_image,
        timesteps=-1,
    ),
    Family(
        "lumina2",
        ("Lumina2Transformer2DModel",),
        _lumina2,
        skip=(("context_refiner.*", TEXT_ONLY),),
        image_only=("noise_refiner.*",),
        timesteps=1,
    ),
    Family("hidream", ("HiDreamImageTransformer2DModel",), _hidream, timesteps=-1),
    Family("omnigen", ("OmniGenTransformer2DModel",), _omnigen),
    Family(
        "z_image",
        ("ZImageTransformer2DModel",),
        _z_image,
        skip=(("context_refiner.*", TEXT_ONLY), ("siglip_refiner.*", "reference features only")),
        image_only=("noise_refiner.*",),
        open_end=True,
        timesteps=1,
    ),
    Family(
        "hunyuan_image",
        ("HunyuanImageTransformer2DModel",),
        _hunyuan_image,
        skip=(("context_embedder.*", TEXT_ONLY),),
        timesteps=-1,
    ),
    Family("ernie_image", ("ErnieImageTransformer2DModel",), _ernie),
    Family("ideogram4", ("Ideogram4Transformer2DModel",), _ideogram4),
    Family(
        "krea2",
        ("Krea2Transformer2DModel",),
        _krea2,
        layout_of_grid=_text_grid,
        skip=(("text_fusion.*", TEXT_ONLY),),
    ),
    Family(
        "fibo2",
        ("BriaFibo2Transformer2DModel",),
        _fibo2,
        skip=(("perceiver.*", TEXT_ONLY), ("*.cross_attention", CROSS_ATTENTION)),
        image_only=("noise_refiner.*",),
        open_end=True,
    ),
    Family("joy_image_edit", ("JoyImageEditTransformer3DModel",), _joy),
    Family("joy_image_edit_plus", ("JoyImageEditPlusTransformer3DModel",), _joy_plus),
)

REFUSED_IMAGE: dict[str, str] = {
    "SanaTransformer2DModel": "its self-attention is linear (no softmax over keys, so no window), the rest is "
    "cross-attention to text",
    "PriorTransformer": "it predicts one image embedding: its sequence has no token grid",
    "DreamLiteTransformer2DModel": "it is a block of the DreamLite UNet: patch the whole UNet",
}
