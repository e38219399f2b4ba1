import numpy as np
import pytest
import torch
from torch import nn

from vision_attn.benchmark.generation import Request, denoiser, generate


class Result:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Plain:
    """A pipeline that answers with what it was asked for."""

    def __call__(
        self,
        prompt=None,
        height=None,
        width=None,
        num_inference_steps=50,
        guidance_scale=7.5,
        generator=None,
        output_type="pil",
    ):
        self.asked = {name: value for name, value in locals().items() if name != "self"}
        noise = torch.rand(1, height or 8, width or 8, 3, generator=generator)
        return Result(images=noise.numpy())


class Distilled(Plain):
    def __call__(
        self,
        prompt=None,
        negative_prompt=None,
        true_cfg_scale=1.0,
        guidance_scale=3.5,
        generator=None,
        output_type="pil",
    ):
        return super().__call__(prompt, generator=generator, output_type=output_type)


class Video:
    def __call__(self, prompt=None, num_frames=5, generator=None, output_type="pil"):
        return Result(frames=np.zeros((1, num_frames, 8, 12, 3), dtype=np.float32))


def test_only_what_is_given_is_passed_on():
    assert Request("a cat").arguments(Plain()) == {"prompt": "a cat"}
    request = Request("a cat", height_px=16, width_px=24, steps=3, guidance=0.0)
    assert request.arguments(Plain()) == {
        "prompt": "a cat",
        "height": 16,
        "width": 24,
        "num_inference_steps": 3,
        "guidance_scale": 0.0,
    }


@pytest.mark.parametrize(("guidance", "negative"), [(3.0, {"negative_prompt": ""}), (1.0, {})])
def test_distilled_pipelines_get_real_guidance(guidance, negative):
    arguments = Request("a cat", guidance=guidance).arguments(Distilled())
    assert arguments == {"prompt": "a cat", "true_cfg_scale": guidance, **negative}


def test_a_request_that_the_pipeline_cannot_serve():
    with pytest.raises(ValueError, match="generate: Plain takes no max_sequence_length, num_frames: leave it out"):
        generate(Plain(), Request("a cat", frames=3, max_sequence_length=77))


def test_the_seed_decides():
    first, again, other = (generate(Plain(), Request("a cat", seed=seed)) for seed in (1, 1, 2))
    assert first.shape == (8, 8, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_video_comes_back_with_its_frames():
    assert generate(Video(), Request("a cat", frames=3)).shape == (3, 8, 12, 3)


def test_a_models_defaults_fill_what_is_left_open():
    defaults = {
        "prompt": "theirs",
        "height": 64,
        "width": 96,
        "num_inference_steps": 20,
        "true_cfg_scale": 3.0,
        "other": 1,
    }
    filled = Request("", seed=4, width_px=32, guidance=0.0).filled_from(defaults)
    assert filled == Request("theirs", 4, 64, 32, 20, 0.0)
    assert Request("mine").filled_from(defaults).prompt == "mine"
    assert Request("mine").filled_from({}) == Request("mine")


def test_denoiser_is_the_transformer_or_the_unet():
    model = nn.Linear(1, 1)
    assert denoiser(Result(unet=model, text_encoder=nn.Linear(2, 2))) is model
    assert denoiser(Result(transformer=model, unet=None)) is model
    with pytest.raises(ValueError, match="denoiser: pipe must have a transformer or a UNet, got Result"):
        denoiser(Result(vae=model))
