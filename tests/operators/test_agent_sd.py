"""AgentSD against the released code, its formula with text, and settings that it refuses."""

import pathlib

import numpy as np
import oracle
import pytest
import torch

import vision_attn as va
from vision_attn.operators.token_merging import destinations, group

GOLDEN = {
    name: torch.from_numpy(array)
    for name, array in np.load(pathlib.Path(__file__).parents[1] / "golden/agent.npz").items()
    if name.startswith(("merge.", "sd"))
}


def rows(x):
    """Rows of a sample in an order that depends on nothing but the rows."""
    return x[x[:, 0].argsort()]


def test_tokens_and_agents_are_those_of_the_released_code():
    x = GOLDEN["merge.in"]
    tokens, agents = group(x, destinations((16, 16), (4, 4), False, x.device), (102, 240))  # of 243, 240 can be merged
    torch.testing.assert_close(tokens.unmerge(tokens.merge(x)), GOLDEN["merge.early.unmerged"])
    for ours, theirs in ((tokens.merge(x), "tokens"), (agents.merge(x), "agents")):
        for sample in range(2):
            torch.testing.assert_close(rows(ours[sample]), rows(GOLDEN[f"merge.early.{theirs}"][sample]))


def expected(op, q, k, v, layout, similarity):
    """The formula in plain products, on the groups of token merging."""
    image = layout.image_slice
    numbers = [int(layout.image_tokens * op.ratio), int(layout.image_tokens * op.agent_ratio)]
    chosen = destinations(layout.grid, (op.sy, op.sx), False, q.device)
    spare = layout.image_tokens - len(chosen)
    tokens, agents = group(similarity[:, image], chosen, tuple(min(n, spare) for n in numbers))
    text = [*range(image.start), *range(image.stop, layout.tokens)]
    keys, values = (torch.cat([tokens.merge(x[:, image]), x[:, text]], 1) for x in (k, v))
    collected = oracle.attention(agents.merge(q[:, image]), keys, values)[0]
    scale = q.shape[-1] ** (-0.5 * op.k_scale2)
    read = oracle.attention(tokens.merge(q[:, image]), agents.merge(q[:, image]), collected, scale=scale)[0]
    output = oracle.attention(q, k, v)[0]
    output[:, image] = tokens.unmerge(read + op.k_shortcut * tokens.merge(v[:, image]))
    return output


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("given", [True, False])
def test_formula_with_text(backend, given):
    torch.manual_seed(0)
    layout, op = va.TokenLayout((7, 12), text_before=3, text_after=2), va.AgentSD(0.3, 0.9, sx=3, sy=2)
    q, k, v = (torch.randn(2, layout.tokens, 3, 5, dtype=torch.float64) for _ in range(3))
    block_input = torch.randn(2, layout.tokens, 9, dtype=torch.float64) if given else None
    similarity = block_input if given else k.flatten(2)
    output = op(q, k, v, layout, block_input=block_input, backend=backend)
    torch.testing.assert_close(output, expected(op, q, k, v, layout, similarity))


def test_merging_alone_is_softmax_attention_of_merged_tokens():
    torch.manual_seed(0)
    layout, op = va.TokenLayout((6, 9)), va.AgentSD(0.5, None, sx=3, sy=2)
    q, k, v = (torch.randn(2, 54, 3, 5, dtype=torch.float64) for _ in range(3))
    groups = group(k.flatten(2), destinations((6, 9), (2, 3), False, q.device), (27,))[0]
    merged = oracle.attention(*(groups.merge(x) for x in (q, k, v)))[0]
    torch.testing.assert_close(op(q, k, v, layout), groups.unmerge(merged))


def test_random_cells_follow_torchs_generator_and_spare_odd_batches():
    layout, op = va.TokenLayout((16, 16)), va.AgentSD(use_rand=True)
    q, k, v = (torch.randn(2, 256, 2, 4) for _ in range(3))
    torch.manual_seed(3)
    once, other = op(q, k, v, layout), op(q, k, v, layout)
    torch.manual_seed(3)
    assert torch.equal(op(q, k, v, layout), once)
    assert not torch.equal(once, other)
    assert torch.equal(op(q[:1], k[:1], v[:1], layout), va.AgentSD()(q[:1], k[:1], v[:1], layout))


def test_cost_counts_what_is_merged():
    layout, op = va.TokenLayout((64, 64)), va.AgentSD(0.4, 0.95, 4, 4)
    merged, agents = 4096 - 1638, 256  # the numbers of the paper's early steps at 512 px
    similarities = 2 * 256 * (4096 - 256) * 8 * 40
    assert op.cost(layout, 8, 40).flops == 4 * 2 * agents * merged * 8 * 40 + similarities
    assert op.cost(layout, 8, 40).flops < va.Dense().cost(layout, 8, 40).flops / 9
    alone = va.AgentSD(0.4, None, 2, 2).cost(layout, 8, 40).flops
    assert alone == 4 * merged**2 * 8 * 40 + 2 * 1024 * 3072 * 8 * 40


