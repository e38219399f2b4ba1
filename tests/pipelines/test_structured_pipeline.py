"""The structured pipeline against the stock one inside a value context."""

import copy

import diffusers
import pytest
import torch
from tiny_pipelines import make_sd, make_sdxl
from zoo_flux import flux

from vision_attn.guidance import structured_embeddings, text_context, value_context
from vision_attn.pipelines.structured import StructuredDiffusionPipeline

PROMPTS = ["a red circle and a blue square", "a green star, a black circle and a red triangle"]
OPTIONS = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(params=[make_sd, make_sdxl], ids=["sd", "sdxl"])
def pipe(request):
    return request.param()


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_it_is_the_stock_pipeline_in_a_value_context(pipe):
    structured = StructuredDiffusionPipeline.from_pipe(pipe)
    value = structured_embeddings(pipe, PROMPTS[0], mode="replace").value_embeds
    stock = pipe(PROMPTS[0], generator=seeds(1), **OPTIONS).images
    with value_context(pipe.unet, value):
        expected = pipe(PROMPTS[0], generator=seeds(1), **OPTIONS).images
    assert torch.equal(structured(PROMPTS[0], mode="replace", generator=seeds(1), **OPTIONS).images, expected)
    assert not torch.equal(expected, stock)
    assert torch.equal(structured(PROMPTS[0], strength=0, generator=seeds(1), **OPTIONS).images, stock)
    assert torch.equal(pipe(PROMPTS[0], generator=seeds(1), **OPTIONS).images, stock)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("mode", ["covering", "conjunction"])
def test_a_batch_is_its_prompts(pipe, mode, guidance_scale):
    structured = StructuredDiffusionPipeline(pipe.to(torch.float64))
    prompts = [*PROMPTS, "star"]  # two phrases, three, none
    options = {**OPTIONS, "guidance_scale": guidance_scale, "mode": mode}
    batch = structured(prompts, generator=seeds(1, 2, 3), **options).images
    for number, prompt in enumerate(prompts):
        alone = structured(prompt, generator=seeds(number + 1), **options).images
        torch.testing.assert_close(alone[0], batch[number], atol=1e-10, rtol=0)
    several = structured(prompts, num_images_per_prompt=2, generator=seeds(1, 1, 2, 2, 3, 3), **options).images
    torch.testing.assert_close(several, batch.repeat_interleave(2, 0), atol=1e-10, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_conjunction_is_the_stock_pipeline_in_a_text_context(pipe, guidance_scale):
    structured = StructuredDiffusionPipeline(pipe)
    options = {**OPTIONS, "guidance_scale": guidance_scale}
    texts = structured_embeddings(pipe, PROMPTS[0], mode="conjunction")
    stock = pipe(PROMPTS[0], generator=seeds(1), **options).images
    with text_context(pipe.unet, [texts]):
        expected = pipe(PROMPTS[0], generator=seeds(1), **options).images
    assert len(texts.key_embeds) == 3
    assert torch.equal(structured(PROMPTS[0], mode="conjunction", generator=seeds(1), **options).images, expected)
    replaced = structured(PROMPTS[0], mode="replace", generator=seeds(1), **options).images
    assert not torch.equal(expected, stock)
    assert not torch.allclose(expected, replaced, atol=1e-5)


@pytest.mark.parametrize("mode", ["paper", "conjunction"])
def test_no_strength_and_no_phrases_are_the_stock_pipeline(pipe, mode):
    structured = StructuredDiffusionPipeline(pipe)
    stock = pipe(PROMPTS, generator=seeds(1, 2), **OPTIONS).images
    for nothing in ({"strength": 0}, {"phrases": [[], []]}):
        assert torch.equal(structured(PROMPTS, mode=mode, **nothing, generator=seeds(1, 2), **OPTIONS).images, stock)


def test_other_calls_inside_its_context_read_the_phrases(pipe):
    structured = StructuredDiffusionPipeline(pipe)
    given = {"phrases": [["a blue square"], []], "mode": "conjunction", "strength": 0.5, "num_images_per_prompt": 2}
    expected = structured(PROMPTS, **given, generator=seeds(1, 2, 3, 4), **OPTIONS).images
    stock = pipe(PROMPTS, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), **OPTIONS).images
    with structured.text_context(PROMPTS, **given, **OPTIONS):
        seen = pipe(PROMPTS, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), **OPTIONS).images
    assert torch.equal(seen, expected)
    assert not torch.allclose(seen[:2], stock[:2], atol=1e-5)
    torch.testing.assert_close(seen[2:], stock[2:], atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="stopped"), structured.text_context(PROMPTS, **given):
        raise RuntimeError("stopped")
    assert torch.equal(pipe(PROMPTS, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), **OPTIONS).images, stock)


