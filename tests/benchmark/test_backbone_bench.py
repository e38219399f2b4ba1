"""The suite of backbones: what its table says, and a wrong operator is not timed."""

import re

import pytest
import torch

import vision_attn as va
from vision_attn.benchmark import backbone_bench
from vision_attn.benchmark.backbone_bench import DENSE, backbone_report

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def test_every_attention_is_timed_at_every_size():
    runs = []
    operators = [va.Agent(4), va.Neighborhood(3)]
    report = backbone_report(operators, sizes_px=(48, 80), repeats=2, warmup=1, on_run=runs.append, **TINY)
    assert [(row.size_px, row.tokens, row.attention) for row in report.rows] == [
        (size, tokens, name)
        for size, tokens in ((48, 10), (80, 26))
        for name in (DENSE, "agent(agents=4)", "neighborhood(kernel_size=3)")
    ]
    for row in report.rows:
        assert row.attention_seconds > 0
        assert row.model_seconds > 0
        assert (row.max_error is None) == (row.attention == DENSE)
        assert row.attention == DENSE or row.max_error < 1e-5
    dense, agent = report.rows[:2]
    assert (dense.model_speedup, dense.attention_speedup) == (1, 1)
    assert agent.attention_speedup == dense.attention_seconds / agent.attention_seconds
    assert agent.model_speedup == dense.model_seconds / agent.model_seconds
    assert len(runs) == 2 * 3 * (1 + 2 + 2)
    assert re.search(r"^80 px +26 +neighborhood\(kernel_size=3\) +\d+ +\d+\.\d\dx", str(report), re.MULTILINE)
    assert report.to_dict()["environment"]["model"] == "vit_small_patch16_224"


def test_a_wrong_operator_is_not_timed(monkeypatch):
    def wrong(self, query, key, value, layout, scale=None, backend="auto"):
        return value if backend == "dense" else value + 1e-3

    monkeypatch.setattr(va.Agent, "__call__", wrong)
    with pytest.raises(RuntimeError, match=r"bench: agent\(agents=4\) is off by 1.00e-03 on \(3, 3\), its dense"):
        backbone_report([va.Agent(4)], sizes_px=(48,), repeats=1, warmup=0, **TINY)


def test_an_operator_without_backends_has_no_error():
    x = torch.randn(1, 12, 2, 4)
    assert backbone_bench._max_error(va.Dense(), (x, x, x, va.TokenLayout((3, 4)))) is None


def test_half_precision_is_checked_in_half_precision():
    options = {"sizes_px": (48,), "repeats": 1, "warmup": 0, "dtype": torch.bfloat16}
    assert 1e-4 < backbone_report([va.Neighborhood(3)], **options, **TINY).rows[1].max_error < 0.1
