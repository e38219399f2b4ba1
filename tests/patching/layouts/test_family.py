"""Finding a model's family, refusing a model, and the page that lists both."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from torch import nn
from zoo import ZOO
from zoo_case import UPSTREAM_WARNINGS

from vision_attn import PatchError, TokenLayout
from vision_attn.patching.layouts import FAMILIES, REFUSED, Family, family_of
from vision_attn.patching.layouts.__main__ import page

pytestmark = UPSTREAM_WARNINGS

ROOT = Path(__file__).parents[3]
SERVED = [cls for family in FAMILIES for cls in family.classes]


def model_of_class(name: str, *bases: type) -> nn.Module:
    """An empty model whose class has this name."""
    return type(name, bases or (nn.Module,), {})()


def test_a_class_belongs_to_one_family_or_is_refused() -> None:
    assert len(set(SERVED)) == len(SERVED)
    assert not set(SERVED) & set(REFUSED)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("package", ["transformers", "unets", "controlnets"])
def test_every_denoiser_of_diffusers_is_served_or_refused(package: str) -> None:
    parent = importlib.import_module(f"diffusers.models.{package}")
    modules = [
        importlib.import_module(f"{parent.__name__}.{info.name}") for info in pkgutil.iter_modules(parent.__path__)
    ]
    found = {
        name
        for module in modules
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin) and cls.__module__ == module.__name__
    }
    assert found
    assert found <= {*SERVED, *REFUSED}


def test_every_served_class_is_in_the_zoo() -> None:
    built = {type(case.build()).__name__ for case in ZOO}
    assert set(SERVED) <= built


def test_a_subclass_is_served_like_its_parent() -> None:
    parent = type("FluxTransformer2DModel", (nn.Module,), {})
    assert family_of(model_of_class("MyFlux", parent)).name == "flux"


def test_a_refused_class_is_named_with_the_reason() -> None:
    with pytest.raises(
        PatchError, match=r"patch: target must .*got SanaTransformer2DModel: its self-attention is linear"
    ):
        family_of(model_of_class("SanaTransformer2DModel"))
    parent = type("PriorTransformer", (nn.Module,), {})
    with pytest.raises(PatchError, match=r"got PriorTransformer: .* no token grid"):
        family_of(model_of_class("MyPrior", parent))


def test_an_unknown_class_is_told_how_to_pass_a_grid() -> None:
    with pytest.raises(PatchError, match=r"patch: target must .*got Mystery: pass grid=\(Y, X\)"):
        family_of(model_of_class("Mystery"))


def test_layout_of_a_call() -> None:
    family = Family("test", ("Test",), lambda model, call: None, skip=(("*.text", "text"),), image_only=("*.alone",))
    layout = TokenLayout((3, 5), text_before=2, text_after=4)
    assert family.layout_for("blocks.0.attn", layout, 21) is layout
    assert family.layout_for("blocks.0.alone", layout, 15) == TokenLayout((3, 5))
    assert family.skip_reason("blocks.0.text") == "text"
    assert family.skip_reason("blocks.0.attn") is None


def test_layout_of_a_call_with_an_open_end() -> None:
    family = Family("test", ("Test",), lambda model, call: None, image_only=("*.alone",), open_end=True)
    layout = TokenLayout((3, 5), text_before=2, text_after=4)
    assert family.layout_for("blocks.0.attn", layout, 26) == TokenLayout((3, 5), text_before=2, text_after=9)
    assert family.layout_for("blocks.0.alone", layout, 18) == TokenLayout((3, 5), text_after=3)
    assert family.layout_for("blocks.0.attn", layout, 9) == layout


def test_the_models_page_is_what_the_command_prints() -> None:
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == page(), (
        "run python -m vision_attn.patching.layouts > docs/models.md"
    )


def test_layouts_do_not_import_diffusers() -> None:
    code = "import sys, vision_attn.patching.layouts; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
