"""A-STAR around stock pipelines: what it must not change, what it lowers, schedulers, batches, and mistakes."""

from functools import partial

import diffusers
import pytest
import torch
from tiny_pipelines import make_sd, make_sdxl

from vision_attn.guidance import (
    AttentionCapture,
    LatentGuide,
    concept_maps,
    concept_sheet,
    segregation_loss,
    token_groups,
)
from vision_attn.pipelines import AStarPipeline, StructuredDiffusionPipeline

PROMPTS = ["a red circle and a blue square", "a green star, a black circle and a red triangle"]
OPTIONS = {"height": 64, "width": 96, "num_inference_steps": 4, "output_type": "latent", "resolution": (16, 24)}
STOCK = {name: value for name, value in OPTIONS.items() if name != "resolution"}
SCHEDULERS = {
    "ddim": partial(diffusers.DDIMScheduler, steps_offset=1, clip_sample=False),
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy 2


@pytest.fixture(params=[make_sd, make_sdxl], ids=["sd", "sdxl"])
def pipe(request):
    return request.param()


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_size_of_zero_is_the_stock_pipeline(name):
    pipe = make_sd()
    pipe.scheduler = SCHEDULERS[name]()
    stock = pipe(PROMPTS[0], generator=seeds(1), **STOCK).images
    assert torch.equal(AStarPipeline(pipe)(PROMPTS[0], step_size=0, generator=seeds(1), **OPTIONS).images, stock)
    guided = AStarPipeline(pipe)(PROMPTS[0], generator=seeds(1), **OPTIONS)
    assert not torch.equal(guided.images, stock)
    assert guided.images.isfinite().all()
    assert torch.tensor(guided.losses).shape == (2, 1)
    assert torch.equal(pipe(PROMPTS[0], generator=seeds(1), **STOCK).images, stock)


def test_moves_lower_the_loss(pipe):
    groups = [token_groups(pipe.tokenizer, prompt, ["red circle", "blue square"]) for prompt in [PROMPTS[0]] * 2]
    guide = LatentGuide(pipe.unet, groups, loss=lambda maps, masks: segregation_loss(maps), resolution=(16, 24))
    text = torch.randn(2, 24, pipe.unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    latents = torch.randn(2, 4, 32, 48, generator=seeds(1)[0])
    for _ in range(6):
        latents = guide.move(latents, 100.0, lambda z: pipe.unet(z, 500, text, added_cond_kwargs=added))
    for sample in range(2):
        losses = [step[sample] for step in guide.losses]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="latents must be 2 samples, got 1"):
        guide.move(latents[:1], 1.0, lambda z: None)


@pytest.mark.parametrize("loss", ["a-star", "attend-and-excite"])
def test_a_batch_is_its_prompts(pipe, loss):
    guided = AStarPipeline(pipe)
    options = {**OPTIONS, "share": 1.0, "loss": loss, "step_size": 5.0}
    batch = guided(PROMPTS, generator=seeds(1, 2), **options)
    for number, prompt in enumerate(PROMPTS):
        alone = guided(prompt, generator=seeds(number + 1), **options)
        torch.testing.assert_close(alone.images[0], batch.images[number], atol=1e-4, rtol=1e-4)
        assert [step[0] for step in alone.losses] == pytest.approx([step[number] for step in batch.losses], abs=1e-4)


def test_refinement_moves_each_sample_until_its_loss_is_below_the_target():
    """By single moves of the same size, sample by sample."""
    pipe = make_sd()
    groups = [token_groups(pipe.tokenizer, PROMPTS[0], ["red circle", "blue square"])]
    text = torch.randn(2, 24, 16)
    latents = torch.randn(2, 4, 32, 48, generator=seeds(1)[0])

    def guide(count):
        return LatentGuide(
            pipe.unet, groups * count, loss=lambda maps, masks: segregation_loss(maps), resolution=(16, 24)
        )

    def forward(rows, z):
        return pipe.unet(z, 500, text[rows])

    paths = []
    for sample in range(2):
        rows, alone = slice(sample, sample + 1), guide(1)
        path = [latents[rows]]
        for _ in range(7):
            path.append(alone.move(path[-1], 300.0, partial(forward, rows)))
        paths.append((path, [losses[0] for losses in alone.losses]))
    target = (paths[0][1][2] + paths[0][1][3]) / 2  # the first sample is below it after three moves
    counts = [next((k for k, loss in enumerate(losses[:6]) if loss <= target), 5) for _, losses in paths]
    assert counts[0] == 3
    assert counts[1] != 3
    both = guide(2)
    moved = both.move(latents, 300.0, partial(forward, slice(None)), target=target, iterations=5)
    for sample, ((path, losses), count) in enumerate(zip(paths, counts, strict=True)):
        torch.testing.assert_close(moved[sample], path[count + 1][0], atol=1e-4, rtol=1e-4)
        assert both.losses == [
            [pytest.approx(losses[count], abs=1e-5) if k == sample else value for k, value in enumerate(both.losses[0])]
        ]


def test_refined_steps_have_further_moves():
    seen = []

    def loss(maps, masks):
        seen.append(masks is None)
        return segregation_loss(maps)

    guided = AStarPipeline(make_sd())
    refined = guided(PROMPTS[0], loss=loss, refine={1: -1}, iterations=3, generator=seeds(1), **OPTIONS)
    assert seen == [True, False, False, False, False]  # a step, and one with three moves that go before its own
    assert len(refined.losses) == 2
    once = guided(PROMPTS[0], loss=loss, refine={1: 10.0}, generator=seeds(1), **OPTIONS).images
    assert torch.equal(once, guided(PROMPTS[0], loss=loss, generator=seeds(1), **OPTIONS).images)
    assert not torch.equal(once, refined.images)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_maps_of_the_last_step(share):
    """From the call of the UNet itself: its last one, of both halves of guidance, sees the latents of the last step."""
    pipe = make_sd()
    calls = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda unet, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    prompt = ["a circle and a circle", PROMPTS[0]]
    options = {**OPTIONS, "share": share, "concepts": [["circle", (15, 21)], [[2, 3], range(6, 8)]]}
    output = AStarPipeline(pipe)(prompt, return_maps=True, generator=seeds(1, 2), **options)
    assert [list(maps) for maps in output.maps] == [["circle", "circle (2)"], ["tokens 2, 3", "tokens 6, 7"]]
    handle.remove()
    last = next(call for call in reversed(calls) if call[0][0].shape[0] == (4 if share == 0.5 else 2))
    with torch.no_grad(), AttentionCapture(pipe.unet, resolution=(16, 24)) as capture:
        pipe.unet(*last[0], **last[1])
    expected = concept_maps(capture.probabilities[-2:], [[2], [5], [2, 3], [6, 7]])
    for number, maps in enumerate(output.maps):
        torch.testing.assert_close(torch.stack(list(maps.values())), expected[number, 2 * number : 2 * number + 2])
    if share == 0.5:
        plain = AStarPipeline(pipe)(prompt, generator=seeds(1, 2), **options)
        assert torch.equal(plain.images, output.images)
        assert not hasattr(plain, "maps")


def test_maps_of_a_run_without_moves():
    pipe = make_sd()
    pipe.scheduler.register_to_config(steps_offset=1)
    options = {**OPTIONS, "output_type": "pil"}
    output = AStarPipeline(pipe)(PROMPTS[0], step_size=0, return_maps=True, generator=seeds(1), **options)
    sheet = concept_sheet(output.images[0], output.maps[0])
    assert sheet.width > 3 * 256
    assert list(output.maps[0]) == ["red circle", "blue square"]


def test_retention_joins_in_the_second_step():
    seen = []

    def loss(maps, masks):
        seen.append(None if masks is None else set(masks.unique().tolist()))
        return segregation_loss(maps)

    AStarPipeline(make_sd())(PROMPTS[0], loss=loss, share=1, generator=seeds(1), **OPTIONS)
    assert seen[0] is None
    assert len(seen) == 4
    assert all(values <= {0.0, 1.0} for values in seen[1:])


def test_callbacks_see_moved_latents():
    pipe, seen = make_sd(), []

    def callback(stock, index, timestep, tensors):
        seen.append((index, tensors["latents"].clone(), tensors["prompt_embeds"].shape))
        return {}

    AStarPipeline(pipe)(
        PROMPTS[0], generator=seeds(1), callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **OPTIONS,
    )  # fmt: skip
    assert [index for index, *_ in seen] == [0, 1, 2, 3]
    assert seen[0][2] == (2, 24, 16)


def test_concepts_that_a_user_names():
    guided = AStarPipeline(make_sd())
    named = guided(PROMPTS[0], concepts=["circle", "square"], generator=seeds(1), **OPTIONS).images
    groups = token_groups(guided.tokenizer, PROMPTS[0], ["circle", "square"])
    assert torch.equal(guided(PROMPTS[0], concepts=groups, generator=seeds(1), **OPTIONS).images, named)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"concepts": ["a green star"]}, ValueError, r"phrases must be in the prompt .* got 'a green star'"),
        ({"concepts": []}, ValueError, r"concepts must be named for 'a red circle and a blue square'"),
        ({"loss": "iou"}, ValueError, "loss must be one of a-star, attend-and-excite or a function, got 'iou'"),
        ({"loss": 3}, TypeError, "loss must be a name or a function of maps and masks, got 3"),
        (
            {"refine": {2: 0.5}},
            ValueError,
            r"refine must name steps before which latents move, \[0, 1\] here, got \[2\]",
        ),
        ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
        ({"mode": "median"}, ValueError, "binarize: mode must be one of"),
        ({"share": 2}, ValueError, "share must be from 0 to 1, got 2"),
        ({"step_size": -1}, ValueError, "step_size must be at least 0 and finite, got -1"),
        ({"step_size": float("nan"), "share": 0.25}, ValueError, "step_size must be at least 0 and finite, got nan"),
        ({"refine": [0]}, TypeError, r"refine must be a mapping of steps to losses, got \[0\]"),
        ({"loss": lambda maps, masks: 0.5}, TypeError, "loss must give a scalar tensor .*, got 0.5"),
        ({"loss": lambda maps, masks: maps.sum(-1)}, TypeError, r"loss must give .*, got one of shape \(2, 16\)"),
        ({"return_maps": True, "return_dict": False}, TypeError, "return_dict must be left out with return_maps"),
        ({"resolution": (3, 3)}, ValueError, r"resolution must be one of .* got \(3, 3\)"),
        ({"prompt_embeds": torch.zeros(1)}, TypeError, "prompt_embeds must be left out"),
        ({"ip_adapter_image": torch.zeros(1)}, TypeError, "ip_adapter_image must be left out"),
        ({"stepsize": 40}, TypeError, "arguments must be its own or those of StableDiffusionPipeline, got 'stepsize'"),
        ({"denoising_end": 0.5}, TypeError, "denoising_end must be left out"),
        ({"concepts": []}, ValueError, r"for 'a red circle and a blue square', got \[\]"),
        ({"loss": lambda maps, masks: maps.sum() * float("nan")}, RuntimeError, "loss and gradient must be finite"),
    ],
)
def test_mistakes(arguments, error, message):
    pipe = make_sd()
    with pytest.raises(error, match=message):
        AStarPipeline(pipe)(PROMPTS[0], generator=seeds(1), **{**OPTIONS, **arguments})
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_prompts_that_do_not_fit():
    guided = AStarPipeline.from_pipe(make_sd())
    with pytest.raises(ValueError, match="concepts must be named for 'of and the'"):
        guided("of and the", **OPTIONS)
    with pytest.raises(ValueError, match=r"concepts must be one list per prompt, 2, got \['a'\]"):
        guided(PROMPTS, concepts=["a"], **OPTIONS)
    with pytest.raises(NotImplementedError, match=r"AStarPipeline: pipe must be one of .*, got DDPMScheduler"):
        AStarPipeline(diffusers.DDPMScheduler())
    distilled = make_sd()
    distilled.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(NotImplementedError, match="must not take its guidance scale as a condition"):
        AStarPipeline(distilled)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.PNDMScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.DPMSolverSinglestepScheduler,
        diffusers.SASolverScheduler,
    ],
)
def test_schedulers_that_lose_moves_are_refused(scheduler):
    guided = AStarPipeline(make_sd())
    guided.scheduler = scheduler()
    with pytest.raises(NotImplementedError, match=f"scheduler must go on from .*, got {scheduler.__name__}"):
        guided(PROMPTS[0], **OPTIONS)


