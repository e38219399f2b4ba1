"""The suite of guidance: what each way computes, and what its table says."""

import re

import diffusers
import torch

from vision_attn.benchmark.guidance_bench import EVERY, GUIDED, WHOLE, _flop_counter, guidance_report


def test_each_way_is_measured():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2, sample_size=8,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    runs = []
    report = guidance_report(unet, repeats=2, warmup=1, on_run=runs.append)
    guided, whole, every = report.rows
    assert [row.way for row in report.rows] == [GUIDED, WHOLE, EVERY]
    assert runs == [GUIDED, WHOLE, EVERY] * 3
    # A quarter has one layer on the way down, the middle, and two on the way up; all levels have 3 more each.
    assert [row.layers for row in report.rows] == [4, 4, 10]
    assert guided.flops < whole.flops < every.flops
    assert all(row.seconds > 0 for row in report.rows)
    assert report.to_dict()["environment"]["latents"] == "8x8"
    share = re.escape(f"{guided.flops / every.flops:.1%}")
    assert re.search(rf"^maps of a quarter, stopped +4 +\S+ .FLOP +{share} ", str(report), re.MULTILINE)


def test_attention_on_a_cpu_counts():
    """Two products forward; five backward, one of which computes the scores anew."""
    query, key = torch.randn(2, 3, 20, 8, requires_grad=True), torch.randn(2, 3, 28, 8, requires_grad=True)
    with _flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, key).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * (2 * 3 * 20 * 28 * 8)
