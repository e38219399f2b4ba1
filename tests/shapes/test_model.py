"""The embedded model's architecture: stock classes, exact autoencoder, own tokenizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from vision_attn.shapes.detector import score
from vision_attn.shapes.model import (
    build_autoencoder,
    build_clip_tokenizer,
    build_pipeline,
    build_t5_tokenizer,
    byte_pair_merges,
    read_settings,
    words,
)
from vision_attn.shapes.scenes import render, sample_scene

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "shapes-flux"


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_a_saved_model_is_a_stock_pipeline_offline(tiny_flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline = FluxPipeline.from_pretrained(tiny_flux_folder)
    classes = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderTiny,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": T5Tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    for name, kind in classes.items():
        assert type(getattr(pipeline, name)) is kind
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert getattr(pipeline, name).dtype == torch.float32
    assert pipeline.vae_scale_factor == 2
    settings = read_settings(tiny_flux_folder) | {"height": 32, "width": 48, "num_inference_steps": 2}
    pipeline.set_progress_bar_config(disable=True)
    first, second = (
        pipeline(**settings, generator=torch.Generator().manual_seed(4), output_type="np").images for _ in range(2)
    )
    assert first.shape == (1, 32, 48, 3)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)


def test_a_saved_model_is_small_and_half_precision(tiny_flux_folder: Path) -> None:
    from safetensors.torch import load_file

    assert sum(path.stat().st_size for path in tiny_flux_folder.rglob("*") if path.is_file()) < 20_000_000
    weights = load_file(tiny_flux_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_the_encoder_is_the_standardised_mean_of_2x2_pixels() -> None:
    vae = build_autoencoder()
    picture = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(picture).latents * vae.config.scaling_factor
    means = torch.nn.functional.avg_pool2d((picture + 1) / 2, 2)
    expected = (means - torch.tensor([0.85, 0.82, 0.78])[:, None, None]) / 0.22
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_decoding_is_bicubic_resizing_and_keeps_flat_colors() -> None:
    vae = build_autoencoder()
    coarse = torch.rand(1, 3, 10, 14, generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2
    picture = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="nearest") * 2 - 1
    expected = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bicubic") * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(vae.encode(picture).latents).sample, expected, rtol=0, atol=4e-3)
        for level in (-1.0, -0.3, 1.0):
            flat = torch.full((1, 3, 12, 16), level)
            assert (vae.decode(vae.encode(flat).latents).sample - flat)[..., 2:-2, 2:-2].abs().max() < 4e-3


@pytest.mark.parametrize("height, width", [(48, 48), (48, 64), (96, 64)])
def test_nothing_that_the_detector_sees_is_lost(height: int, width: int) -> None:
    vae = build_autoencoder()
    for index in range(25):
        scene = sample_scene([13, index], height, width)
        with torch.no_grad():
            decoded = vae.decode(vae.encode(as_tensor(render(scene))).latents).sample[0]
        picture = ((decoded.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        assert score(picture, scene).right


def test_every_word_is_one_token() -> None:
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
    assert {"red", "circle", "left", "of", "background", "small"} <= set(words())
    for word in words():
        assert clip.tokenize(word) == [f"{word}</w>"]
        assert t5.tokenize(word) == [f"\u2581{word}"]
    longest = "a yellow triangle, a purple triangle, a black circle and a green star on a gray background."
    assert len(t5(longest).input_ids) <= 24
    assert t5.unk_token_id not in t5(longest).input_ids
    assert t5.unk_token_id in t5("a zebra").input_ids
    assert t5("").input_ids == [t5.eos_token_id]


def encode(pipeline: FluxPipeline, caption: str) -> torch.Tensor:
    ids = pipeline.tokenizer_2([caption], padding="max_length", return_tensors="pt").input_ids
    return pipeline.text_encoder_2(ids)[0][0]


@pytest.mark.parametrize(
    "caption, other, word, share",
    [
        ("a red circle and a blue square", "a blue circle and a red square", 2, 0.3),  # its color
        ("a red circle left of a blue square", "a red circle right of a blue square", 2, 0.2),  # its relation
    ],
)
def test_words_know_their_neighbours(caption: str, other: str, word: int, share: float) -> None:
    pipeline = build_pipeline(0)
    with torch.no_grad():
        first, second = encode(pipeline, caption), encode(pipeline, other)
    assert (first[word] - second[word]).norm() > share * first[word].norm()


def test_words_know_their_neighbours_after_training() -> None:
    pipeline = FluxPipeline.from_pretrained(ASSETS, local_files_only=True)
    with torch.no_grad():
        first, second = (
            encode(pipeline, f"a {a} circle and a {b} square")[2] for a, b in (("red", "blue"), ("blue", "red"))
        )
    assert (first - second).norm() > 0.1 * first.norm()


def test_the_same_seed_builds_the_same_weights_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = build_pipeline(1), build_pipeline(1), build_pipeline(2)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        one, two, three = (list(getattr(pipeline, name).parameters()) for pipeline in (first, second, other))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_settings_are_refused_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"read_settings: directory must hold vision_attn.json, got .*: export"):
        read_settings(tmp_path)


def test_the_embedded_model_draws_what_it_is_told() -> None:
    pipeline = FluxPipeline.from_pretrained(ASSETS, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 20_000_000
    captions = ["a red circle", "a blue square", "a green star", "a black triangle"]
    settings = read_settings(ASSETS) | {"height": 48, "width": 48, "num_inference_steps": 12, "prompt": captions}
    settings["negative_prompt"] = [""] * 4
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    pictures = pipeline(**settings, generator=generators).images
    assert sum(score(picture, caption).objects for picture, caption in zip(pictures, captions, strict=True)) >= 3


def test_byte_pair_merges_do_not_depend_on_hash_order() -> None:
    # Worked by hand: "ed</w>" occurs twice, then ties in alphabetical order.
    assert byte_pair_merges(["red", "bed"]) == [("e", "d</w>"), ("b", "ed</w>"), ("r", "ed</w>")]
    ids = build_clip_tokenizer()("a red circle left of a blue square, and.").input_ids
    assert ids == [134, 28, 124, 98, 114, 116, 28, 94, 128, 55, 83, 54, 135]