def test_pipelines_with_more_than_text_are_refused():
    class StableDiffusionControlNetPipeline:
        components = make_sd().components

    message = "pipe must be one of .*, got StableDiffusionControlNetPipeline"
    with pytest.raises(NotImplementedError, match=message):
        AStarPipeline(StableDiffusionControlNetPipeline())


def test_callbacks_of_diffusers():
    class Callback(diffusers.callbacks.PipelineCallback):
        tensor_inputs = ("prompt_embeds",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"prompt_embeds": callback_kwargs["prompt_embeds"]}

    callback = Callback(cutoff_step_ratio=None, cutoff_step_index=1)
    AStarPipeline(make_sd())(PROMPTS[0], generator=seeds(1), callback_on_step_end=callback, **OPTIONS)


def test_inference_mode_is_refused():
    guided = AStarPipeline(make_sd())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"moved outside of torch.inference_mode\(\)"):
        guided(PROMPTS[0], **OPTIONS)


def test_a_move_survives_unipc():
    """Its predictor starts at the very latents that were moved; elsewhere its corrector has changed them."""
    pipe, seen, starts = make_sd(), [], []
    pipe.scheduler = diffusers.UniPCMultistepScheduler(disable_corrector=[4])
    own = pipe.scheduler.disable_corrector

    def callback(stock, index, timestep, tensors):
        seen.append(tensors["latents"].clone())
        starts.append(stock.scheduler.last_sample.clone())
        return {}

    options = {**OPTIONS, "num_inference_steps": 6}
    AStarPipeline(pipe)(PROMPTS[0], share=0.5, generator=seeds(1), callback_on_step_end=callback, **options)
    survives = [torch.equal(before, after) for before, after in zip(seen, starts[1:], strict=False)]
    assert survives == [True, True, False, False, True]  # moved before steps 1 and 2; after step 4 by the user's list
    assert pipe.scheduler.disable_corrector is own
    assert own == [4]


