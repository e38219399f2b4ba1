"""Who may import whom, over every file by its syntax tree, and how light `import vision_attn` is."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vision_attn"

# Lower layers first; a module imports from its own layer or below.
LAYERS = [
    {"kernels"},
    {"backends"},
    {"operators"},
    {"patching", "drawing"},
    {"guidance", "pipelines", "training", "backbones", "shapes", "parallel", "simulator", "planner"},
    {"benchmark"},
    {"app", "cli", "command_bench", "command_input", "command_process"},
]
# The root of everything: no layer, imports nothing of the package.
FOUNDATION = {"layout", "errors"}
ALLOWED_IN = {
    "diffusers": {"patching", "pipelines", "backbones", "training", "shapes"},
    "timm": {"patching", "pipelines", "backbones", "training", "shapes"},
    "gradio": {"app"},
    "triton": {"kernels", "backends"},
}


def area(path: Path) -> str:
    """First part below the package: `operators` for vision_attn/operators/clear.py, `layout` for layout.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer(name: str, unknown: int) -> int:
    return next((index for index, names in enumerate(LAYERS) if name in names), unknown)


def python_files(root: Path) -> list[Path]:
    # Path.rglob does not follow symlinked folders, and four of ours are.
    files = [path for path in root.iterdir() if path.suffix == ".py"]
    folders = [path for path in root.iterdir() if path.is_dir() and path.name not in ("assets", "__pycache__")]
    return sorted(files) + [file for folder in sorted(folders) for file in python_files(folder)]


def imported(path: Path, package: str) -> list[str]:
    """Absolute dotted names that a file imports anywhere, functions included; `package` resolves relative imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def violations(path: Path) -> list[str]:
    here = area(path)
    package = ".".join(("vision_attn", *path.relative_to(PACKAGE).parts[:-1]))
    found = []
    for name in imported(path, package):
        top, _, rest = name.partition(".")
        if top in ALLOWED_IN and here not in ALLOWED_IN[top]:
            found.append(f"{path}: imports {top}, which only {sorted(ALLOWED_IN[top])} may")
        there = rest.partition(".")[0]
        if top == "vision_attn" and here == "kernels" and there != "kernels":
            found.append(f"{path}: kernels import the standard library, torch, triton and each other only, not {name}")
        elif top == "vision_attn" and here in FOUNDATION and there not in FOUNDATION:
            found.append(f"{path}: {here} stands below everything, but imports {name}")
        elif top == "vision_attn" and layer(there, unknown=-1) > layer(here, unknown=len(LAYERS)):
            found.append(f"{path}: imports upward, {name}")
    return found


FILES = python_files(PACKAGE)


def test_the_walk_sees_the_symlinked_folders():
    areas = {area(path) for path in FILES}
    assert {"operators", "backends", "patching", "pipelines", "benchmark", "layout", "cli"} <= areas


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward_only(path):
    assert violations(path) == []


def test_every_area_has_a_place_in_the_order():
    placed = set().union(*LAYERS) | FOUNDATION | {"__init__", "__main__"}
    assert {area(path) for path in FILES} <= placed


@pytest.mark.parametrize(
    ("where", "line", "problem"),
    [
        ("operators/clear.py", "from vision_attn.patching import patch", "upward"),
        ("operators/clear.py", "from ..patching import patch", "upward"),
        ("operators/clear.py", "from .. import patching", "upward"),
        ("backends/tiled.py", "def f():\n    import vision_attn.operators.clear", "upward"),
        ("operators/clear.py", "import diffusers.models", "imports diffusers"),
        ("benchmark/compare.py", "from timm import create_model", "imports timm"),
        ("pipelines/loading.py", "import gradio as gr", "imports gradio"),
        ("kernels/window.py", "from vision_attn.errors import PatchError", "standard library"),
        ("layout.py", "from vision_attn.operators import parse", "below everything"),
    ],
)
def test_the_rules_catch_a_violation(tmp_path, monkeypatch, where, line, problem):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "vision_attn")
    path = tmp_path / "vision_attn" / where
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    found = violations(path)
    assert len(found) == 1
    assert problem in found[0]


def test_kernels_folder_is_no_regular_package():
    # From the repository root it would shadow Hugging Face's `kernels`; so would tests/kernels.
    assert not (PACKAGE.parent / "kernels" / "__init__.py").exists()
    assert list((PACKAGE.parent / "tests").rglob("__init__.py")) == []


LIGHT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import vision_attn
seconds = time.process_time() - start
modules = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"seconds": seconds, "modules": modules}))
"""


def test_import_is_light():
    answer = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(answer.stdout)
    heavy = {"diffusers", "timm", "triton", "gradio", "transformers", "accelerate", "safetensors", "PIL", "typer"}
    assert heavy.isdisjoint(found["modules"])
    # Processor time, not wall time: a busy machine does not make an import heavy.
    assert found["seconds"] < 1
