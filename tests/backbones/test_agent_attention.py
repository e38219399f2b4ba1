"""Agent attention modules against outputs of the released code, and what they refuse."""

import pytest
import torch
from agent_golden import errors_of_wrong_variants, golden

from vision_attn.backbones.agent_attention import (
    AgentAttention,
    ReducedAgentAttention,
    StripeAgentAttention,
    WindowAgentAttention,
)

CASES = {
    "deit_a9_w8": lambda: AgentAttention(32, 4, agents=9, grid=(8, 8)),
    "swin_a16_w12": lambda: WindowAgentAttention(32, (12, 12), 4, agents=16),
    "pvt_a16_sr2": lambda: ReducedAgentAttention(32, (12, 12), 2, agents=16, sr_ratio=2),
    "cswin_full": lambda: StripeAgentAttention(16, (14, 14), (14, 14), 2, agents=9),
    "cswin_col": lambda: StripeAgentAttention(16, (14, 14), (14, 7), 2, agents=9),
}


def run(module, x):
    return module(x, (12, 12)) if isinstance(module, ReducedAgentAttention) else module(x)


@pytest.mark.parametrize("name", CASES)
def test_released_code(name):
    weights, x, expected = golden(name)
    module = CASES[name]().eval()
    module.load_state_dict(weights)
    torch.testing.assert_close(run(module, x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["deit_a9_w8", "swin_a16_w12", "pvt_a16_sr2"])
def test_a_module_without_biases_is_far_from_the_released_code(name):
    """As far as the golden file says: the comparison above can fail."""
    weights, x, expected = golden(name)
    module = CASES[name]().eval()
    module.load_state_dict({key: 0 * value if key.endswith("_bias") else value for key, value in weights.items()})
    known = errors_of_wrong_variants(name)["no bias"]
    assert (run(module, x) - expected).abs().max().item() == pytest.approx(known, rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_dropout_is_for_training_only_and_leaves_the_mean(name):
    weights, x, expected = golden(name)
    module = CASES[name]()
    module.load_state_dict(weights)
    module.attn_drop.p = 0.2
    outputs = torch.stack([run(module, x) for _ in range(400)])
    assert outputs.std(0).mean() > 1e-3
    torch.testing.assert_close(outputs.mean(0), expected, atol=0.05, rtol=0)
    torch.testing.assert_close(run(module.eval(), x), expected, atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient():
    for name, make in CASES.items():
        module = make()
        run(module, golden(name)[1]).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters()), name


def test_masks_are_refused():
    x = torch.zeros(1, 65, 8)
    with pytest.raises(NotImplementedError, match=r"AgentAttention: attn_mask must be None .* got a mask"):
        AgentAttention(8, 2, agents=4, grid=(8, 8))(x, attn_mask=torch.ones(65, 65, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match=r"AgentAttention: attn_mask must be None .* got is_causal=True"):
        AgentAttention(8, 2, agents=4, grid=(8, 8))(x, is_causal=True)
    with pytest.raises(NotImplementedError, match=r"mask must be None, got shape \(4, 64, 64\): use shift_size=0"):
        WindowAgentAttention(8, (8, 8), 2, agents=4)(torch.zeros(4, 64, 8), mask=torch.zeros(4, 64, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "AgentAttention: num_heads must divide dim=8, got 3"),
        ({"agents": 12}, "AgentAttention: agents must be a square number of at least 1, got 12"),
        ({"agents": 0}, "AgentAttention: agents must be a square number of at least 1, got 0"),
        ({"agents": 36}, r"agents must be at most 25 for a map of \(5, 9\) tokens, got 36: use fewer agents"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AgentAttention(8, **{"num_heads": 2, "agents": 4, "grid": (5, 9), **arguments})


def test_another_number_of_tokens_is_named():
    with pytest.raises(ValueError, match=r"x must have 1 \+ 5 \* 9 = 46 tokens, got 40: call set_input_size"):
        AgentAttention(8, 2, agents=4, grid=(5, 9))(torch.zeros(1, 40, 8))
