"""Every registered name has the size and the work that its paper gives."""

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vision_attn.backbones  # noqa: F401 - registers the names

# Millions of parameters of the released code, and billions of multiply-adds as published (arXiv 2312.08874, table 8).
PUBLISHED = {
    "va_agent_deit_tiny_patch16_224": (6.02, 1.2),
    "va_agent_deit_small_patch16_224": (22.65, 4.4),
    "va_agent_deit_small_patch16_448": (23.07, 17.7),
    "va_agent_deit_base_patch16_224": (87.20, 17.6),
    "va_agent_pvt_tiny": (11.57, 2.0),
    "va_agent_pvt_small": (20.64, 4.0),
    "va_agent_pvt_medium": (35.92, 7.0),
    "va_agent_pvt_large": (48.74, 10.4),
    "va_agent_swin_tiny": (28.90, 4.5),
    "va_agent_swin_small": (49.67, 8.7),
    "va_agent_swin_base": (88.10, 15.4),
}
# The same in whole millions, as arXiv 2204.07143, table 2, and arXiv 2209.15001, table 2, have them.
WHOLE = {
    "va_nat_mini": (20, 2.7),
    "va_nat_tiny": (28, 4.3),
    "va_nat_small": (51, 7.8),
    "va_nat_base": (90, 13.7),
    "va_dinat_mini": (20, 2.7),
    "va_dinat_tiny": (28, 4.3),
    "va_dinat_small": (51, 7.8),
    "va_dinat_base": (90, 13.7),
    "va_dinat_large": (201, 30.6),  # the paper says 200; the released file of 804 MB holds 201
}


def test_every_name_is_here():
    assert set(timm.list_models("va_*")) == PUBLISHED.keys() | WHOLE.keys()


@pytest.mark.parametrize("name", [*PUBLISHED, *WHOLE])
def test_size_and_work(name):
    model, (parameters, work) = timm.create_model(name).eval(), (PUBLISHED | WHOLE)[name]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(millions, 2 if name in PUBLISHED else None) == parameters
    # Only attention that is made of matrix products is counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(torch.randn(1, *model.default_cfg["input_size"]))
    assert output.shape == (1, 1000)
    assert output.isfinite().all()
    assert counter.get_total_flops() / 2e9 == pytest.approx(work, rel=0.03)
