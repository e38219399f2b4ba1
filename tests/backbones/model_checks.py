"""Checks that several families share, each with names and shapes of its own."""

import timm
import torch


def check_released_file(name, shapes, arguments, tmp_path):
    """A file with the released names loads, whole, and what is saved from it gives the same output."""
    torch.manual_seed(0)
    weights = {key: torch.rand(shape) for key, shape in shapes.items()}
    torch.save({"model": weights, "epoch": 299}, tmp_path / "released.pth")
    overlay = {"file": str(tmp_path / "released.pth")}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[key].to(value.dtype))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again = timm.create_model(name, checkpoint_path=str(tmp_path / "own.pth"), **arguments).eval()
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(again(x), model(x))


def check_released_file_for_others(name, shapes, arguments, tmp_path):
    """The same file for images of one channel and other classes: the first convolution is summed over colours."""
    weights = {key: torch.rand(shape) for key, shape in shapes.items()}
    torch.save(weights, tmp_path / "released.pth")
    overlay = {"file": str(tmp_path / "released.pth")}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=7, **arguments
    )
    first = model.default_cfg["first_conv"]
    summed = weights[f"{first}.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.get_submodule(first).weight, summed, check_device=False)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)


def check_saved_weights(make, x, tmp_path):
    """Weights come back from a file into a model that had others."""
    model, other = make().eval(), make().eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "weights.pth"))
    assert torch.equal(other(x), model(x))


def check_classifier(make, features):
    """No classes give features, other classes another classifier, also for images of one channel."""
    model = make(in_chans=1, num_classes=0).eval()
    x = torch.randn(1, 1, 64, 64)
    assert model(x).shape == (1, features)
    model.reset_classifier(5)
    assert model(x).shape == (1, 5)


def check_order_of_groups(model, parameters):
    """Every parameter is in a group, and some of them stand in the order of the forward pass."""
    groups = timm.models.group_parameters(model, model.group_matcher())
    order = [name for _, names in sorted(groups.items()) for name in names]
    assert len(order) == len(list(model.parameters()))
    assert sorted(parameters, key=order.index) == list(parameters)
