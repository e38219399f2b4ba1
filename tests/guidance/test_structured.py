"""Structured Diffusion Guidance: values of the released code, what changes nothing, and what must be refused."""

import pathlib

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_pipelines import make_sd, make_sdxl

import vision_attn as va
from vision_attn.guidance import structured_embeddings, token_groups, value_context

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/structured.npz")
PROMPT = "a red circle and a blue square"


class Denoiser(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn2 = Attention(32, cross_attention_dim=24, heads=4, dim_head=8, **options).double()

    def forward(self, x, text):
        return self.attn2(x, encoder_hidden_states=text)


@torch.no_grad()
def test_the_mean_of_values_is_the_released_attention():
    prefix = "one_key_four_values_B2/"
    case = {
        name.removeprefix(prefix): torch.from_numpy(array) for name, array in GOLDEN.items() if name.startswith(prefix)
    }
    weights = {name.removeprefix("w/"): array for name, array in case.items() if name.startswith("w/")}
    model = Denoiser()
    model.attn2.load_state_dict(weights)
    text = torch.cat([case["uc"], case["k"][0]])
    with value_context(model, case["v"].mean(0)):
        output = model(case["x"], text)
    torch.testing.assert_close(output, case["y"], atol=1e-10, rtol=0)
    assert not torch.allclose(model(case["x"], text), output)


@pytest.fixture
def sd():
    return make_sd()


@pytest.fixture(params=[make_sd, make_sdxl], ids=["sd", "sdxl"])
def pipe(request):
    return request.param()


def draw(pipe, **options):
    defaults = {"prompt": PROMPT, "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(**{**defaults, **options}, generator=torch.Generator().manual_seed(0)).images


def test_values_of_each_mode(pipe):
    key, value = structured_embeddings(pipe, PROMPT)

    def encode(text):
        return pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]

    whole, square = encode(PROMPT), encode("a blue square")
    (group,) = token_groups(pipe.tokenizer, PROMPT, ["a blue square"])
    assert torch.equal(key, whole)
    others = [place for place in range(24) if place not in group]
    torch.testing.assert_close(value[:, others], whole[:, others])
    # Of three sequences one has the square alone; the first phrase is the prompt's own beginning.
    torch.testing.assert_close(value[:, group], (2 * whole[:, group] + square[:, 1:4]) / 3)
    for mode in ("covering", "replace"):
        value = structured_embeddings(pipe, PROMPT, mode=mode).value_embeds
        torch.testing.assert_close(value[:, group], square[:, 1:4])
        torch.testing.assert_close(value[:, others], whole[:, others])
        half = structured_embeddings(pipe, PROMPT, mode=mode, strength=0.5).value_embeds
        torch.testing.assert_close(half, (value + whole) / 2)


def test_nested_phrases(sd):
    nested = ["a red circle and a blue square", "a blue square", "blue square"]
    (group,) = token_groups(sd.tokenizer, PROMPT, ["blue square"])
    alone = [sd.encode_prompt(text, "cpu", 1, False)[0] for text in nested]
    places = [slice(group[0], group[-1] + 1), slice(2, 4), slice(1, 3)]
    own = [embeds[:, place] for embeds, place in zip(alone, places, strict=True)]
    covering = structured_embeddings(sd, PROMPT, nested, mode="covering").value_embeds
    torch.testing.assert_close(covering[:, group], torch.stack(own).mean(0))
    replace = structured_embeddings(sd, PROMPT, nested, mode="replace").value_embeds
    torch.testing.assert_close(replace[:, group], own[2])


@torch.no_grad()
def test_what_changes_nothing_is_bit_identical(pipe):
    stock = draw(pipe)
    key, value = structured_embeddings(pipe, PROMPT)
    for same in (key, structured_embeddings(pipe, PROMPT, strength=0).value_embeds):
        with value_context(pipe.unet, same):
            assert torch.equal(draw(pipe), stock)
    with value_context(pipe.unet, value):
        assert not torch.equal(draw(pipe), stock)
    assert torch.equal(draw(pipe), stock)
    first = structured_embeddings(pipe, PROMPT, ["a red circle"], mode="replace")
    torch.testing.assert_close(first.value_embeds, first.key_embeds, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_conditional_rows_change_and_patches_go_on(sd):
    value = structured_embeddings(sd, PROMPT, mode="replace").value_embeds
    seen = []
    sample, text = torch.randn(2, 4, 8, 12), torch.randn(2, 24, 16)
    stock = sd.unet(sample, 1, text).sample
    with value_context(sd.unet, value), va.patch(sd.unet, va.Neighborhood(3)) as patch:
        sd.unet(sample, 1, text)
        assert {call.kind for calls in patch.calls.values() for call in calls} == {"operator"}
    with value_context(sd.unet, value):
        seen = sd.unet(sample, 1, text).sample
    assert torch.equal(seen[0], stock[0])
    assert not torch.equal(seen[1], stock[1])


def test_without_phrases_of_several_words_nothing_is_mixed(sd):
    key, value = structured_embeddings(sd, "circle and star")
    assert value is key


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "mean"}, ValueError, "mode must be one of paper, covering, replace, got 'mean'"),
        ({"strength": 2}, ValueError, "strength must be from 0 to 1, got 2"),
        ({"strength": True}, TypeError, "strength must be a number, got True"),
        ({"phrases": ["a green star"]}, ValueError, r"phrases must be in the prompt .* got 'a green star'"),
    ],
)
def test_mistakes(sd, arguments, error, message):
    with pytest.raises(error, match=message):
        structured_embeddings(sd, PROMPT, **arguments)


