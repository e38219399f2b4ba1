"""Cross-attention with other texts: the released attention, an explicit softmax, and what must stay as it was."""

import math
import pathlib

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from tiny_pipelines import make_sd

import vision_attn as va
from vision_attn.guidance import AttentionCapture, StructuredEmbeds, text_context, value_context

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/structured.npz")
HEADS, LENGTH, WIDTH = 4, 12, 24


class Denoiser(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attn2 = Attention(32, cross_attention_dim=WIDTH, heads=HEADS, dim_head=8, **options).double()

    def forward(self, x, text, **options):
        return self.attn2(x, encoder_hidden_states=text, **options)


def golden(name, dtype):
    arrays = {key.removeprefix(f"{name}/"): torch.from_numpy(GOLDEN[key]) for key in GOLDEN if key.startswith(name)}
    model = Denoiser()
    model.attn2.load_state_dict({key[2:]: tensor for key, tensor in arrays.items() if key.startswith("w/")})
    return model.to(dtype), [arrays[key].to(dtype) for key in ("x", "uc", "k", "v", "y")]


@torch.no_grad()
def test_the_mean_of_values_is_the_released_attention():
    model, (x, unconditional, keys, values, expected) = golden("one_key_four_values_B2", torch.float64)
    text = torch.cat([unconditional, keys[0]])
    with value_context(model, values.mean(0)):
        output = model(x, text)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    assert not torch.allclose(model(x, text), output)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["conjunction_four_keys_one_value", "equal_three_keys_three_values"])
@torch.no_grad()
def test_several_keys_are_the_released_attention(name, dtype, error):
    model, (x, unconditional, keys, values, expected) = golden(name, dtype)
    with text_context(model, [StructuredEmbeds(keys[:, 0], values[:, 0])]):
        output = model(x, torch.cat([unconditional, torch.full_like(unconditional, torch.nan)]))
    torch.testing.assert_close(output, expected, atol=error, rtol=0)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def texts():
    """Of three images: three keys and one value, one of each, two of each."""
    counts = [(3, 1), (1, 1), (2, 2)]
    return [
        StructuredEmbeds(randn(keys, LENGTH, WIDTH, seed=10 + row), randn(values, LENGTH, WIDTH, seed=20 + row))
        for row, (keys, values) in enumerate(counts)
    ]


def attend(attention, x, text, mask):
    """One image by an explicit softmax: x `[S, C]`, mask `[T]`."""

    def heads(tensor):
        return tensor.unflatten(-1, (HEADS, -1)).transpose(-3, -2)

    query, outputs = heads(attention.to_q(x)), []
    for number, key in enumerate(text.key_embeds):
        value = text.value_embeds[number if len(text.value_embeds) > 1 else 0]
        scores = query @ heads(attention.to_k(key)).mT / math.sqrt(8) + mask
        outputs.append(scores.softmax(-1) @ heads(attention.to_v(value)))
    output = attention.to_out[0]((sum(outputs) / len(outputs)).transpose(0, 1).flatten(1))
    output = output + x if attention.residual_connection else output
    return output / attention.rescale_output_factor


@pytest.mark.parametrize("others", [0, 3], ids=["without guidance", "classifier-free guidance"])
@pytest.mark.parametrize("options", [{}, {"residual_connection": True, "rescale_output_factor": 1.7, "bias": True}])
@torch.no_grad()
def test_each_image_has_an_explicit_softmax_per_key(options, others):
    model, x, text = Denoiser(**options), randn(others + 3, 10, 32), randn(others + 3, LENGTH, WIDTH, seed=1)
    mask = randn(others + 3, 1, LENGTH, seed=2)
    stock = model(x, text, attention_mask=mask)
    with text_context(model, texts()):
        output = model(x, text, attention_mask=mask)
    assert torch.equal(output[:others], stock[:others])
    rows = zip(x[others:], texts(), mask[others:, 0], strict=True)
    torch.testing.assert_close(output[others:], torch.stack([attend(model.attn2, *row) for row in rows]))


def test_its_gradient_is_the_finite_difference_of_an_explicit_softmax():
    model, x, direction = Denoiser(), randn(3, 10, 32).requires_grad_(), randn(3, 10, 32, seed=1)
    weight, none = randn(3, 10, 32, seed=2), torch.zeros(LENGTH, dtype=torch.float64)

    def loss(x):
        rows = [attend(model.attn2, row, text, none) for row, text in zip(x, texts(), strict=True)]
        return (torch.stack(rows) * weight).sum().item()

    with text_context(model, texts()):
        (model(x, randn(3, LENGTH, WIDTH)) * weight).sum().backward()
    step = 1e-5 * direction
    with torch.no_grad():
        expected = (loss(x + step) - loss(x - step)) / 2e-5
    assert (x.grad * direction).sum().item() == pytest.approx(expected, rel=1e-7)


