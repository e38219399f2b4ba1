"""Every kind of attention call that processors make: to the operator with all its arguments, or dense and listed."""

import dataclasses

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_dispatch import dispatch_attention_fn as attend
from probe_operators import Disc, Fussy, Maskless, Whole, disc_mask
from tiny_models import randn
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

import vision_attn as va

GRID = (3, 5)
LAYOUT = va.TokenLayout(GRID, text_before=4, text_after=2)


class DispatchProcessor:
    _parallel_config = None

    def __call__(self, attn, query, key, value, *args, **options):
        return dispatch_attention_fn(query, key, value, *args, **options)


class SdpaProcessor:
    def __call__(self, attn, query, key, value, *args, **options):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, *args, **options).transpose(1, 2)


class LongNameProcessor:
    def __call__(self, attn, query, key, value, *args, **options):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, *args, **options).transpose(1, 2)


class ImportedNameProcessor:
    def __call__(self, attn, query, key, value, *args, **options):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return scaled_dot_product_attention(query, key, value, *args, **options).transpose(1, 2)


class HandmadeProcessor:
    def __call__(self, attn, query, key, value):
        return torch.einsum("bqhd,bkhd->bhqk", query, key).softmax(-1) @ value.transpose(1, 2)


PROCESSORS = (DispatchProcessor, SdpaProcessor, LongNameProcessor, ImportedNameProcessor)


class Attention(nn.Module):
    def __init__(self, processor):
        super().__init__()
        self.processor = processor

    def forward(self, *args, **options):
        return self.processor(self, *args, **options)


class Toy(nn.Module):
    def __init__(self, processor):
        super().__init__()
        self.attn = Attention(processor)

    def forward(self, *args, **options):
        return self.attn(*args, **options)


def tensors(queries: int = LAYOUT.tokens, keys: int = LAYOUT.tokens, key_heads: int = 4, width: int = 8):
    return randn(2, queries, 4, 8), randn(2, keys, key_heads, 8, seed=1), randn(2, keys, key_heads, width, seed=2)


def oracle(query, key, value, mask, scale=None):
    """Masked softmax in float64; `mask` is bool or a bias."""
    groups = query.shape[2] // key.shape[2]
    q, k, v = query.double(), key.double().repeat_interleave(groups, 2), value.double().repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).float()


def call(model, op, *args, layout=LAYOUT, strict=True, **options):
    with va.patch(model, op, grid=layout, strict=strict) as patch, torch.no_grad():
        return model(*args, **options), patch.calls["attn"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("op", [Disc(2), va.Clear(radius=2)], ids=str)
def test_plain_call(processor, op):
    q, k, v = tensors(width=6)
    output, calls = call(Toy(processor()), op, q, k, v)
    close(output, oracle(q, k, v, disc_mask(LAYOUT, 2)))
    assert [(c.kind, c.reason, c.layout) for c in calls] == [("operator", "", LAYOUT)]


@pytest.mark.parametrize("processor", PROCESSORS[:2])
@pytest.mark.parametrize("scale", [0.3, 0.0, 1.0])
def test_scale_is_honoured(processor, scale):
    q, k, v = tensors()
    output, _ = call(Toy(processor()), Disc(2), q, k, v, scale=scale)
    close(output, oracle(q, k, v, disc_mask(LAYOUT, 2), scale))


@pytest.mark.parametrize("processor", PROCESSORS[:2])
def test_grouped_queries(processor):
    q, k, v = tensors(key_heads=2)
    output, calls = call(Toy(processor()), Disc(2), q, k, v, enable_gqa=True)
    close(output, oracle(q, k, v, disc_mask(LAYOUT, 2)))
    assert calls[0].kind == "operator"


@pytest.mark.parametrize("processor", PROCESSORS[:2])
@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("op", [Disc(2), va.Clear(radius=2)], ids=str)
def test_key_padding_masks(processor, kind, positional, op):
    q, k, v = tensors()
    seen = torch.ones(2, 1, 1, LAYOUT.tokens, dtype=torch.bool)
    seen[1, ..., 2:4] = False
    seen[0, ..., -1] = False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -1e4)
    args, options = ((mask,), {}) if positional else ((), {"attn_mask": mask})
    output, calls = call(Toy(processor()), op, q, k, v, *args, **options)
    close(output, oracle(q, k, v, disc_mask(LAYOUT, 2) & seen))
    assert [c.kind for c in calls] == ["operator"]


def test_two_dimensional_masks_of_dispatch_are_per_sample():
    q, k, v = tensors()
    seen = torch.ones(2, LAYOUT.tokens, dtype=torch.bool)
    seen[1, 2:4] = False
    output, _ = call(Toy(DispatchProcessor()), Disc(2), q, k, v, attn_mask=seen)
    close(output, oracle(q, k, v, disc_mask(LAYOUT, 2) & seen[:, None, None]))


