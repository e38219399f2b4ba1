import numpy as np
import pytest
import torch

from vision_attn.benchmark.generation import Request, draws_video, generate, size_multiple


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
    filled = Request(seed=4, width_px=32, guidance=0.0).filled_from(defaults)
    assert filled == Request("theirs", 4, 64, 32, 20, 0.0)
    assert Request("mine").filled_from(defaults).prompt == "mine"
    assert Request("mine").filled_from({}) == Request("mine")


def test_an_empty_prompt_is_a_prompt():
    assert Request("").filled_from({"prompt": "theirs"}).prompt == ""
    assert Request("").arguments(Plain()) == {"prompt": ""}


class Halving(Plain):
    """Tells the scale of its VAE."""

    vae_scale_factor = 2


class Packing(Halving):
    """Packs 2x2 latents into a token, as FLUX does; its transformer tells so, too."""

    transformer = Result(config=Result(in_channels=12))
    vae = Result(config=Result(latent_channels=3))

    def _pack_latents(self):
        pass


class PackingElsewhere(Packing):
    """Has the method, but its transformer takes the latents as they are."""

    transformer = Result(config=Result(in_channels=3))


class Rounding(Plain):
    """Does not tell its multiple and rounds down to 8."""

    def __call__(self, prompt=None, height=None, width=None, generator=None, output_type="pil"):
        return super().__call__(prompt, height // 8 * 8, width // 8 * 8, generator=generator, output_type=output_type)


@pytest.mark.parametrize(("pipe", "multiple"), [(Plain(), 1), (Halving(), 2), (Packing(), 4), (PackingElsewhere(), 2)])
def test_sizes_are_multiples_of_what_one_token_covers(pipe, multiple):
    assert size_multiple(pipe) == multiple


@pytest.mark.parametrize(
    ("pipe", "sides", "message"),
    [
        (Packing(), (49, 55), "multiples of 4 pixels for Packing, got 49x55: the nearest size is 48x56$"),
        (Packing(), (48, 55), "multiples of 4 pixels for Packing, got 48x55: the nearest size is 48x56$"),
        (Packing(), (1, 2), "multiples of 4 pixels for Packing, got 1x2: the nearest size is 4x4$"),
        (Halving(), (None, 5), "multiples of 2 pixels for Halving, got defaultx5: the nearest size is defaultx4$"),
        (Rounding(), (49, 64), "a size that Rounding can draw, got 49x64: it drew 48x64, ask for that$"),
    ],
)
def test_another_size_than_asked_is_never_drawn_in_silence(pipe, sides, message):
    with pytest.raises(ValueError, match=f"generate: height and width must be {message}"):
        generate(pipe, Request("a cat", height_px=sides[0], width_px=sides[1]))


def test_videos_are_known_beforehand():
    assert draws_video(Video())
    assert not draws_video(Plain())