def test_schedule_of_the_paper():
    stages = va.AgentSD.paper_steps(50, ratio=0.3, use_rand=True)
    assert list(stages) == [range(20), range(20, 50)]
    early, late = stages.values()
    assert early == va.AgentSD(0.3, 0.95, sx=4, sy=4, use_rand=True)
    assert late == va.AgentSD(0.3, None, sx=2, sy=2, use_rand=True)
    assert list(va.AgentSD.paper_steps(2)) == [range(1), range(1, 2)]


def test_pooled_agents_of_stable_diffusion():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 24, 3, 5, dtype=torch.float64) for _ in range(3))
    agents = q.unflatten(1, (2, 2, 3, 2)).mean((2, 4)).flatten(1, 2)
    scale = 5**-0.5
    collected = oracle.attention(agents, k, v, scale=scale)[0]
    truth = oracle.attention(q, agents, collected, scale=scale**0.3)[0] + 0.075 * v
    output = va.Agent((2, 3), k_scale2=0.3, k_shortcut=0.075)(q, k, v, va.TokenLayout((4, 6)))
    torch.testing.assert_close(output, truth)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": 1}, ValueError, "AgentSD: ratio must be from 0 to below 1, got 1"),
        ({"ratio": "half"}, TypeError, "AgentSD: ratio must be a number, got 'half'"),
        ({"ratio": 0.4, "agent_ratio": 0.3}, ValueError, r"agent_ratio must be from 0.4 \(ratio=0.4\) to .* got 0.3"),
        ({"ratio": 0, "agent_ratio": None}, ValueError, "ratio must be above 0 with agent_ratio=None, got 0"),
        ({"sx": 0}, ValueError, "AgentSD: sx must be at least 1, got 0"),
        ({"sy": 2.0}, TypeError, "AgentSD: sy must be an integer, got 2.0"),
        ({"max_downsample": True}, TypeError, "AgentSD: max_downsample must be an integer, got True"),
        ({"k_scale2": "s"}, TypeError, "AgentSD: k_scale2 must be a number.*got 's'"),
        ({"k_shortcut": float("inf")}, ValueError, "AgentSD: k_shortcut must be finite, got inf"),
        ({"use_rand": 1}, TypeError, "AgentSD: use_rand must be True or False, got 1"),
    ],
)
def test_settings_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        va.AgentSD(**arguments)


@pytest.mark.parametrize(
    ("op", "grid", "message"),
    [
        (
            va.AgentSD(0.5, 0.8, 2, 2),  # the defaults of the released code, whose agents never come
            (64, 64),
            r"agents must be less than half of the 2048 merged tokens on the grid \(64, 64\), got 1024 with",
        ),
        (va.AgentSD(), (3, 9), r"the grid must hold a cell of sy=4 rows and sx=4 columns, got \(3, 9\)"),
        (
            va.AgentSD(0.5, None, 1, 1),
            (8, 9),
            r"ratio must merge at least one token of the grid \(8, 9\), got ratio=0.5",
        ),
    ],
)
def test_settings_that_would_do_nothing(op, grid, message):
    x = torch.randn(1, grid[0] * grid[1], 1, 4)
    with pytest.raises(va.UnsupportedError, match=message):
        op(x, x, x, va.TokenLayout(grid))
    with pytest.raises(va.UnsupportedError, match=message):
        op.cost(va.TokenLayout(grid), 1, 4)


def test_calls_that_do_not_fit():
    x, layout = torch.randn(1, 64, 1, 4), va.TokenLayout((8, 8))
    with pytest.raises(ValueError, match=r"block_input must have shape \[1, 64, C\], got \[1, 63, 4\]"):
        va.AgentSD()(x, x, x, layout, block_input=x[:, :-1, 0])
    for op in (va.AgentSD(), va.Agent(4, k_scale2=0.3)):
        with pytest.raises(ValueError, match=f"{type(op).__name__}: scale must be above 0 with k_scale2=0.3, got -1"):
            op(x, x, x, layout, scale=-1.0)
    for steps, error, message in ((1, ValueError, "at least 2, got 1"), ("50", TypeError, "an integer, got '50'")):
        with pytest.raises(error, match=f"AgentSD.paper_steps: num_inference_steps must be {message}"):
            va.AgentSD.paper_steps(steps)