def test_two_dimensional_masks_of_sdpa_are_per_query():
    q, k, v = tensors()
    mask = torch.ones(LAYOUT.tokens, LAYOUT.tokens, dtype=torch.bool).tril_(3)
    output, _ = call(Toy(SdpaProcessor()), Disc(2), q, k, v, attn_mask=mask)
    close(output, oracle(q, k, v, disc_mask(LAYOUT, 2) & mask))


@pytest.mark.parametrize(
    "layout", [LAYOUT, va.TokenLayout(GRID, text_before=3), va.TokenLayout(GRID, text_after=3)], ids=str
)
@pytest.mark.parametrize("op", [Disc(2), va.Clear(radius=2)], ids=str)
def test_image_queries_with_more_keys(layout, op):
    """Queries of the image alone, keys of text and image."""
    q, k, v = tensors(layout.image_tokens, layout.tokens, width=6)
    seen = torch.ones(2, 1, 1, layout.tokens, dtype=torch.bool)
    seen[1, ..., 0] = False
    mask = disc_mask(layout, 2)[layout.image_slice]
    output, calls = call(Toy(DispatchProcessor()), op, q, k, v, layout=layout)
    close(output, oracle(q, k, v, mask))
    output, _ = call(Toy(DispatchProcessor()), op, q, k, v, layout=layout, attn_mask=seen)
    close(output, oracle(q, k, v, mask & seen))
    assert [(c.kind, c.layout) for c in calls] == [("operator", layout)]


def test_masks_with_image_rows_only():
    q, k, v = tensors(LAYOUT.image_tokens)
    rows = torch.ones(2, 1, LAYOUT.image_tokens, LAYOUT.tokens, dtype=torch.bool)
    rows[1, 0, 3, :9] = False
    output, _ = call(Toy(SdpaProcessor()), Disc(2), q, k, v, attn_mask=rows)
    close(output, oracle(q, k, v, disc_mask(LAYOUT, 2)[LAYOUT.image_slice] & rows))


@pytest.mark.parametrize("processor", PROCESSORS[:2])
def test_cross_attention_stays_dense_and_is_listed(processor):
    q, k, v = tensors(LAYOUT.image_tokens, 9)
    model = Toy(processor())
    model.second = Attention(processor())
    whole = tensors()
    model.forward = lambda *args: (model.second(*whole), model.attn(*args))[1]
    with va.patch(model, Disc(2), grid=LAYOUT) as patch, torch.no_grad():
        output = model(q, k, v)
    close(output, oracle(q, k, v, torch.ones(15, 9, dtype=torch.bool)))
    (listed,) = patch.calls["attn"]
    assert (listed.kind, listed.layout) == ("dense", None)
    assert "got 15 query and 9 key tokens where the layout has 21 (4 before, grid (3, 5), 2 after)" in listed.reason


REFUSED = {
    "causal": ({"is_causal": True}, "is_causal=True"),
    "dropout": ({"dropout_p": 0.5}, "dropout_p=0.5"),
}


@pytest.mark.parametrize("processor", PROCESSORS[:2])
@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_no_operator_honours(processor, case):
    options, reason = REFUSED[case]
    q, k, v = tensors()
    model = Toy(processor())
    with pytest.raises(va.PatchError, match=rf"clear\(radius=2\) cannot honour the call of 'attn': {reason}"):
        call(model, va.Clear(radius=2), q, k, v, **options)
    torch.manual_seed(7)
    output, calls = call(model, va.Clear(radius=2), q, k, v, strict=False, **options)
    torch.manual_seed(7)
    assert torch.equal(output, model(q, k, v, **options))
    assert [(c.kind, c.reason, c.layout) for c in calls] == [("dense", reason, LAYOUT)]


def test_unknown_arguments_are_not_dropped():
    q, k, v = tensors()
    model = Toy(DispatchProcessor())
    with pytest.raises(va.PatchError, match="argument 'attention_kwargs' is not known to operators"):
        call(model, Disc(2), q, k, v, attention_kwargs={"return_lse": False})
    output, calls = call(model, Disc(2), q, k, v, attention_kwargs={"return_lse": False}, strict=False)
    close(output, oracle(q, k, v, torch.ones(21, 21, dtype=torch.bool)))
    assert calls[0].kind == "dense"


