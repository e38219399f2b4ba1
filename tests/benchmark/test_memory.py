import sys

import pytest
import torch

from vision_attn.benchmark import memory
from vision_attn.benchmark.memory import PeakMemory

MEBI = 2**20

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/clear_refs")


@linux
def test_peak_counts_what_was_freed_again():
    with PeakMemory() as used:
        big = torch.ones(64 * MEBI // 4)
        del big
    assert 60 * MEBI < used.bytes < 100 * MEBI


@linux
def test_an_earlier_peak_does_not_count():
    earlier = torch.ones(128 * MEBI // 4)
    del earlier
    with PeakMemory() as used:
        small = torch.ones(16 * MEBI // 4)
    assert 12 * MEBI < used.bytes < 64 * MEBI
    assert small[0] == 1


def test_systems_that_cannot_tell_say_none(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    with PeakMemory() as used:
        pass
    assert used.bytes is None


def test_an_exception_passes_through():
    with pytest.raises(KeyError, match="mine"), PeakMemory():
        raise KeyError("mine")
