"""Maps of joint attention against softmax by hand: normed and rotated keys, order of tokens, gradient, leftovers."""

import diffusers
import pytest
import torch
from tiny_models import FLUX, SD3, TEXT

import vision_attn as va
from vision_attn.guidance import AttentionCapture

GRID, TOKENS = (5, 7), [[2], [1, 4]]
DOUBLE = {"num_layers": 2}
SD35 = {"num_layers": 2, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
CASES = {
    "flux-joint": (FLUX, {"num_layers": 2, "num_single_layers": 1}, "transformer_blocks.*", 2),
    "flux-single": (FLUX, {}, "single_transformer_blocks.*", 2),
    "flux-all": (FLUX, {}, None, 3),
    "sd3": (SD3, DOUBLE, None, 2),
    "sd35": (SD3, SD35, None, 2),
}
cases = pytest.mark.parametrize(("tiny", "changes", "layers", "count"), CASES.values(), ids=CASES)
kinds = pytest.mark.parametrize("tiny", [FLUX, SD3], ids=["flux", "sd3"])


def normed(x, norm):
    return x if norm is None else x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def rotated(x, table):
    if table is None:
        return x
    turn = torch.complex(table[0][:, ::2], table[1][:, ::2])[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def by_hand(model, calls, text_first, names):
    """Softmax over all keys, the text's part of it divided by its sum, mean over heads and layers."""
    seen = []

    def hook(module, args, kwargs):
        image, text = kwargs.get("hidden_states", *args[:1]), kwargs.get("encoder_hidden_states")
        q, k = (
            normed(project(image).unflatten(-1, (module.heads, -1)), norm)
            for project, norm in ((module.to_q, module.norm_q), (module.to_k, module.norm_k))
        )
        if text is not None:
            pairs = (module.add_q_proj, module.norm_added_q), (module.add_k_proj, module.norm_added_k)
            added = [normed(project(text).unflatten(-1, (module.heads, -1)), norm) for project, norm in pairs]
            q, k = (torch.cat([own, x] if text_first else [x, own], 1) for own, x in zip(added, (q, k), strict=True))
        q, k = (rotated(x, kwargs.get("image_rotary_emb")) for x in (q, k))
        places = torch.arange(q.shape[1])
        words = places < TEXT if text_first else places >= q.shape[1] - TEXT
        joint = (torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5).softmax(-1)[:, :, ~words][..., words]
        seen.append((joint / joint.sum(-1, keepdim=True)).mean(1))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True) for name in names]
    model(**calls)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).mean(0).unflatten(1, GRID)


@cases
def test_maps_are_softmax_by_hand(tiny, changes, layers, count):
    model, calls = tiny.model(**changes), tiny.inputs(*GRID)
    with torch.no_grad():
        stock = model(**calls).sample
        with AttentionCapture(model, layers=layers, tokens=TOKENS) as capture:
            assert torch.equal(model(**calls).sample, stock)
        expected = by_hand(model, calls, tiny is FLUX, capture.names)
    assert len(capture.names) == count
    assert not any(name.endswith("attn2") for name in capture.names)
    torch.testing.assert_close(capture.probabilities, expected)
    torch.testing.assert_close(capture.probabilities.sum(-1), torch.ones(2, *GRID))
    torch.testing.assert_close(capture.maps[:, 0], expected[..., 2])
    torch.testing.assert_close(capture.maps[:, 1], (expected[..., 1] + expected[..., 4]) / 2)