def test_phrases_of_each_prompt(pipe):
    structured = StructuredDiffusionPipeline(pipe)
    given = structured(
        PROMPTS, phrases=[["a blue square"], ["a red triangle"]], generator=seeds(1, 2), **OPTIONS
    ).images
    alone = structured(PROMPTS[1], phrases=["a red triangle"], generator=seeds(2), **OPTIONS).images
    torch.testing.assert_close(given[1], alone[0], atol=1e-4, rtol=1e-4)


def test_the_rest_is_the_stock_pipelines(pipe):
    structured = StructuredDiffusionPipeline(pipe)
    assert structured.unet is pipe.unet
    assert structured.components.keys() == pipe.components.keys()
    assert structured.to("cpu") is structured
    structured.scheduler = diffusers.DPMSolverMultistepScheduler()
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert copy.copy(structured).pipe is pipe
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        structured.nothing_of_the_kind  # noqa: B018


def test_text_is_encoded_as_the_stock_pipeline_does(monkeypatch):
    pipe, seen = make_sd(), []
    encode = pipe.encode_prompt

    def watched(prompt, *arguments, **options):
        seen.append(options.get("lora_scale"))
        return encode(prompt, *arguments, **{**options, "lora_scale": None})

    monkeypatch.setattr(pipe, "encode_prompt", watched)
    options = {**OPTIONS, "cross_attention_kwargs": {"scale": 0.5}}
    StructuredDiffusionPipeline(pipe)(PROMPTS[0], generator=seeds(1), **options)
    assert seen == [0.5] * 4  # the prompt and its two phrases, and the stock pipeline's


def test_mistakes(pipe):
    structured = StructuredDiffusionPipeline(pipe)
    with pytest.raises(ValueError, match=r"phrases must be one list per prompt, 2, got \['a'\]"):
        structured(PROMPTS, phrases=["a"], **OPTIONS)
    with pytest.raises(TypeError, match="prompt_embeds must be left out"):
        structured(PROMPTS[0], prompt_embeds=torch.zeros(1, 24, 16), **OPTIONS)
    with pytest.raises(TypeError, match=r"arguments must be its own or those of StableDiff.*, got 'concepts'"):
        structured(PROMPTS[0], concepts=["circle"], **OPTIONS)
    with pytest.raises(NotImplementedError, match=r"StructuredDiffusionPipeline: pipe must be .*, got DDPMScheduler"):
        StructuredDiffusionPipeline.from_pipe(diffusers.DDPMScheduler())


def test_joint_attention_is_refused_with_what_is_possible():
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=flux(), **parts
    )  # fmt: skip
    message = (
        r"got FluxPipeline: where text passes through the denoiser's own layers .* no keys and values of its own: "
        r"use SD 1, SD 2 or SDXL; elsewhere only prompt_embeds can be mixed, before the call \(guidance.align\)"
    )
    with pytest.raises(NotImplementedError, match=message):
        StructuredDiffusionPipeline(pipe)


def test_what_it_is_made_with_holds_for_calls_that_name_nothing():
    pipe = make_sd()
    made = StructuredDiffusionPipeline.from_pipe(pipe, phrases=lambda prompt: ["a blue square"], mode="replace")
    plain = StructuredDiffusionPipeline(pipe)
    named = {"phrases": ["a blue square"], "mode": "replace"}
    expected = plain(PROMPTS[0], generator=seeds(1), **named, **OPTIONS).images
    assert torch.equal(made(PROMPTS[0], generator=seeds(1), **OPTIONS).images, expected)
    stock = pipe(PROMPTS[0], generator=seeds(1), **OPTIONS).images
    assert torch.equal(made(PROMPTS[0], strength=0, generator=seeds(1), **OPTIONS).images, stock)
    made = StructuredDiffusionPipeline(pipe, strength=0.0)
    assert torch.equal(made(PROMPTS[0], generator=seeds(1), **OPTIONS).images, stock)
    assert torch.equal(made(PROMPTS[0], strength=1.0, generator=seeds(1), **named, **OPTIONS).images, expected)


@pytest.mark.parametrize(
    ("defaults", "error", "message"),
    [
        ({"mode": "mean"}, ValueError, "mode must be one of paper, covering, replace, conjunction, got 'mean'"),
        ({"strength": 5}, ValueError, "strength must be from 0 to 1, got 5"),
        ({"strength": "1"}, TypeError, "strength must be a number, got '1'"),
    ],
)
def test_defaults_are_refused_at_once(defaults, error, message):
    with pytest.raises(error, match=f"StructuredDiffusionPipeline: {message}"):
        StructuredDiffusionPipeline(make_sd(), **defaults)
