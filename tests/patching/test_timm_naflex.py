"""NaFlexViT: images, patches of images of one size, and batches that have no common grid."""

import pytest
import timm
import torch

import vision_attn as va

NAMES = {"registers": ("naflexvit_base_patch16_gap", 4), "siglip": ("naflexvit_base_patch16_siglip", 0)}


def make(kind="registers"):
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 5, "dynamic_img_pad": True}
    model = timm.create_model(NAMES[kind][0], **options).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model, torch.randn(2, 3, 80, 112)


def patches(image, rows, columns, length):
    """What timm's collator makes of images: `length` patches, coordinates and which of them are there."""
    count = rows * columns
    pixels = image[..., : rows * 16, : columns * 16].unflatten(3, (columns, 16)).unflatten(2, (rows, 16))
    pixels = pixels.permute(0, 2, 4, 3, 5, 1).reshape(len(image), count, -1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    batch = {
        "patches": torch.zeros(len(image), length, 768),
        "patch_coord": torch.zeros(len(image), length, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(image), length, dtype=torch.bool),
    }
    batch["patches"][:, :count], batch["patch_valid"][:, :count] = pixels, True
    batch["patch_coord"][:, :count] = torch.stack([y, x], -1).flatten(0, 1)
    return batch


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES)
def test_images_of_any_size(monkeypatch, kind):
    model, x = make(kind)
    stock, prefix, op = model(x), NAMES[kind][1], va.Neighborhood((3, 5))
    with va.patch(model, va.Dense()) as patch:
        assert torch.equal(model(x), stock)
        assert patch.calls["blocks.1.attn"][0].layout == va.TokenLayout((5, 7), text_before=prefix)
        model(torch.randn(1, 3, 60, 100))  # padded to whole patches
        assert patch.calls["blocks.1.attn"][0].layout == va.TokenLayout((4, 7), text_before=prefix)
    with va.patch(model, op):
        ours = model(x)
    assert torch.equal(model(x), stock)
    mask = torch.ones(35 + prefix, 35 + prefix, dtype=torch.bool)
    mask[prefix:, prefix:] = op.mask(va.TokenLayout((5, 7)))
    for block in model.blocks:
        plain = block.attn.forward
        monkeypatch.setattr(block.attn, "forward", lambda y, attn_mask=None, f=plain, **others: f(y, mask, **others))
    torch.testing.assert_close(ours, model(x), atol=1e-5, rtol=1e-4)
    assert (ours - stock).abs().max() > 1e-2 * stock.abs().max()


@torch.no_grad()
def test_patches_of_images_of_one_size():
    model, x = make()
    with va.patch(model, va.Neighborhood(3)) as patch:
        of_images = model(x)
        torch.testing.assert_close(model(patches(x, 5, 7, 35)), of_images, atol=1e-5, rtol=1e-4)
        assert patch.calls["blocks.0.attn"][0].layout == va.TokenLayout((5, 7), text_before=4)
        assert patch.calls["blocks.0.attn"][0].kind == "operator"


def ragged(x):
    first, second = patches(x[:1], 5, 7, 35), patches(x[1:], 3, 6, 35)
    return {name: torch.cat([first[name], second[name]]) for name in first}


def turned(x):
    batch = patches(x, 5, 7, 35)
    batch["patch_coord"] = batch["patch_coord"].view(2, 5, 7, 2).transpose(1, 2).flatten(1, 2)  # column by column
    return batch


def holed(x):
    batch = patches(x, 5, 7, 35)
    batch["patch_valid"][1, 20] = False
    return batch


def padded(x):
    return patches(x, 5, 7, 40)


@torch.no_grad()
@pytest.mark.parametrize("batch", [ragged, turned, holed, padded])
def test_other_patches_have_no_grid(batch):
    model, x = make()
    batch = batch(x)
    stock = model(batch)
    with (
        va.patch(model, va.Neighborhood(3)),
        pytest.raises(va.PatchError, match=r"'blocks.0.attn' must be called .*patches must be those of whole images"),
    ):
        model(batch)
    with va.patch(model, va.Neighborhood(3), strict=False) as patch:
        assert torch.equal(model(batch), stock)
        assert [call.kind for call in patch.calls["blocks.0.attn"]] == ["dense"]
        model(x)  # and an image after it
        assert [call.kind for call in patch.calls["blocks.0.attn"]] == ["operator"]


@torch.no_grad()
def test_compile():
    torch._dynamo.reset()
    model, x = make()
    with va.patch(model, va.Neighborhood(3)):
        eager = model(x)
        compiled = torch.compile(model, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(x), eager)


def test_training_with_checkpointing_gives_the_same_gradients():
    model, x = make()

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with va.patch(model, va.Neighborhood(3)):
        plain = gradients()
        model.set_grad_checkpointing()
        for a, b in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", NAMES)
def test_verify(kind):
    assert va.verify(make(kind)[0], inputs={"x": torch.randn(1, 3, 80, 112)}).passed
    assert va.verify(make(kind)[0]).passed