def test_phrases_beyond_what_the_encoder_reads(sd):
    long = "a red circle and " * 6 + "a blue star"
    with pytest.warns(UserWarning, match=r"beyond the 23 tokens .* left out: \['a red circle', 'a blue star'\]"):
        structured_embeddings(sd, long)
    with pytest.raises(ValueError, match="within the 23 tokens"):
        structured_embeddings(sd, long, ["a blue star"])


def test_phrases_that_end_within_a_word(sd):
    with pytest.raises(ValueError, match=r"phrases must be of whole tokens, got 'a blu', which alone is"):
        structured_embeddings(sd, PROMPT, [(17, 22)])


def test_textual_inversion_of_several_vectors(sd, monkeypatch):
    monkeypatch.setattr(sd, "maybe_convert_prompt", lambda prompt, tokenizer: prompt + " circle_1", raising=False)
    with pytest.raises(NotImplementedError, match="prompt must hold no textual inversion of several vectors"):
        structured_embeddings(sd, PROMPT)


def test_other_pipelines_are_refused():
    message = r"a Stable Diffusion pipeline with a UNet, got Tensor: .*\(FLUX, SD3"
    with pytest.raises(NotImplementedError, match=message):
        structured_embeddings(torch.zeros(1), PROMPT)


def enter(module, value):
    with value_context(module, value):
        if isinstance(module, diffusers.UNet2DConditionModel):
            module(torch.randn(2, 4, 8, 12), 1, torch.randn(2, 24, 16))


def test_text_and_attention_that_do_not_fit(sd):
    with pytest.raises(ValueError, match="unet must have cross-attention, got Linear without attn2"):
        enter(torch.nn.Linear(2, 2), torch.zeros(1, 24, 16))
    with pytest.raises(ValueError, match=r"last rows of text of shape \(2, 24, 16\), got \(3, 24, 16\)"):
        enter(sd.unet, torch.zeros(3, 24, 16))
    with pytest.raises(NotImplementedError, match="got a norm of the text in 'attn2'"):
        enter(Denoiser(cross_attention_norm="layer_norm"), torch.zeros(1, 24, 16))
    sd.unet.fuse_qkv_projections()
    with pytest.raises(NotImplementedError, match=r"got fused projections in 'down_blocks.0"):
        enter(sd.unet, torch.zeros(1, 24, 16))