def test_the_scheduler_and_the_bar_are_restored_after_an_error():
    pipe = make_sd()
    pipe.scheduler = diffusers.UniPCMultistepScheduler()
    own = pipe.scheduler.disable_corrector

    def callback(stock, index, timestep, tensors):
        assert stock.scheduler.disable_corrector == [0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AStarPipeline(pipe)(PROMPTS[0], generator=seeds(1), callback_on_step_end=callback, **OPTIONS)
    assert pipe.scheduler.disable_corrector is own
    assert own == []
    assert "progress_bar" not in vars(pipe)


def test_the_progress_bar_tells_the_loss(capsys):
    pipe = make_sd()
    pipe.set_progress_bar_config(disable=False, mininterval=0, miniters=1)
    losses = AStarPipeline(pipe)(PROMPTS, generator=seeds(1, 2), **OPTIONS).losses
    shown = capsys.readouterr().err
    for step in losses:
        assert f"loss={sum(step) / 2:.3g}" in shown
    pipe(PROMPTS[0], **STOCK)
    assert "loss" not in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["covering", "conjunction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_structured_pipeline_is_guided(pipe, mode, guidance_scale):
    """Without moves it is the structured pipeline; moves are those of a denoiser that reads the structured text."""
    options = {**OPTIONS, "generator": None, "guidance_scale": guidance_scale}
    structured = StructuredDiffusionPipeline.from_pipe(pipe, mode=mode, strength=0.5)
    guided = AStarPipeline.from_pipe(structured)
    plain = {name: value for name, value in options.items() if name != "resolution"}
    expected = structured(PROMPTS, **{**plain, "generator": seeds(1, 2)}).images
    assert torch.equal(guided(PROMPTS, step_size=0, **{**options, "generator": seeds(1, 2)}).images, expected)
    moved = guided(PROMPTS, **{**options, "generator": seeds(1, 2)})
    with structured.text_context(PROMPTS, mode=mode, strength=0.5):
        inside = AStarPipeline(pipe)(PROMPTS, **{**options, "generator": seeds(1, 2)})
    assert torch.equal(moved.images, inside.images)
    assert moved.losses == inside.losses
    first = AStarPipeline(pipe)(PROMPTS, **{**options, "generator": seeds(1, 2)}).losses[0]
    assert moved.losses[0] != first  # the forward before the first step reads the phrases, too
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_phrases_of_a_structured_pipeline():
    pipe = make_sd()
    guided = AStarPipeline(StructuredDiffusionPipeline(pipe, mode="replace"))
    given = guided(PROMPTS[0], phrases=["blue square"], generator=seeds(1), **OPTIONS).images
    assert not torch.equal(guided(PROMPTS[0], generator=seeds(1), **OPTIONS).images, given)
    with pytest.raises(TypeError, match="phrases must be left out around StableDiffusionPipeline: make"):
        AStarPipeline(pipe)(PROMPTS[0], phrases=["blue square"], **OPTIONS)
