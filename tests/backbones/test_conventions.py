"""What timm checks of its own models, for a tiny one of each family."""

import copy
import re

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay

from vision_attn.backbones.quick_data import SIDE_PX
from vision_attn.backbones.quick_train import VARIANTS

FAMILIES = {name: variant for name, variant in VARIANTS.items() if variant.name.startswith("va_")}
PYRAMIDS = [name for name in FAMILIES if name != "agent-deit"]


def make(family, **changes):
    torch.manual_seed(0)
    return timm.create_model(FAMILIES[family].name, **{"num_classes": 7, **FAMILIES[family].arguments, **changes})


def images(batch=2, channels=3):
    return torch.randn(batch, channels, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(1))


def test_every_registered_family_is_here():
    names = timm.list_models("va_*"), [variant.name for variant in FAMILIES.values()]
    every, tried = ({re.sub(r"_(mini|tiny|small|medium|base|large).*", "", name) for name in part} for part in names)
    assert tried == every


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_and_its_parts(family):
    model = make(family).eval()
    x = images()
    features = model.forward_features(x)
    output = model(x)
    assert output.shape == (2, 7)
    assert output.isfinite().all()
    assert torch.equal(model.forward_head(features), output)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features
    assert torch.equal(copy.deepcopy(model)(x), output)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_classifier(family):
    model, x = make(family, num_classes=0).eval(), images()
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0, "")
    assert model(x).ndim in (3, 4)
    assert make(family, in_chans=1).eval()(images(channels=1)).shape == (2, 7)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_backward_reaches_every_parameter(family, checkpointing):
    model = make(family).train()
    model.set_grad_checkpointing(checkpointing)
    model(images()).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("family", PYRAMIDS)
@torch.no_grad()
def test_features(family):
    model = make(family, features_only=True, out_indices=(1, 3)).eval()
    assert model.feature_info.reduction() == [8, 32]
    maps = model(images())
    for x, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        side = SIDE_PX // reduction
        shape = (2, side, side, channels) if family == "agent-swin" else (2, channels, side, side)
        assert x.shape == shape
        assert x.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_intermediates_end_in_the_features(family):
    model, x = make(family).eval(), images()
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(model.feature_info)
    only = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert torch.equal(only[0], maps[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_parameters(family):
    model = make(family)
    names = {name for name, _ in model.named_parameters()}
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        grouped = [name for group in groups.values() for name in group]
        assert sorted(grouped) == sorted(names)
        assert len(groups) > 3
    assert set(model.no_weight_decay()) <= names | {"dist_token", "reg_token"}  # timm's, for models that have them
    decays = param_groups_weight_decay(model, 0.05, model.no_weight_decay())
    assert sum(len(group["params"]) for group in decays) == len(names)


@pytest.mark.parametrize("family", PYRAMIDS)
def test_saved_models_come_back(family, tmp_path):
    model = make(family).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=FAMILIES[family].arguments)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_full_graph_compile(family):
    torch._dynamo.reset()
    model = make(family).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", timm.list_models("va_*"))
def test_pretrained_configurations_say_where_weights_are(name):
    config = timm.get_pretrained_cfg(name)
    assert config.origin_url.startswith("https://github.com/")
    assert config.paper_ids.startswith("arXiv:")
    assert (config.num_classes, config.input_size[0], config.license) == (1000, 3, config.license.lower())
    with torch.device("meta"):
        parameters = dict(timm.create_model(name).named_parameters())
    first = [config.first_conv] if isinstance(config.first_conv, str) else config.first_conv
    for layer in (*first, config.classifier):
        assert f"{layer}.weight" in parameters
