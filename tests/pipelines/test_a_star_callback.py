"""A-STAR as a callback: what `AStarPipeline` draws, from the pipeline's own tensors; images to begin with; mistakes."""

from functools import partial

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDXLCFGCutoffCallback
from tiny_pipelines import make_sd, make_sdxl

from vision_attn.pipelines import AStarCallback, AStarPipeline

PROMPTS = ["a red circle and a blue square", "a green star, a black circle and a red triangle"]
SIZE = {"height": 64, "width": 96, "num_inference_steps": 4}
SETTINGS = {"resolution": (16, 24), "step_size": 5.0, "share": 1.0}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy 2


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipe, callback, prompt=PROMPTS[0], begin=None, **options):
    latents = callback.initial_latents(**SIZE, **(begin or {"generator": seeds(1)}))
    options = {"generator": seeds(1), "output_type": "latent", **SIZE, **options}
    return pipe(prompt, latents=latents, callback_on_step_end=callback, **options).images


@pytest.mark.parametrize(
    "scheduler",
    [partial(diffusers.DDIMScheduler, clip_sample=False), diffusers.EulerDiscreteScheduler],
    ids=["ddim", "euler"],
)
@pytest.mark.parametrize("make", [make_sd, make_sdxl], ids=["sd", "sdxl"])
def test_it_draws_what_the_pipeline_draws(make, scheduler):
    pipe = make()
    pipe.scheduler = scheduler()
    settings = {**SETTINGS, "step_size": 5.0, "refine": {0: -1.0}, "iterations": 2}
    guided = AStarPipeline(pipe)(PROMPTS, generator=seeds(1, 2), output_type="latent", **SIZE, **settings)
    callback = AStarCallback(pipe, PROMPTS, **settings)
    for _ in range(2):  # a callback can be used again
        images = draw(pipe, callback, PROMPTS, {"generator": seeds(1, 2)}, generator=seeds(1, 2))
        assert torch.equal(images, guided.images)
        assert callback.losses == guided.losses
        assert len(callback.losses) == 4
    stock = pipe(PROMPTS, generator=seeds(1, 2), output_type="latent", **SIZE).images
    assert (images - stock).abs().max() > 1e-4 * stock.abs().max()


def test_without_guidance_there_is_no_uncond_half():
    pipe = make_sd()
    options = {"num_images_per_prompt": 2, "guidance_scale": 1.0}
    guided = AStarPipeline(pipe)(PROMPTS[0], generator=seeds(1, 2), output_type="latent", **SIZE, **SETTINGS, **options)
    callback = AStarCallback(pipe, PROMPTS[0], **SETTINGS)
    begin = {"generator": seeds(1, 2), "num_images_per_prompt": 2}
    assert torch.equal(draw(pipe, callback, PROMPTS[0], begin, generator=seeds(1, 2), **options), guided.images)


def test_no_move_changes_no_bit_and_others_may_call_back_too():
    pipe = make_sdxl()
    noise = torch.randn(1, 4, 32, 48, generator=seeds(3)[0])
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    stock = pipe(PROMPTS[0], latents=noise, callback_on_step_end=cutoff, output_type="latent", **SIZE).images
    for size, same in ((0.0, True), (5.0, False)):
        callback = AStarCallback(pipe, PROMPTS[0], **{**SETTINGS, "step_size": size})
        latents = callback.initial_latents(latents=noise, **SIZE)
        both = MultiPipelineCallbacks([callback, cutoff])
        images = pipe(PROMPTS[0], latents=latents, callback_on_step_end=both, output_type="latent", **SIZE).images
        assert torch.equal(images, stock) == same
        assert len(callback.losses) == (0 if same else 4)


def from_image(kind, stock, **more):
    stock.unet.register_to_config(sample_size=64)  # these pipelines compare it
    parts = {name: part for name, part in stock.components.items() if name in kind._get_signature_types()}
    pipe = kind(**parts, requires_safety_checker=False) if kind is not XL else kind(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 96, generator=seeds(4)[0])
    return partial(
        pipe, PROMPTS[0], image=image, strength=0.75, num_inference_steps=4, output_type="latent", **more
    ), pipe


XL = diffusers.StableDiffusionXLImg2ImgPipeline
MASK = {"mask_image": torch.ones(1, 1, 64, 96), "height": 64, "width": 96}


