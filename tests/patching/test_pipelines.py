"""Whole pipelines with random tiny components: FLUX, Stable Diffusion 1.5, and Wan with two denoisers."""

import copy
import dataclasses
import json
import string

import diffusers
import pytest
import torch
from probe_operators import Disc
from tiny_models import FLUX, UNET, WAN
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

import vision_attn as va

LOCAL = Disc(2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CLIPTokenizer:
    """A CLIP tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = list(string.ascii_lowercase)
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


@pytest.fixture(scope="module")
def t5_tokenizer() -> T5TokenizerFast:
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    letters += [(letter, -2.0) for letter in string.ascii_lowercase]
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    return T5TokenizerFast(
        tokenizer_object=Tokenizer(Unigram(letters, unk_id=2)), extra_ids=0, model_max_length=8, unk_token="<unk>"
    )


def clip(width: int) -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return CLIPTextModel(config).eval()


def t5(width: int) -> T5EncoderModel:
    torch.manual_seed(2)
    return T5EncoderModel(T5Config(vocab_size=30, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


@pytest.fixture
def flux_pipe(tokenizer, t5_tokenizer) -> diffusers.FluxPipeline:
    torch.manual_seed(3)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            latent_channels=1,
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        text_encoder=clip(32),
        tokenizer=tokenizer,
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer,
        transformer=FLUX.model(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sd_pipe(tokenizer) -> diffusers.StableDiffusionPipeline:
    torch.manual_seed(3)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            latent_channels=4,
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        text_encoder=clip(16),
        tokenizer=tokenizer,
        unet=UNET.model(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps: int = 3, **changes) -> torch.Tensor:
    options = {
        "prompt": "a cat",
        "height": 24,
        "width": 40,
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(5),
    }
    if isinstance(pipe, diffusers.FluxPipeline):
        options["max_sequence_length"] = 8
    return pipe(**{**options, **changes}).images


def kinds(patch: va.Patch) -> set[str]:
    return {call.kind for calls in patch.calls.values() for call in calls}


@pytest.mark.parametrize("name", ["flux_pipe", "sd_pipe"])
def test_pipelines_are_patched_and_restored(name, request):
    pipe = request.getfixturevalue(name)
    dense = draw(pipe)
    with va.patch(pipe, va.Dense()):
        assert torch.equal(draw(pipe), dense)
    with va.patch(pipe, LOCAL) as patch:
        local = draw(pipe)
        assert kinds(patch) == {"operator"}
        assert draw(pipe, height=16).shape != local.shape
    assert not torch.allclose(local, dense, atol=1e-3)
    assert torch.equal(draw(pipe), dense)
    with va.patch(pipe, va.Clear(radius=2)):
        torch.testing.assert_close(draw(pipe), local, atol=1e-4, rtol=1e-4)
    va.patch(pipe, LOCAL)
    va.unpatch(pipe)
    assert torch.equal(draw(pipe), dense)


def test_layer_names_of_a_pipeline_with_one_denoiser_are_the_models(flux_pipe):
    with va.patch(flux_pipe, LOCAL, layers="transformer_blocks.*") as patch:
        assert [layer.name for layer in patch.routed] == ["transformer_blocks.0.attn"]


def test_true_guidance_calls_the_model_twice_per_step(flux_pipe):
    guided = {"true_cfg_scale": 2.0, "negative_prompt": "dog"}
    dense = draw(flux_pipe, steps=2, **guided)
    with va.patch(flux_pipe, LOCAL, steps={7}) as patch:
        assert torch.equal(draw(flux_pipe, steps=2, **guided), dense)
        assert kinds(patch) == {"dense"}
        reasons = [call.reason for call in patch.calls["transformer_blocks.0.attn"]]
        assert reasons == ["denoising step 0 is not in steps", "denoising step 1 is not in steps"]


@pytest.mark.parametrize("name", ["flux_pipe", "sd_pipe"])
def test_steps_count_from_the_start_of_each_run(name, request):
    pipe = request.getfixturevalue(name)
    whole = {}
    for steps in ({0}, {0, 1, 2}, {3}):
        with va.patch(pipe, LOCAL, steps=steps) as patch:
            whole[frozenset(steps)] = draw(pipe)
            assert torch.equal(draw(pipe), whole[frozenset(steps)])  # the second run starts at 0 again
            seen = {call.reason for calls in patch.calls.values() for call in calls if call.kind == "dense"}
            assert seen == {f"denoising step {step} is not in steps" for step in {0, 1, 2} - steps}
    assert torch.equal(whole[frozenset({3})], draw(pipe))
    with va.patch(pipe, LOCAL):
        assert torch.equal(whole[frozenset({0, 1, 2})], draw(pipe))
    assert not torch.equal(whole[frozenset({0})], whole[frozenset({0, 1, 2})])


def test_one_step_runs_in_a_row(flux_pipe):
    """Runs of one step have the same timestep each: only the scheduler tells them apart."""
    with va.patch(flux_pipe, LOCAL, steps={0}):
        first = draw(flux_pipe, steps=1)
        assert torch.equal(draw(flux_pipe, steps=1), first)
    assert not torch.equal(draw(flux_pipe, steps=1), first)


def test_a_copied_pipeline_has_its_own_steps(flux_pipe):
    patch = va.patch(flux_pipe, LOCAL, steps={1})
    expected = draw(flux_pipe)
    twin = copy.deepcopy(flux_pipe)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(draw(twin), expected)
    patch.remove()
    assert torch.equal(draw(twin), expected)
    dense = draw(flux_pipe)
    va.unpatch(twin)
    assert torch.equal(draw(twin), dense)


@pytest.mark.slow
@pytest.mark.parametrize("patch_first", [True, False])
def test_a_compiled_transformer_in_a_pipeline(flux_pipe, patch_first):
    torch._dynamo.reset()
    with va.patch(flux_pipe, LOCAL, steps={1, 2}):
        expected = draw(flux_pipe)
    stock = flux_pipe.transformer
    if patch_first:
        va.patch(flux_pipe, LOCAL, steps={1, 2})
    flux_pipe.transformer = torch.compile(stock, fullgraph=True, dynamic=False, backend="eager")
    if not patch_first:
        va.patch(flux_pipe, LOCAL, steps={1, 2})
    torch.testing.assert_close(draw(flux_pipe), expected, atol=1e-5, rtol=1e-5)
    va.unpatch(flux_pipe)
    assert not stock._forward_pre_hooks
    assert not flux_pipe.transformer._forward_pre_hooks


def test_saved_pipelines_are_stock(flux_pipe, tmp_path):
    dense = draw(flux_pipe)
    with va.patch(flux_pipe, LOCAL):
        flux_pipe.transformer.save_pretrained(tmp_path)
    flux_pipe.transformer = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(draw(flux_pipe), dense, atol=1e-5, rtol=1e-5)


def test_model_offload_of_a_pipeline(flux_pipe):
    with va.patch(flux_pipe, LOCAL):
        expected = draw(flux_pipe)
    flux_pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with va.patch(flux_pipe, LOCAL) as patch:
        assert torch.equal(draw(flux_pipe), expected)
        assert kinds(patch) == {"operator"}


@pytest.mark.parametrize("name", ["flux_pipe", "sd_pipe"])
def test_verify(name, request):
    report = va.verify(request.getfixturevalue(name), inputs={"height": 24, "width": 40, "num_inference_steps": 1})
    assert report.passed
    assert len(report.checks) == 9


def test_two_denoisers_share_one_count_of_steps():
    """Wan 2.2 hands over from one model to the other in the middle of a run."""
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=WAN.model(),
        transformer_2=WAN.model(),
        boundary_ratio=0.7,
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = FLUX.inputs(1, 1)["encoder_hidden_states"][:1, :, :16]

    def run():
        options = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "output_type": "latent"}
        sizes = {"height": 64, "width": 80, "num_frames": 9, "num_inference_steps": 6}
        return pipe(**options, **sizes, generator=torch.Generator().manual_seed(5)).frames

    dense = run()
    with va.patch(pipe, LOCAL, steps=range(1, 4)) as patch:
        assert {layer.name.split(".")[0] for layer in patch.routed} == {"transformer", "transformer_2"}
        output = run()
        calls = patch.calls
        assert calls.keys() == {layer.name for layer in patch.routed}
        first, second = (calls[f"{name}.blocks.0.attn1"] for name in ("transformer", "transformer_2"))
        assert [call.reason or call.kind for call in first] == ["denoising step 0 is not in steps", "operator"]
        assert [call.reason or call.kind for call in second] == [
            "operator",
            "denoising step 4 is not in steps",
            "denoising step 5 is not in steps",
        ]
    assert not torch.equal(output, dense)
    with va.patch(pipe, LOCAL, layers="transformer_2.*", steps={1}) as patch:
        run()
        assert kinds(patch) == {"dense"}  # the second step belongs to the first model
        assert {layer.reason for layer in patch.skipped if layer.name.endswith("attn1")} == {"not selected by layers"}
    with va.patch(pipe, layers={"transformer.*": LOCAL, "transformer_2.blocks.1.*": va.Dense()}) as patch:
        assert len(patch.routed) == 3
    with va.patch(pipe, LOCAL, layers="blocks.0.attn1") as patch:
        assert [layer.name for layer in patch.routed] == ["transformer.blocks.0.attn1", "transformer_2.blocks.0.attn1"]
    assert torch.equal(run(), dense)


def test_a_pipeline_without_denoiser():
    class Nothing:
        def __init__(self):
            self.components = {"vae": torch.nn.Linear(1, 1)}

    with pytest.raises(va.PatchError, match="target must have a transformer or unet, got Nothing with vae"):
        va.patch(Nothing(), LOCAL)


class Parts:
    def __init__(self, **components):
        self.components = components


def flux_controlnet() -> torch.nn.Module:
    torch.manual_seed(4)
    return diffusers.FluxControlNetModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


class Strange(torch.nn.Module):
    pass


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_models_that_a_patch_does_not_reach_are_listed():
    controlnet = flux_controlnet()
    pipe = Parts(transformer=FLUX.model(), vae=Strange(), controlnet=controlnet, transformer_2=Strange())
    with va.patch(pipe, LOCAL) as patch:
        assert len(patch.routed) == 3
        assert [(part.name, part.reason) for part in patch.skipped] == [
            ("controlnet", "FluxControlNetModel is not patched with the pipeline: patch it by itself"),
            ("transformer_2", "Strange is not patched with the pipeline: patch it by itself"),
        ]
        assert "controlnet" in str(patch)
    va.patch(controlnet, LOCAL)
    va.unpatch(pipe)
    assert not controlnet._forward_pre_hooks


def test_one_model_under_two_names_is_patched_once():
    model = WAN.model()
    dense = WAN.run(model)
    patch = va.patch(Parts(transformer=model, transformer_2=model), LOCAL)
    assert [layer.name for layer in patch.routed] == ["blocks.0.attn1", "blocks.1.attn1"]
    local = WAN.run(model)
    patch.remove()
    with va.patch(model, LOCAL):
        assert torch.equal(WAN.run(model), local)
    assert torch.equal(WAN.run(model), dense)


@dataclasses.dataclass(frozen=True)
class Counting:
    calls: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, query, key, value, layout, scale=None):
        self.calls.append(1)
        return LOCAL(query, key, value, layout, scale)


def test_steps_in_half_precision(flux_pipe):
    """Timesteps are rounded to the latents' dtype before the model gets them."""
    flux_pipe.to(torch.bfloat16)
    flux_pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7)
    counting = Counting()
    with va.patch(flux_pipe, counting, steps=range(25, 50), layers="transformer_blocks.*"):
        draw(flux_pipe, steps=50, height=8, width=8)
    assert len(counting.calls) == 25