@kinds
def test_attention_is_shared_among_the_text_that_is_wanted(tiny):
    model, calls = tiny.model(), tiny.inputs(*GRID)
    text = [[1, 2, 4], [3]]
    with torch.no_grad(), AttentionCapture(model, text=text) as some:
        model(**calls)
    torch.testing.assert_close(some.probabilities[1], torch.eye(TEXT)[3].expand(*GRID, TEXT))
    assert not some.probabilities[0][..., [0, 3]].any()
    one = {"num_layers": 1, "num_attention_heads": 1}  # with one head and one layer nothing is averaged
    model = tiny.model(**one, **({"axes_dims_rope": (4, 4, 8)} if tiny is FLUX else {"caption_projection_dim": 8}))
    with torch.no_grad(), AttentionCapture(model, layers="transformer_blocks.*") as every:
        model(**calls)
    with torch.no_grad(), AttentionCapture(model, layers="transformer_blocks.*", text=text) as some:
        model(**calls)
    expected = every.probabilities[0][..., text[0]]
    torch.testing.assert_close(some.probabilities[0][..., text[0]], expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("tiny", "layers", "projection"),
    [
        (FLUX, "transformer_blocks.0.attn", "add_k_proj"),
        (FLUX, "single_transformer_blocks.0.attn", "to_k"),
        (SD3, "transformer_blocks.0.attn", "add_k_proj"),
    ],
)
@pytest.mark.parametrize("token", [0, 3])
def test_a_tokens_key_moves_its_own_column(tiny, layers, projection, token):
    changes = {"num_attention_heads": 1} | ({} if tiny is FLUX else {"caption_projection_dim": 8})
    model, maps = tiny.model(**changes), []
    part = model.get_submodule(layers)
    for shift in (0.0, 1.0):

        def changed(module, args, output, shift=shift):
            output = output.clone()
            output[:, token] += shift * torch.arange(output.shape[-1])
            return output

        handle = part.get_submodule(projection).register_forward_hook(changed)
        with torch.no_grad(), AttentionCapture(model, layers=layers) as capture:
            model(**tiny.inputs(*GRID))
        handle.remove()
        maps.append(capture.probabilities)
    others = [number for number in range(TEXT) if number != token]
    assert (maps[0][..., token] - maps[1][..., token]).abs().amin() > 1e-6
    before, after = (each[..., others] / each[..., others].sum(-1, keepdim=True) for each in maps)
    torch.testing.assert_close(after, before)


@kinds
def test_rows_and_columns(tiny):
    """A pixel whose query is changed changes the map there and nowhere else."""
    model = tiny.model()
    calls, row, column = tiny.inputs(*GRID), 3, 5

    def changed(module, args, output):
        output = output.clone()
        output[:, row * GRID[1] + column] += 1
        return output

    maps = []
    for watched in (False, True):
        handle = model.transformer_blocks[0].attn.to_q.register_forward_hook(changed) if watched else None
        with torch.no_grad(), AttentionCapture(model, layers="transformer_blocks.0.*") as capture:
            model(**calls)
        maps.append(capture.probabilities)
        if handle is not None:
            handle.remove()
    different = (maps[0] - maps[1]).abs().amax((0, 3)) > 0
    assert different.nonzero().tolist() == [[row, column]]


def loss_and_gradient(model, calls, **options):
    hidden = calls["hidden_states"].clone().requires_grad_()
    with AttentionCapture(model, tokens=TOKENS, **options) as capture:
        result = model(**{**calls, "hidden_states": hidden})
        assert (result is None) == options.get("stop", False)
        loss = (capture.maps.square() * torch.arange(35.0).view(GRID)).sum()
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("text", [None, [[1, 2, 4], [0, 1, 2, 3, 4]]])
@cases
def test_the_gradient_is_the_difference_quotient(tiny, changes, layers, count, text):
    model = tiny.model(**changes).double()
    calls = {name: x.double() if torch.is_tensor(x) else x for name, x in tiny.inputs(*GRID).items()}
    options = {"layers": layers, "text": text, "stop": True}
    _, gradient = loss_and_gradient(model, calls, **options)
    direction = 10 * gradient / gradient.norm()
    ahead, behind = (
        loss_and_gradient(model, {**calls, "hidden_states": calls["hidden_states"] + step * direction}, **options)[0]
        for step in (1e-3, -1e-3)  # upstream norms and rotates in float32
    )
    assert gradient.abs().amax() > 1e-6
    assert float((gradient * direction).sum()) == pytest.approx(float((ahead - behind) / 2e-3), rel=1e-3)