@pytest.mark.parametrize(
    ("kind", "make", "more"),
    [
        (diffusers.StableDiffusionImg2ImgPipeline, make_sd, {}),
        (diffusers.StableDiffusionInpaintPipeline, make_sd, MASK),
        (XL, make_sdxl, {}),
    ],
    ids=["image", "inpaint", "sdxl image"],
)
def test_pipelines_that_begin_with_an_image(kind, make, more):
    run, pipe = from_image(kind, make(), **more)
    stock = run(generator=seeds(1)[0]).images
    still = AStarCallback(pipe, PROMPTS[0], **{**SETTINGS, "step_size": 0.0})
    assert torch.equal(run(generator=seeds(1)[0], callback_on_step_end=still).images, stock)
    seen = []

    def loss(maps, masks):
        seen.append((maps.shape, masks is None))
        return (maps[0] * maps[1]).sum()

    callback = AStarCallback(pipe, PROMPTS[0], **SETTINGS, loss=loss)
    moved = run(generator=seeds(1)[0], callback_on_step_end=callback).images
    assert not torch.equal(moved, stock)
    # Three of four steps are left at this strength, and before the first of them nothing moves.
    assert seen == [((2, 16, 24), True), ((2, 16, 24), False)]
    with pytest.raises(NotImplementedError, match=f"initial_latents: pipe must begin with noise, got {kind.__name__}"):
        callback.initial_latents()


def test_timesteps_are_those_of_the_run():
    """By hand: the second of three moves, with the text and the timestep that the UNet itself was called with."""
    run, pipe = from_image(diffusers.StableDiffusionImg2ImgPipeline, make_sd())
    calls = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda unet, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run(generator=seeds(1)[0], callback_on_step_end=AStarCallback(pipe, PROMPTS[0], **SETTINGS))
    handle.remove()
    own = [call for call in calls if call[0][0].shape[0] == 1]
    stock = [call for call in calls if call[0][0].shape[0] == 2]
    assert [int(args[1]) for args, _ in own] == [int(args[1]) for args, _ in stock[1:]]
    for (args, kwargs), (stock_args, stock_kwargs) in zip(own, stock[1:], strict=True):
        assert torch.equal(kwargs["encoder_hidden_states"], stock_kwargs["encoder_hidden_states"][1:])
        assert args[0].shape == stock_args[0][1:].shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": 2}, TypeError, "unexpected keyword argument 'strength'"),
        ({"concepts": ["a green star"]}, ValueError, r"phrases must be in the prompt .* got 'a green star'"),
        ({"prompt": PROMPTS, "concepts": ["a"]}, ValueError, r"AStarCallback: concepts must be one list per prompt, 2"),
        (
            {"refine": {4: 0.5}},
            ValueError,
            r"refine must name steps before which latents move, \[0, 1\] here, got \[4\]",
        ),
        ({"iterations": -1}, ValueError, "AStarCallback: iterations must be at least 0, got -1"),
    ],
)
def test_mistakes(arguments, error, message):
    pipe = make_sd()
    with pytest.raises(error, match=message):
        AStarCallback(pipe, **{"prompt": PROMPTS[0], **arguments}).initial_latents(**SIZE)


def test_runs_that_do_not_fit():
    pipe = make_sd()
    callback = AStarCallback(pipe, PROMPTS[0], **SETTINGS)
    with pytest.raises(ValueError, match="num_inference_steps must be the 4 of initial_latents, got 5"):
        draw(pipe, callback, num_inference_steps=5)
    with pytest.raises(ValueError, match="pipe must be the pipeline that calls back, got StableDiffusionPipeline and"):
        draw(make_sd(), callback)
    unipc = make_sd()
    unipc.scheduler = diffusers.UniPCMultistepScheduler()
    with pytest.raises(NotImplementedError, match=r"AStarCallback: scheduler must go on from .*, got UniPCMultistep"):
        draw(unipc, AStarCallback(unipc, PROMPTS[0], **SETTINGS))
    run, image_pipe = from_image(diffusers.StableDiffusionImg2ImgPipeline, make_sd())
    with pytest.raises(ValueError, match="prompt must be the pipeline's, got 2 prompts for 1 images"):
        run(callback_on_step_end=AStarCallback(image_pipe, PROMPTS, **SETTINGS))
    with pytest.raises(NotImplementedError, match=r"AStarCallback: pipe must be one of .*, got DDIMScheduler"):
        AStarCallback(pipe.scheduler, PROMPTS[0])
    inpaint = make_sd()
    inpaint.unet.register_to_config(in_channels=9)
    _, inpaint = from_image(diffusers.StableDiffusionInpaintPipeline, inpaint)
    with pytest.raises(NotImplementedError, match="must have a UNet of latents alone, 4 channels, got 9"):
        AStarCallback(inpaint, PROMPTS[0])


def test_a_step_size_is_the_same_move_under_every_scheduler():
    """The model sees the same input at the same time, whose move is to be the same."""
    pipe = make_sd()
    noise = torch.randn(1, 4, 16, 20, generator=torch.Generator().manual_seed(3))
    moved = []
    for kind in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.LMSDiscreteScheduler):
        pipe.scheduler = kind(timestep_spacing="leading", steps_offset=1)
        callback = AStarCallback(pipe, "a red circle and a blue square", step_size=50.0, resolution=(16, 20))
        moved.append(callback.initial_latents(latents=noise, height=32, width=40, num_inference_steps=4))
    assert (moved[0] - noise).abs().max() > 1e-4
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=0, atol=1e-6)