@torch.no_grad()
def test_an_image_prompt_goes_on():
    model = Denoiser()
    model.attn2.set_processor(IPAdapterAttnProcessor2_0(32, WIDTH, num_tokens=(5,), scale=0.7).double())
    x, text, image = randn(6, 10, 32), randn(6, LENGTH, WIDTH, seed=1), randn(6, 1, 5, WIDTH, seed=2)
    with text_context(model, texts()):
        output = model(x, (text, [image]))
    assert torch.equal(output[:3], model(x, (text, [image]))[:3])
    keys, value = texts()[0]
    with value_context(model, value):
        each = [model(x[3:4], (key[None], [image[3:4]])) for key in keys]
    torch.testing.assert_close(output[3:4], sum(each) / 3)


@torch.no_grad()
def test_only_conditional_rows_change_and_patches_and_captures_go_on():
    unet = make_sd().unet
    sample, text = torch.randn(4, 4, 8, 12), torch.randn(4, 24, 16)
    own = [StructuredEmbeds(torch.cat([row[None], torch.randn(count, 24, 16)]), torch.randn(1, 24, 16))
           for row, count in zip(text[2:], (2, 1), strict=True)]  # fmt: skip
    first = {"layers": "down_blocks.0*", "stop": True}
    with AttentionCapture(unet, **first) as capture:
        unet(sample, 1, text)
    stock, maps = unet(sample, 1, text).sample, capture.probabilities
    for context in (value_context(unet, torch.randn(2, 24, 16)), text_context(unet, own)):
        with context:
            output = unet(sample, 1, text).sample
            with AttentionCapture(unet, **first) as capture:
                unet(sample, 1, text)
            with va.patch(unet, va.Neighborhood(3)) as patch:
                unet(sample, 1, text)
        assert torch.equal(output[:2], stock[:2])
        assert not any(torch.equal(*rows) for rows in zip(output[2:], stock[2:], strict=True))
        assert torch.equal(capture.probabilities, maps)
        assert {call.kind for calls in patch.calls.values() for call in calls} == {"operator"}
        assert torch.equal(unet(sample, 1, text).sample, stock)


@torch.no_grad()
def test_an_exception_leaves_nothing_behind():
    model, x, text = Denoiser(), randn(3, 10, 32), randn(3, LENGTH, WIDTH, seed=1)
    stock = model(x, text)
    processor, calls = model.attn2.processor, []

    def failing(attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        calls.append(len(hidden_states))
        if calls == [3, 3]:  # the further keys: two of the first image, one of the last
            raise RuntimeError("out of memory")
        return processor(attention, hidden_states, encoder_hidden_states, attention_mask)

    model.attn2.set_processor(failing)
    with pytest.raises(RuntimeError, match="out of memory"), text_context(model, texts()):
        model(x, text)
    assert torch.equal(model(x, text), stock)
    with text_context(model, texts()):
        expected = model(x, text)
        calls.clear()
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x, text)
        assert torch.equal(model(x, text), expected)


def enter(module, embeds, context=value_context):
    with context(module, embeds):
        if isinstance(module, diffusers.UNet2DConditionModel):
            module(torch.randn(2, 4, 8, 12), 1, torch.randn(2, 24, 16))


def several(*shapes):
    return [StructuredEmbeds(torch.zeros(key), torch.zeros(value)) for key, value in shapes]


def test_text_and_attention_that_do_not_fit():
    unet, one = make_sd().unet, several(((2, 24, 16), (1, 24, 16)))
    for embeds, context in ((torch.zeros(1, 24, 16), value_context), (one, text_context)):
        name = context.__name__
        with pytest.raises(ValueError, match=f"{name}: unet must have cross-attention, got Linear without attn2"):
            enter(torch.nn.Linear(2, 2), embeds, context)
        with pytest.raises(NotImplementedError, match=f"{name}: .* got a norm of the text in 'attn2'"):
            enter(Denoiser(cross_attention_norm="layer_norm"), embeds, context)
    with pytest.raises(
        ValueError, match=r"value_embeds must be the last rows of text of .* \(2, 24, 16\), got \(3, 24"
    ):
        enter(unet, torch.zeros(3, 24, 16))
    with pytest.raises(ValueError, match=r"texts must be the last rows of text of .* \(2, 24, 16\), got \(3, 24, 16\)"):
        enter(unet, 3 * one, text_context)
    unet.fuse_qkv_projections()
    with pytest.raises(NotImplementedError, match=r"got fused projections in 'down_blocks.0"):
        enter(unet, torch.zeros(1, 24, 16))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"be one per image, got \[\]"),
        (several(((1, 24, 16), (3, 24, 16))), r"got keys \(1, 24, 16\) and values \(3, 24, 16\)"),
        (several(((0, 24, 16), (1, 24, 16))), r"got keys \(0, 24, 16\) and values \(1, 24, 16\)"),
        (several(((24, 16), (24, 16))), r"got keys \(24, 16\) and values \(24, 16\)"),
        (several(((1, 24, 16), (1, 24, 16)), ((1, 20, 16), (1, 20, 16))), r"alike in all, got keys \(1, 20, 16\)"),
    ],
)
def test_texts_that_do_not_go_together(texts, message):
    with pytest.raises(ValueError, match=f"text_context: texts must .*{message}"):
        enter(Denoiser(), texts, text_context)
