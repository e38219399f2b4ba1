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

import vision_attn

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
    assert f'version = "{vision_attn.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {vision_attn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


MODULES = sorted(info.name for info in pkgutil.walk_packages(vision_attn.__path__, "vision_attn."))


@pytest.mark.parametrize("name", ["vision_attn", *MODULES])
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=options).failed == 0


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_linked_files_exist(name):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
