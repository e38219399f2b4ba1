"""A-STAR as a block of modular SDXL, against the block-less pipeline and `AStarPipeline`."""

from functools import partial

import diffusers
import pytest
import torch
from tiny_pipelines import make_sdxl

from vision_attn.pipelines import AStarPipeline, AStarStep

PROMPTS = ["a red circle and a blue square", "a green star, a black circle and a red triangle"]
SIZE = {"height": 64, "width": 96, "num_inference_steps": 4}
SETTINGS = {"resolution": (16, 24), "step_size": 5.0, "share": 1.0}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy 2


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def modular(stock, *steps, guidance_scale=5.0):
    blocks = diffusers.StableDiffusionXLAutoBlocks().get_workflow("text2image")
    for step in steps:
        blocks.sub_blocks["denoise.denoise"].sub_blocks.insert("a_star", step, 0)
    pipe = blocks.init_pipeline()
    names = ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe.update_components(**{name: getattr(stock, name) for name in names})
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=guidance_scale))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=PROMPTS, **options):
    options = {"generator": seeds(1, 2), "output_type": "latent", **SIZE, **options}
    return pipe(prompt=prompt, output=["images", "losses", "maps"], **options)


def test_a_step_size_of_zero_changes_no_bit():
    stock = make_sdxl()
    plain = modular(stock)(prompt=PROMPTS, generator=seeds(1, 2), output_type="latent", output="images", **SIZE)
    still = draw(modular(stock, AStarStep(resolution=(16, 24), step_size=0.0)))
    assert torch.equal(still["images"], plain)
    assert (still["losses"], still["maps"]) == ([], [])


@pytest.mark.parametrize(
    "scheduler",
    [partial(diffusers.DDIMScheduler, clip_sample=False), diffusers.EulerDiscreteScheduler],
    ids=["ddim", "euler"],
)
@pytest.mark.parametrize(("scale", "rounding"), [(1.0, 1e-6), (5.0, 5e-6)])
def test_it_draws_what_the_pipeline_draws(scheduler, scale, rounding):
    """To rounding: with guidance, modular pipelines run its halves one after the other, not as one batch."""
    stock = make_sdxl()
    stock.scheduler, settings = scheduler(), {**SETTINGS, "step_size": 10.0}
    concepts = [["circle", "square"], ["star", "black circle"]]
    guided = AStarPipeline(stock)(
        PROMPTS, concepts=concepts, generator=seeds(1, 2), guidance_scale=scale, output_type="latent", return_maps=True,
        **SIZE, **settings,
    )  # fmt: skip
    largest = guided.images.abs().max()
    pipe = modular(stock, AStarStep(return_maps=True, **settings), guidance_scale=scale)
    for _ in range(2):
        found = draw(pipe, concepts=concepts)
        assert (found["images"] - guided.images).abs().max() <= rounding * largest
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(guided.losses), atol=rounding, rtol=0)
        for own, theirs in zip(found["maps"], guided.maps, strict=True):
            assert list(own) == list(theirs)
            for name in own:
                torch.testing.assert_close(own[name], theirs[name], atol=rounding, rtol=0)
    plain = draw(modular(stock, AStarStep(step_size=0.0), guidance_scale=scale))["images"]
    assert (plain - guided.images).abs().max() > 100 * rounding * largest


def test_several_images_of_a_prompt():
    found = draw(modular(make_sdxl(), AStarStep(**SETTINGS)), PROMPTS[0], num_images_per_prompt=2)
    assert torch.tensor(found["losses"]).shape == (4, 2)


def run_with(stock, settings, **options):
    draw(modular(stock, AStarStep(**settings)), PROMPTS, **options)


@pytest.mark.parametrize(
    ("settings", "options", "error", "message"),
    [
        ({"strength": 2}, {}, TypeError, "unexpected keyword argument 'strength'"),
        ({}, {"prompt_2": PROMPTS}, NotImplementedError, "AStarStep: prompt_2 must be left out"),
        ({}, {"concepts": ["circle"]}, ValueError, r"AStarStep: concepts must be one list per prompt, 2, got"),
        ({"share": 2}, {}, ValueError, "share must be from 0 to 1, got 2"),
        ({"loss": "iou"}, {}, ValueError, "loss must be one of a-star, attend-and-excite"),
    ],
)
def test_mistakes(settings, options, error, message):
    with pytest.raises(error, match=message):
        run_with(make_sdxl(), settings, **options)


def test_schedulers_and_models_that_do_not_fit():
    stock = make_sdxl()
    stock.scheduler = diffusers.HeunDiscreteScheduler()
    with pytest.raises(
        NotImplementedError, match=r"AStarStep: scheduler must go on from .*, got HeunDiscreteScheduler"
    ):
        run_with(stock, {})
    stock = make_sdxl()
    stock.vae.register_to_config(latent_channels=3)
    latents = torch.randn(2, 4, 32, 48)
    with pytest.raises(
        NotImplementedError, match="AStarStep: pipe must have a UNet of latents alone, 3 channels, got 4"
    ):
        run_with(stock, {}, latents=latents)
