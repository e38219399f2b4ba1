"""A-STAR around SD3 and FLUX: stock inputs, timesteps and images, positions of concepts, batches, and mistakes."""

from functools import partial

import diffusers
import pytest
import torch
from tiny_pipelines import make_flux, make_sd3

from vision_attn.guidance import LatentGuide, segregation_loss
from vision_attn.pipelines import AStarPipeline
from vision_attn.pipelines.denoiser_flow import FluxDenoiser, SD3Denoiser

PROMPTS = ["a red circle and a blue square", "a green star, a black circle and a red triangle"]
OPTIONS = {"height": 16, "width": 24, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 20}
SD3_TURNS = {"cfg": {"guidance_scale": 4.0, "negative_prompt": "a white star"}, "plain": {"guidance_scale": 1.0}}
FLUX_TURNS = {"cfg": {"true_cfg_scale": 3.0, "negative_prompt": "a white star"}, "plain": {"guidance_scale": 2.0}}
CASES = {
    **{f"sd3-{name}": (make_sd3, turn) for name, turn in SD3_TURNS.items()},
    "sd3-dynamic": (partial(make_sd3, use_dynamic_shifting=True), SD3_TURNS["plain"]),
    "sd3-mu": (partial(make_sd3, use_dynamic_shifting=True), {"mu": 0.7}),
    **{f"flux-{name}": (make_flux, turn) for name, turn in FLUX_TURNS.items()},
}
cases = pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES)
kinds = pytest.mark.parametrize("make", [make_sd3, make_flux], ids=["sd3", "flux"])
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy 2


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def watched(pipe):
    """The calls of the transformer from here on."""
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls, handle


@cases
def test_a_step_size_of_zero_is_the_stock_pipeline(make, options):
    pipe, options = make(), {**OPTIONS, **options}
    stock = pipe(PROMPTS[0], generator=seeds(1), **options).images
    guided = AStarPipeline(pipe)
    assert torch.equal(guided(PROMPTS[0], step_size=0, generator=seeds(1), **options).images, stock)
    moved = guided(PROMPTS[0], generator=seeds(1), **options)
    assert not torch.equal(moved.images, stock)
    assert moved.images.isfinite().all()
    assert torch.tensor(moved.losses).shape == (2, 1)
    assert torch.equal(pipe(PROMPTS[0], generator=seeds(1), **options).images, stock)


@cases
def test_the_model_is_called_as_the_stock_pipeline_calls_it(make, options):
    """In every step the guided call is the conditional rows of the stock call that follows it."""
    pipe, options = make(), {**OPTIONS, **options}
    if "negative_prompt" in options:
        options["negative_prompt"] = ["a white star", "a green circle"]
    stock, handle = watched(pipe)
    pipe(PROMPTS, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), **options)
    handle.remove()
    both, handle = watched(pipe)
    AStarPipeline(pipe)(
        PROMPTS, num_images_per_prompt=2, share=1, step_size=1e-30, generator=seeds(1, 2, 3, 4), **options
    )
    handle.remove()
    turns = len(both) // 4
    for step in range(4):
        guided, expected = both[step * turns], stock[step * (turns - 1)]
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"):
            if expected.get(name) is not None:
                assert torch.equal(guided[name], expected[name][-4:]), name
        for name in ("img_ids", "txt_ids"):
            assert name not in expected or torch.equal(guided[name], expected[name])


@cases
def test_timesteps_are_the_stock_pipelines(make, options):
    pipe = make()
    pipe(PROMPTS[0], generator=seeds(1), **OPTIONS, **options)
    timesteps, sigmas = pipe.scheduler.timesteps.clone(), pipe.scheduler.sigmas.clone()
    kind = SD3Denoiser if make is not make_flux else FluxDenoiser
    denoiser = kind(pipe, PROMPTS[:1], height=16, width=24, steps=4, options={**OPTIONS, **options})
    pipe.scheduler.set_timesteps(7, **({"mu": 0.1} if pipe.scheduler.config.use_dynamic_shifting else {}))
    assert torch.equal(denoiser.timesteps, timesteps)
    assert torch.equal(pipe.scheduler.sigmas, sigmas)
    AStarPipeline(pipe)(PROMPTS[0], generator=seeds(1), **OPTIONS, **options)
    assert torch.equal(pipe.scheduler.timesteps, timesteps)


@pytest.mark.parametrize("loss", ["a-star", "attend-and-excite"])
@kinds
def test_a_batch_is_its_prompts(make, loss):
    guided = AStarPipeline(make())
    options = {**OPTIONS, "share": 1.0, "loss": loss, "step_size": 5.0}
    batch = guided(PROMPTS, generator=seeds(1, 2), **options)
    for number, prompt in enumerate(PROMPTS):
        alone = guided(prompt, generator=seeds(number + 1), **options)
        torch.testing.assert_close(alone.images[0], batch.images[number], atol=1e-4, rtol=1e-4)
        assert [step[0] for step in alone.losses] == pytest.approx([step[number] for step in batch.losses], abs=1e-4)


