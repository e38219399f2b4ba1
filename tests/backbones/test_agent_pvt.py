"""Agent-PVT as timm's users know models: any image size, features, gradients, released weights."""

import pytest
import timm
import torch

import vision_attn.backbones  # noqa: F401 - registers the names
from vision_attn.backbones.agent_pvt import AgentPyramidVisionTransformer, checkpoint_filter_fn

TINY = {"img_size": 64, "embed_dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "depths": (1, 2, 1, 1),
        "mlp_ratios": (2, 2, 2, 2), "agents": (9, 4, 4, 1)}  # fmt: skip


def tiny(**changes):
    torch.manual_seed(0)
    return AgentPyramidVisionTransformer(**{"num_classes": 10, **TINY, **changes})


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (70, 101)])
def test_any_image_size(size):
    output = tiny().eval()(torch.randn(2, 3, *size))
    assert output.shape == (2, 10)
    assert output.isfinite().all()


def test_another_size_equals_resized_weights():
    """Interpolated at load time, or in the forward pass."""
    model, other = tiny().eval(), tiny(img_size=(96, 64)).eval()
    other.load_state_dict(checkpoint_filter_fn({"model": model.state_dict()}, other))
    x = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 128), (64, 96)])
def test_weights_of_an_oblong_size_are_interpolated(size):
    """Also to a map of as many tokens the other way round."""
    model, other = tiny(img_size=size).eval(), tiny(img_size=size[::-1]).eval()
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    x = torch.randn(1, 3, *size[::-1])
    torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=1e-4)


def test_names_are_the_released_ones():
    names = set(tiny().state_dict())
    block = {"attn.q.weight", "attn.kv.bias", "attn.proj.weight", "attn.dwc.weight", "attn.an_bias", "attn.wa_bias"}
    block |= {"norm1.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc2.bias"}
    assert {f"block2.1.{name}" for name in block} <= names
    assert {"patch_embed3.proj.weight", "patch_embed3.norm.bias", "pos_embed4", "head.weight"} <= names
    assert not any(name.split(".")[0].rstrip("1234") not in {"block", "patch_embed", "pos_embed", "head"}
                   for name in names)  # fmt: skip


@pytest.mark.parametrize("ratio", [1, 2])
def test_training_reaches_every_parameter(ratio):
    model = tiny(sr_ratios=(ratio, ratio, 1, 1), drop_path_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1)
    model.set_grad_checkpointing()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_features():
    arguments = {key: value for key, value in TINY.items() if key != "img_size"}
    model = timm.create_model("va_agent_pvt_tiny", features_only=True, out_indices=(0, 2), img_size=64, **arguments)
    assert [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))] == [(1, 8, 16, 24), (1, 16, 4, 6)]
    assert model.feature_info.reduction() == [4, 16]


def test_classifier_channels_and_groups():
    model = tiny(in_chans=1, num_classes=0)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 32)
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 32, 2, 2)
    with pytest.raises(ValueError, match="global_pool must be 'avg' with num_classes=5"):
        model.reset_classifier(5)
    model.reset_classifier(0, "avg")
    model.reset_classifier(5)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    groups = timm.models.group_parameters(model, model.group_matcher())
    order = [name for _, names in sorted(groups.items()) for name in names]
    assert len(order) == len(list(model.parameters()))
    firsts = [
        order.index(f"{name}.proj.weight" if "embed" in name else f"{name}.attn.q.weight")
        for name in (
            "patch_embed1",
            "block1.0",
            "patch_embed2",
            "block2.0",
            "block2.1",
            "patch_embed3",
            "block3.0",
            "block4.0",
        )
    ]
    assert firsts == sorted(firsts)
    assert {"pos_embed1", "block1.0.attn.an_bias"} <= model.no_weight_decay()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 1)}, r"depths must have 4 values, got \(1, 1\)"),
        ({"global_pool": ""}, "global_pool must be 'avg' with num_classes=10, got ''"),
        ({"global_pool": "max"}, "global_pool must be 'avg' or '', got 'max'"),
        ({"agents": (9, 4, 4, 49)}, r"agents must be at most 4 for a map of \(2, 2\) tokens, got 49"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