def test_masks_that_an_operator_refuses():
    q, k, v = tensors()
    mask = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    mask[0, ..., 0] = False
    dense = oracle(q, k, v, mask)
    for op, reason in (
        (Fussy(), "attn_mask must be None"),
        (Maskless(), "attn_mask of shape (2, 1, 1, 21), and the operator takes none"),
    ):
        with pytest.raises(va.PatchError, match=r"cannot honour the call of 'attn': .*attn_mask"):
            call(Toy(SdpaProcessor()), op, q, k, v, attn_mask=mask)
        output, calls = call(Toy(SdpaProcessor()), op, q, k, v, attn_mask=mask, strict=False)
        close(output, dense)
        assert calls[0].kind == "dense"
        assert reason in calls[0].reason


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 1, 1, 21, dtype=torch.bool), torch.zeros(2, 1, 21, 21)], ids=["bool", "bias"]
)
def test_masks_that_hide_nothing_need_no_support(mask):
    q, k, v = tensors()
    output, calls = call(Toy(SdpaProcessor()), Maskless(2), q, k, v, attn_mask=mask)
    close(output, oracle(q, k, v, disc_mask(LAYOUT, 2)))
    assert calls[0].kind == "operator"


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_block_masks_are_listed_or_refused():
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = tensors()
    mask = create_block_mask(lambda b, h, i, j: j <= i + 3, None, None, 21, 21, device="cpu")
    model = Toy(DispatchProcessor())
    with pytest.raises(va.PatchError, match="cannot honour the call of 'attn': attn_mask of type BlockMask"):
        call(model, Disc(2), q, k, v, attn_mask=mask, backend="flex")
    output, calls = call(model, Disc(2), q, k, v, attn_mask=mask, backend="flex", strict=False)
    close(output, oracle(q, k, v, torch.ones(21, 21, dtype=torch.bool).tril_(3)))
    assert (calls[0].kind, calls[0].reason) == ("dense", "attn_mask of type BlockMask")


def test_self_attention_of_another_length_is_an_error_after_the_forward():
    q, k, v = tensors(19, 19)
    with pytest.raises(
        va.PatchError, match="'attn' must be called with the tokens of its layout, got 19 query and 19 key"
    ):
        call(Toy(SdpaProcessor()), Disc(2), q, k, v)
    output, calls = call(Toy(SdpaProcessor()), Disc(2), q, k, v, strict=False)
    close(output, oracle(q, k, v, torch.ones(19, 19, dtype=torch.bool)))
    assert calls[0].kind == "dense"


def test_a_forward_without_operator_call_is_an_error():
    q, k, v = tensors(15, 9)
    with pytest.raises(
        va.PatchError, match="a forward must have at least one operator call, got none in 1 layers; 'attn'"
    ):
        call(Toy(SdpaProcessor()), Disc(2), q, k, v)


class ThreeDimensionalProcessor:
    def __call__(self, attn, query, key, value):
        return F.scaled_dot_product_attention(*(tensor[:, :, 0] for tensor in (query, key, value)))[:, :, None]


def test_attention_without_heads_is_dense_and_listed():
    q, k, v = tensors()
    with pytest.raises(va.PatchError, match="got none in 1 layers; 'attn': query has 3 dimensions, not 4"):
        call(Toy(ThreeDimensionalProcessor()), Disc(2), q, k, v)
    output, calls = call(Toy(ThreeDimensionalProcessor()), Disc(2), q, k, v, strict=False)
    close(output, oracle(q[:, :, :1], k[:, :, :1], v[:, :, :1], torch.ones(21, 21, dtype=torch.bool)))
    assert calls[0].kind == "dense"


def test_attention_in_other_code_is_listed_as_skipped():
    model = Toy(HandmadeProcessor())
    model.second = Attention(SdpaProcessor())
    with va.patch(model, Disc(2), grid=LAYOUT) as patch:
        assert [(layer.name, layer.reason) for layer in patch.skipped] == [
            ("attn", "HandmadeProcessor makes no attention call that can be routed")
        ]
    with pytest.raises(va.PatchError, match="HandmadeProcessor makes no attention call that can be routed"):
        va.patch(Toy(HandmadeProcessor()), Disc(2), grid=LAYOUT)


def test_gradients_flow():
    q, k, v = (tensor.requires_grad_() for tensor in tensors())
    with va.patch(Toy(DispatchProcessor()), va.Clear(radius=2), grid=LAYOUT) as patch:
        patch._installations[0].model(q, k, v).square().sum().backward()
    got = [tensor.grad.clone() for tensor in (q, k, v)]
    twins = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    oracle(*twins, disc_mask(LAYOUT, 2)).square().sum().backward()
    for grad, twin in zip(got, twins, strict=True):
        torch.testing.assert_close(grad, twin.grad.float(), atol=1e-5, rtol=1e-4)