@kinds
def test_moves_lower_the_loss(make):
    pipe = make()
    kind = SD3Denoiser if make is make_sd3 else FluxDenoiser
    denoiser = kind(pipe, PROMPTS[:1], images=2, height=16, width=24, steps=4, options=OPTIONS)
    groups = [list(denoiser.concepts("test", PROMPTS[0], ["red circle", "blue square"]).values())] * 2
    guide = LatentGuide(denoiser.module, groups, text=denoiser.words(), loss=lambda maps, masks: segregation_loss(maps))
    latents = denoiser.noise(seeds(1, 2))
    for _ in range(6):
        latents = guide.move(latents, 10.0, lambda z: denoiser.forward(z, 1))
    for sample in range(2):
        losses = [step[sample] for step in guide.losses]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 1e-3


def test_positions_in_the_text_of_both_encoders():
    """CLIP has BOS, then a word each; T5 a word each, after the 24 tokens of CLIP."""
    pipe = make_sd3()
    options = {**OPTIONS, "max_sequence_length": 6}  # five words are left
    denoiser = SD3Denoiser(pipe, [PROMPTS[0]], height=16, width=24, steps=4, options=options)
    assert denoiser.concepts("test", PROMPTS[0], None) == {"red circle": [2, 3, 25, 26], "blue square": [6, 7]}
    assert denoiser.words() == [[1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28]]
    assert denoiser.condition["encoder_hidden_states"].shape == (1, 24 + 6, 32)
    pipe.text_encoder_3 = None
    assert denoiser.concepts("test", PROMPTS[0], None) == {"red circle": [2, 3], "blue square": [6, 7]}
    flux = FluxDenoiser(make_flux(), [PROMPTS[0]], height=16, width=24, steps=4, options=OPTIONS)
    assert flux.concepts("test", PROMPTS[0], ["a red", (19, 30)]) == {"a red": [0, 1], "blue square": [5, 6]}
    assert flux.words() == [[0, 1, 2, 3, 4, 5, 6]]
    flux = FluxDenoiser(make_flux(), [PROMPTS[0]], height=16, width=24, steps=4, options=options)
    with pytest.warns(UserWarning, match=r"beyond the 5 tokens that the encoder reads are left out: \['blue square'\]"):
        assert flux.concepts("test", PROMPTS[0], None) == {"red circle": [1, 2]}
    with pytest.raises(ValueError, match=r"spans must be within the 5 tokens .* got 'blue square' at position 6"):
        flux.concepts("test", PROMPTS[0], ["blue square"])


@kinds
def test_noise_of_ones_own_and_layers(make):
    pipe = make()
    kind = SD3Denoiser if make is make_sd3 else FluxDenoiser
    noise = kind(pipe, PROMPTS[:1], height=16, width=24, steps=4, options=OPTIONS).noise(seeds(1))
    guided, seen = AStarPipeline(pipe), []
    expected = guided(PROMPTS[0], generator=seeds(1), **OPTIONS).images
    assert torch.equal(guided(PROMPTS[0], latents=noise, **OPTIONS).images, expected)

    def callback(stock, index, timestep, tensors):
        seen.append(tensors["latents"].shape)
        return {}

    first = guided(
        PROMPTS[0], latents=noise, layers="transformer_blocks.0.*", callback_on_step_end=callback, **OPTIONS
    ).images
    assert not torch.equal(first, expected)
    assert seen == [noise.shape] * 4


def test_sizes_and_steps_of_the_stock_pipeline():
    for kind, pipe in ((SD3Denoiser, make_sd3()), (FluxDenoiser, make_flux())):
        denoiser = kind(pipe, PROMPTS)
        side = pipe.default_sample_size * pipe.vae_scale_factor
        assert (denoiser.height, denoiser.width, denoiser.steps) == (side, side, 28)


def test_a_compiled_model_is_guided_by_the_module_inside():
    pipe = make_flux()
    expected = AStarPipeline(pipe)(PROMPTS[0], generator=seeds(1), **OPTIONS).images
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert FluxDenoiser(pipe, PROMPTS).module is pipe.transformer._orig_mod
    torch.testing.assert_close(AStarPipeline(pipe)(PROMPTS[0], generator=seeds(1), **OPTIONS).images, expected)


@pytest.mark.parametrize("name", ["prompt_2", "prompt_3", "sigmas", "ip_adapter_image", "negative_ip_adapter_image"])
def test_arguments_that_must_be_left_out(name):
    with pytest.raises(TypeError, match=f"{name} must be left out"):
        AStarPipeline(make_flux())(PROMPTS[0], **{name: [1.0]}, **OPTIONS)


def test_models_that_are_refused():
    pipe = make_flux()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(NotImplementedError, match=r"scheduler must go on from .*, got FlowMatchHeunDiscreteScheduler"):
        AStarPipeline(pipe)(PROMPTS[0], **OPTIONS)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(NotImplementedError, match=r"must compute every step, .*: call pipe.transformer.disable_cache"):
        AStarPipeline(pipe)
