"""What a user gets from the wheel, and that the documentation's examples run."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import vision_attn as va
from vision_attn.operators.registry import unregister_operator

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """Files of a wheel built from this checkout, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    # Built from a copy: setuptools leaves build/ and *.egg-info/ behind in the source folder.
    subprocess.run(["git", "-C", ROOT, "checkout-index", "--all", f"--prefix={folder}/source/"], check=True)
    subprocess.run([*command, "--wheel-dir", folder, folder / "source"], check=True, timeout=240)
    (wheel,) = folder.glob("vision_attn-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {info.filename for info in archive.infolist() if info.file_size or info.filename.endswith("py.typed")}


@pytest.mark.slow
def test_the_wheel_holds_the_linked_folders_as_real_files(wheel_names):
    for name in ("__init__.py", "py.typed", "cli.py", "operators/clear.py", "pipelines/loading.py", "kernels/reach.py"):
        assert f"vision_attn/{name}" in wheel_names


@pytest.mark.slow
def test_the_wheel_holds_all_assets(wheel_names):
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "assets"], capture_output=True, text=True, check=True)
    assets = [name for name in listed.stdout.splitlines() if (ROOT / name).stat().st_size]
    assert "assets/README.md" in assets
    assert {f"vision_attn/{name}" for name in assets} <= wheel_names


@pytest.mark.slow
def test_the_wheel_holds_nothing_else(wheel_names):
    assert {name.partition("/")[0] for name in wheel_names} == {"vision_attn", "vision_attn-0.1.0.dist-info"}


def test_the_version_is_the_same_everywhere():
    assert f'version = "{va.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {va.__version__}" in (ROOT / "CHANGELOG.md").read_text()


MODULES = sorted(info.name for info in pkgutil.walk_packages(va.__path__, "vision_attn."))


@pytest.mark.parametrize("name", ["vision_attn", *MODULES])
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=options).failed == 0


def test_the_examples_of_the_readme_run(tiny_flux_folder, monkeypatch, capsys):
    from diffusers import DiffusionPipeline, FluxPipeline

    class SmallPictures(FluxPipeline):
        def __call__(self, prompt):
            sizes = {"height": 32, "width": 48, "num_inference_steps": 3, "max_sequence_length": 24}
            return super().__call__(prompt, **sizes)

    pipe = SmallPictures.from_pretrained(tiny_flux_folder)
    pipe.set_progress_bar_config(disable=True)
    stock = DiffusionPipeline.from_pretrained  # loads the embedded models; a Hub id alone stands for the tiny one
    monkeypatch.setattr(
        DiffusionPipeline, "from_pretrained", lambda name, **options: stock(name, **options) if options else pipe
    )
    before = list(va.operators())
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    namespace = {"__name__": __name__}  # a dataclass looks its module up by name
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"README.md, example {number}", "exec"), namespace)
    finally:
        for name in set(va.operators()) - set(before):
            unregister_operator(name)
    assert list(va.operators()) == before
    printed = capsys.readouterr().out
    assert "neighborhood(kernel_size=13)" in printed
    assert "50 of 512 at worst" in printed
    assert namespace["output"].shape == (1, 77 + 48 * 64, 8, 32)
    assert namespace["logits"].shape == (1, 1000)
    assert namespace["image"].size == (48, 32)
    assert namespace["picture"].size == namespace["drawn"].images[0].size == (64, 64)
    assert len(namespace["drawn"].losses) == 10


def test_the_readmes_own_operator_is_what_it_says(tiny_flux_folder):
    source = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(from dataclasses.*?)\n\nwith ", source, flags=re.MULTILINE | re.DOTALL)
    namespace = {"__name__": __name__, "va": va, "torch": torch}
    try:
        exec(block, namespace)
        layout = va.TokenLayout((3, 4), text_before=2, text_after=1)
        query, key, value = torch.randn(3, 2, layout.tokens, 2, 8)
        output = namespace["Rows"]()(query, key, value, layout)
    finally:
        unregister_operator("rows")
    # 2 text tokens, rows of 4 image tokens, 1 text token.
    seen = torch.block_diag(*[torch.ones(size, size) for size in (2, 4, 4, 4, 1)]).bool()
    seen[[0, 1, 14]] = seen[:, [0, 1, 14]] = True
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key).div(8**0.5).masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(output, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_linked_files_exist(name):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