@cases
def test_a_stopped_forward_has_the_same_gradient(tiny, changes, layers, count):
    model, calls = tiny.model(**changes), tiny.inputs(*GRID)
    first = loss_and_gradient(model, calls, layers=layers, stop=True)
    for options in ({"stop": False}, {"stop": True}):
        again = loss_and_gradient(model, calls, layers=layers, **options)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    model.enable_gradient_checkpointing()
    model.train()
    torch.testing.assert_close(loss_and_gradient(model, calls, layers=layers, stop=True), first)


def test_a_forward_stops_after_the_last_wanted_layer():
    model, ran = FLUX.model(num_layers=3), []
    for number, block in enumerate(model.transformer_blocks):
        block.attn.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad(), AttentionCapture(model, layers="transformer_blocks.[01].*", stop=True):
        assert model(**FLUX.inputs(*GRID)) is None
    assert ran == [0]  # attention of the second block begins and does not end


@kinds
def test_patched_layers_keep_their_operator(tiny):
    model, calls = tiny.model(), tiny.inputs(*GRID)
    operator = va.Clear(radius=2)
    with torch.no_grad(), va.patch(model, operator, layers="transformer_blocks.0.*"):
        alone = model(**calls).sample
        with AttentionCapture(model) as capture:
            assert torch.equal(model(**calls).sample, alone)
        first = by_hand(model, calls, tiny is FLUX, ["transformer_blocks.0.attn"])
        with AttentionCapture(model, layers="transformer_blocks.0.*") as outer, AttentionCapture(model) as inner:
            model(**calls)
        torch.testing.assert_close(outer.probabilities, first)
        assert torch.equal(inner.probabilities, capture.probabilities)
        assert torch.equal(model(**calls).sample, alone)


@kinds
def test_nothing_is_left_behind(tiny):
    model = tiny.model()
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    capture = AttentionCapture(model, stop=True)
    for calls in ({}, {"encoder_hidden_states": torch.zeros(2, TEXT, 3)}):
        with pytest.raises((RuntimeError, ZeroDivisionError)), capture:
            _ = model(**{**tiny.inputs(*GRID), **calls}), 1 / 0
    after = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert all(one is other for one, other in zip(processors, after, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "*.attn3"}, r"layers must name joint attention, got '\*.attn3': there are 'transformer_blocks.0"),
        ({"resolution": (4, 4)}, r"resolution must be one of \[\(5, 7\)\] for this sample, got \(4, 4\)"),
        ({"tokens": [[5]]}, r"tokens must hold positions from 0 to 4, got \[5\]"),
        ({"text": [[0], [5]]}, r"text must hold positions from 0 to 4, got \[5\]"),
        ({"text": [[0], []]}, r"text must hold positions from 0 to 4, got \[\]"),
        ({"text": [[0, 1]]}, "text must be one list per sample, 2, got 1"),
    ],
)
@kinds
def test_mistakes(tiny, arguments, message):
    def maps():
        model = tiny.model()
        with torch.no_grad(), AttentionCapture(model, **arguments) as capture:
            model(**tiny.inputs(*GRID))
        return capture.maps

    with pytest.raises(ValueError, match=f"AttentionCapture: {message}"):
        maps()


def test_other_mistakes():
    model, calls = FLUX.model(), FLUX.inputs(*GRID)
    with torch.no_grad(), AttentionCapture(model):
        with pytest.raises(ValueError, match="img_ids must be those of one image in row-major order, got others"):
            model(**{**calls, "img_ids": calls["img_ids"].flip(0)})
        mask = torch.zeros(2, 1, 1, TEXT + 35)
        with pytest.raises(ValueError, match=r"attn_mask of 'transformer_blocks.0.attn' must be None"):
            model(**calls, joint_attention_kwargs={"attention_mask": mask})
    with pytest.raises(ValueError, match=r"layers must name cross-attention, got None: there are none"):
        AttentionCapture(diffusers.WanTransformer3DModel(num_layers=0))
