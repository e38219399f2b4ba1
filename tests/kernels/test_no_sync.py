"""What CUDA graphs need: no operation of ours waits for the device, whatever tensors hold.

Fake tensors have no data, so that a look at a value raises; launches are recorded instead of made.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vision_attn.kernels import biased, block_sparse, tensors, windowed
from vision_attn.kernels.geometry import geometry_of

KERNELS = [
    (windowed, ("_windowed_forward_kernel", "_windowed_backward_dq_kernel", "_windowed_backward_dkv_kernel")),
    (
        block_sparse,
        ("_block_sparse_forward_kernel", "_block_sparse_backward_dq_kernel", "_block_sparse_backward_dkv_kernel"),
    ),
    (biased, ("_biased_forward_kernel", "_biased_backward_dq_kernel", "_biased_backward_dkv_kernel")),
    (tensors, ("delta_kernel",)),
]


class Recorder:
    """In place of a kernel: `kernel[grid](...)` notes its name."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append(self.name)


@pytest.fixture
def launched(monkeypatch):
    names = []
    for module, kernels in KERNELS:
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, Recorder(kernel, names))
    return names


def inputs():
    query = torch.empty(2, 96 + 5, 4, 16)
    key, value = torch.empty(2, 2, 96 + 5, 2, 16)
    return query, key, value


def windowed_call():
    geometry = geometry_of((8, 12), (3, 5), (1, 1), (1, 1), (False, False), 0)
    extra = torch.empty(2, 7, 2, 16)
    return windowed, windowed.Call(*inputs(), None, extra, extra, None, geometry, 5, 0.25), ()


def block_sparse_call():
    index = torch.zeros(2, 1, 7, 3, dtype=torch.int64)
    return block_sparse, block_sparse.Call(*inputs(), index, 16, 16, 0.25), ()


def biased_call():
    return biased, biased.Call(*inputs(), torch.empty(4, 101, 101), 0.25), (True,)


@pytest.mark.parametrize("make", [windowed_call, block_sparse_call, biased_call])
def test_no_operation_looks_at_a_value(make, launched):
    with FakeTensorMode():
        module, call, options = make()
        output, lse = module.forward(call)
        grads = module.backward(call, output, lse, output, lse, *options)
    assert [grad.shape for grad in grads[:3]] == [call.query.shape, call.key.shape, call.value.shape]
    assert {name for name in launched if "_forward_" not in name} == {
        name for owner, names in KERNELS if owner in (module, tensors) for name in names if "_forward_" not in name
    }


def test_a_look_at_a_value_is_seen():
    with FakeTensorMode(), pytest.raises(RuntimeError):
        torch.empty(3).sum().item()
