"""Every registered name has the size and the work that its paper gives."""

import math

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
    "va_agent_cswin_tiny": (20.46, 4.3),  # the table says 21
    "va_agent_cswin_small": (32.81, 6.8),
    "va_agent_cswin_base": (73.25, 14.9),
}
# The same in whole millions: arXiv 2204.07143, table 2; arXiv 2209.15001, table 2; ziplab/LITv2 (arXiv 2205.13213).
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
    "va_litv2_small": (28, 3.7),
    "va_litv2_medium": (49, 7.5),
    "va_litv2_base": (87, 13.2),
}
# The same to a tenth of a million: cheerss/CrossFormer (arXiv 2108.00154), rayleizhu/BiFormer (arXiv 2303.08810).
TENTHS = {
    "va_crossformer_tiny": (27.8, 2.9),
    "va_crossformer_small": (30.7, 4.9),
    "va_crossformer_base": (52.0, 9.2),
    "va_crossformer_large": (92.0, 16.1),
    "va_biformer_tiny": (13.1, 2.2),
    "va_biformer_small": (25.5, 4.5),
    "va_biformer_base": (56.8, 9.8),
}
ALL = {
    name: (digits, *given)
    for digits, table in ((2, PUBLISHED), (1, TENTHS), (None, WHOLE))
    for name, given in table.items()
}


def deform_conv2d_flops(image, weight, *arguments, out_shape, **options):
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def attend_flops(query, key, value, *arguments, out_shape, **options):
    return 2 * math.prod(query[:3]) * key[1] * (query[3] + value[3])


# Not in torch's own table; of the deformable convolution, looking up the tokens is left out.
FLOPS = {
    torch.ops.torchvision.deform_conv2d: deform_conv2d_flops,
    torch.ops.vision_attn.attend: attend_flops,
}


def test_every_name_is_here():
    assert set(timm.list_models("va_*")) == ALL.keys()


@pytest.mark.parametrize("name", ALL)
def test_size_and_work(name):
    model, (digits, parameters, work) = timm.create_model(name).eval(), ALL[name]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(millions, digits) == parameters
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        output = model(torch.randn(1, *model.default_cfg["input_size"]))
    assert output.shape == (1, 1000)
    assert output.isfinite().all()
    assert counter.get_total_flops() / 2e9 == pytest.approx(work, rel=0.03)