def test_shared_processors_get_their_own_layer():
    """`set_attn_processor(instance)` shares one object between all layers."""
    model = Toy(SdpaProcessor())
    model.second = Attention(model.attn.processor)
    with va.patch(model, Disc(2), grid=LAYOUT, layers="attn") as patch:
        assert [layer.name for layer in patch.routed] == ["attn"]
        assert type(model.second.processor) is SdpaProcessor
    assert model.attn.processor is model.second.processor


def test_an_operator_error_is_not_swallowed():
    @dataclasses.dataclass(frozen=True)
    class Broken:
        def __call__(self, query, key, value, layout, scale=None):
            raise ZeroDivisionError

    q, k, v = tensors()
    model = Toy(SdpaProcessor())
    with pytest.raises(ZeroDivisionError):
        call(model, Broken(), q, k, v, strict=False)
    output, _ = call(model, Whole(), q, k, v)
    close(output, oracle(q, k, v, torch.ones(21, 21, dtype=torch.bool)))


class AliasProcessor:
    def __call__(self, attn, query, key, value):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class RenamedFunctionProcessor:
    def __call__(self, attn, query, key, value):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return sdpa(query, key, value).transpose(1, 2)


class ModuleProcessor:
    def __call__(self, attn, query, key, value):
        return attention_dispatch.dispatch_attention_fn(query, key, value)


class PackageProcessor:
    def __call__(self, attn, query, key, value):
        return diffusers.models.attention_dispatch.dispatch_attention_fn(query, key, value)


class RenamedDispatchProcessor:
    def __call__(self, attn, query, key, value):
        return attend(query, key, value)


@pytest.mark.parametrize(
    "processor",
    [AliasProcessor, RenamedFunctionProcessor, ModuleProcessor, PackageProcessor, RenamedDispatchProcessor],
)
def test_attention_functions_by_any_name(processor):
    q, k, v = tensors()
    output, calls = call(Toy(processor()), Disc(2), q, k, v)
    close(output, oracle(q, k, v, disc_mask(LAYOUT, 2)))
    assert [c.kind for c in calls] == ["operator"]


class LocalImportProcessor:
    def __call__(self, attn, query, key, value):
        from torch.nn.functional import scaled_dot_product_attention

        query = torch.relu(
            query
        )  # `torch` is there, and the function's name as well, but one does not lead to the other
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return scaled_dot_product_attention(query, key, value).transpose(1, 2)


class LocalDispatchProcessor:
    def __call__(self, attn, query, key, value):
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(query, key, value)


def make_closure_processor():
    enclosed = F

    class ClosureProcessor:
        def __call__(self, attn, query, key, value):
            query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return enclosed.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    return ClosureProcessor()


@pytest.mark.parametrize("processor", [LocalImportProcessor(), LocalDispatchProcessor(), make_closure_processor()])
def test_attention_functions_out_of_reach_are_listed_as_skipped(processor):
    model = Toy(processor)
    model.second = Attention(SdpaProcessor())
    with va.patch(model, Disc(2), grid=LAYOUT) as patch:
        assert [(layer.name, layer.reason) for layer in patch.skipped] == [
            ("attn", f"{type(processor).__name__} makes no attention call that can be routed")
        ]
        assert [layer.name for layer in patch.routed] == ["second"]


@dataclasses.dataclass(frozen=True)
class Returning:
    what: str

    def __call__(self, query, key, value, layout, scale=None):
        output = Whole()(query, key, value, layout, scale)
        return {"tuple": (output, None), "None": None, "double": output.double(), "shorter": output[:, 1:]}[self.what]


@pytest.mark.parametrize(
    ("what", "got"),
    [("tuple", "a tuple"), ("None", "a NoneType"), ("double", "torch.float64"), ("shorter", r"\(2, 20, 4, 8\)")],
)
def test_operators_must_return_attention(what, got):
    q, k, v = tensors()
    message = (
        rf"Returning\(what='{what}'\) must return a tensor of shape \(2, 21, 4, 8\) and dtype torch.float32 for "
        rf"'attn', got {got}: mend its __call__"
    )
    with pytest.raises(va.PatchError, match=message):
        call(Toy(SdpaProcessor()), Returning(what), q, k, v, strict=False)


def test_autocast_may_choose_the_dtype():
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        output, calls = call(Toy(SdpaProcessor()), Whole(), q, k, v)
    assert output.dtype == torch.bfloat16
    assert calls[0].kind == "operator"


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"dropout_p": 0.5}, {"attention_kwargs": {"return_lse": False}}], ids=str
)
def test_dense_honours_every_call(options):
    q, k, v = tensors()
    model = Toy(DispatchProcessor())
    torch.manual_seed(7)
    output, calls = call(model, va.Dense(), q, k, v, **options)
    torch.manual_seed(7)
    assert torch.equal(output, model(q, k, v, **options))
    assert [(c.kind, c.reason) for c in calls] == [("operator", "")]
