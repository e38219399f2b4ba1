import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vision_attn as va
from vision_attn.benchmark import attention_clock
from vision_attn.benchmark.attention_clock import AttentionClock

BATCH, TOKENS, HEADS, DIM = 2, 15, 3, 8
LAYOUT = va.TokenLayout((3, 5))


class Attending(nn.Module):
    """Calls whatever it is given, on `[B, S, H, D]`."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, query):
        return self.attend(query)


def dense(query):
    q = query.transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


@pytest.fixture
def query():
    return torch.randn(BATCH, TOKENS, HEADS, DIM)


def test_dense_calls_are_counted_with_their_flops(query):
    model = Attending(lambda x: dense(x) + dense(x))
    clock = AttentionClock(model)
    with clock.watch():
        model(query)
    assert clock.calls == 2
    # Two products of S x S x D multiply-adds per head, twice.
    assert clock.flops == 2 * BATCH * HEADS * (2 * 2 * TOKENS * TOKENS * DIM)
    assert clock.seconds > 0


def test_attention_outside_of_the_model_does_not_count(query):
    model = Attending(dense)
    clock = AttentionClock(model)
    with clock.watch():
        dense(query)
    assert (clock.calls, clock.flops, clock.seconds) == (0, 0, 0)


def test_operator_calls_are_counted_once_with_their_own_cost(query):
    operator = va.Dense()  # calls scaled_dot_product_attention itself
    model = Attending(lambda x: operator(x, x, x, LAYOUT))
    clock = AttentionClock(model)
    with clock.watch(operator):
        output = model(query)
    assert clock.calls == 1
    assert clock.flops == BATCH * operator.cost(LAYOUT, HEADS, DIM).flops
    assert torch.equal(output, operator(query, query, query, LAYOUT))


def test_time_is_that_of_the_calls_alone(query, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(attention_clock.time, "perf_counter", lambda: now[0])

    class Slow(nn.Module):
        def forward(self, x):
            now[0] += 7
            operator(x, x, x, layout=LAYOUT)
            now[0] += 7

    class TakesTwoSeconds(va.Dense):
        def __call__(self, query, key, value, layout, scale=None):
            now[0] += 2
            return query

    operator = TakesTwoSeconds()
    model = Slow()
    clock = AttentionClock(model)
    with clock.watch(operator):
        model(query)
        model(query)
    assert clock.seconds == 4


def test_an_operator_that_does_not_know_its_cost(query):
    class Unknown(va.Dense):
        def cost(self, layout, heads, head_dim):
            return None

    operator = Unknown()
    model = Attending(lambda x: operator(x, x, x, LAYOUT))
    clock = AttentionClock(model)
    with clock.watch(operator):
        model(query)
    assert (clock.calls, clock.flops) == (1, None)


def test_an_operator_without_cost_and_with_names_of_its_own(query):
    class Plain:
        def __call__(self, q, k, v, where, scale=None):
            return v

    operator = Plain()
    model = Attending(lambda x: operator(x, x, x, LAYOUT, scale=None))
    clock = AttentionClock(model)
    with clock.watch(operator):
        model(query)
    assert (clock.calls, clock.flops) == (1, None)


def test_several_models_are_watched_together(query):
    models = [Attending(dense), Attending(lambda x: dense(x) + dense(x))]
    outsider = Attending(dense)
    clock = AttentionClock(models)
    with clock.watch():
        for model in (*models, outsider):
            model(query)
    assert clock.calls == 3
    assert not any(model._forward_hooks or model._forward_pre_hooks for model in models)


def test_everything_is_back_afterwards_even_after_an_exception(query):
    class Inherits(va.Dense):
        pass

    operator = Inherits()
    before = F.scaled_dot_product_attention, va.Dense.__call__
    signature = inspect.signature(Inherits.__call__)

    def fail(x):
        assert F.scaled_dot_product_attention is not before[0]
        assert inspect.signature(Inherits.__call__) == signature
        raise RuntimeError("out of luck")

    model = Attending(fail)
    clock = AttentionClock(model)
    with pytest.raises(RuntimeError, match="out of luck"), clock.watch(operator):
        model(query)
    assert (F.scaled_dot_product_attention, va.Dense.__call__) == before
    assert "__call__" not in vars(Inherits)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
