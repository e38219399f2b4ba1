"""Agent-DeiT as timm's users know models: names, sizes, features, image sizes, weights."""

import pytest
import timm
import torch
from agent_golden import golden

import vision_attn.backbones  # noqa: F401 - registers the names
from vision_attn.backbones.agent_attention import AgentAttention
from vision_attn.backbones.agent_deit import AgentVisionTransformer, checkpoint_filter_fn

TINY = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "agents": 9, "agent_blocks": 2}


def tiny(**changes):
    return AgentVisionTransformer(**{"img_size": 32, "num_classes": 10, **TINY, **changes})


def test_released_model():
    weights, x, expected = golden("deit_model")
    model = tiny().eval()
    model.load_state_dict(weights)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


def test_base_has_agents_in_its_first_four_blocks():
    with torch.device("meta"):
        model = timm.create_model("va_agent_deit_base_patch16_224")
    kinds = [isinstance(block.attn, AgentAttention) for block in model.blocks]
    assert kinds == [True] * 4 + [False] * 8
    assert model.blocks[0].attn.an_bias.shape == (12, 81, 7, 7)


NAME = "va_agent_deit_tiny_patch16_224"


@pytest.mark.parametrize("changes", [{"num_classes": 0}, {"in_chans": 1}, {"img_size": (80, 128)}, {"reg_tokens": 2}])
def test_creation_options(changes):
    model = timm.create_model(NAME, depth=2, agents=16, **changes).eval()
    size = changes.get("img_size", (224, 224))
    output = model(torch.randn(1, changes.get("in_chans", 3), *size))
    assert output.shape == (1, 192 if changes.get("num_classes") == 0 else 1000)
    assert output.isfinite().all()


def test_features():
    model = timm.create_model(NAME, depth=3, agents=16, features_only=True, out_indices=(0, 2), img_size=(96, 64))
    features = model(torch.randn(2, 3, 96, 64))
    assert [tuple(x.shape) for x in features] == [(2, 192, 6, 4)] * 2
    assert model.feature_info.channels() == [192, 192]


def test_training_reaches_every_parameter():
    model = tiny(drop_path_rate=0.1)
    model.set_grad_checkpointing()
    model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_classifier_and_groups():
    model = tiny()
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert {"pos_embed", "cls_token", "blocks.0.attn.an_bias", "blocks.1.attn.ca_bias"} <= model.no_weight_decay()
    assert set(model.group_matcher()) == {"stem", "blocks"}


def test_dynamic_image_sizes_equal_a_resized_model():
    torch.manual_seed(0)
    dynamic = tiny(dynamic_img_size=True).eval()
    fixed = tiny().eval()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size(img_size=(20, 48))
    x = torch.randn(1, 3, 20, 48)
    torch.testing.assert_close(dynamic(x), fixed(x), atol=1e-5, rtol=1e-4)
    square = torch.randn(1, 3, 32, 32)
    fixed.set_input_size(img_size=(32, 32))
    assert dynamic(square).shape == (1, 10)


def test_weights_of_another_size_are_resized_and_none_is_left_over():
    weights = golden("deit_model")[0]
    model = tiny(img_size=(48, 32))
    filtered = checkpoint_filter_fn({"model": weights}, model)
    model.load_state_dict(filtered)
    rows = filtered["blocks.0.attn.ah_bias"]
    assert rows.shape == (1, 3, 9, 12, 1)
    old = weights["blocks.0.attn.ah_bias"]
    torch.testing.assert_close(rows.mean(), old.mean(), atol=2e-3, rtol=0)
    assert torch.equal(filtered["blocks.0.attn.aw_bias"], weights["blocks.0.attn.aw_bias"])


def test_saved_models_come_back(tmp_path):
    model = timm.create_model(NAME, depth=2, agents=16, num_classes=5).eval()
    timm.models.save_for_hf(model, tmp_path, model_args={"depth": 2, "agents": 16})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(again(x), model(x))


def test_full_graph_compile():
    torch._dynamo.reset()
    model = tiny().eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agent_blocks": 5}, "agent_blocks must be 0 to 4, got 5"),
        ({"patch_drop_rate": 0.25}, "patch_drop_rate must be left out"),
        ({"qk_norm": True}, "qk_norm must be left out"),
        ({"agents": 100}, r"agents must be at most 64 for a map of \(8, 8\) tokens, got 100"),
        ({"proj_bias": False}, "proj_bias=False must be left out"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
