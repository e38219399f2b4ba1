"""Lays the kernels out as a repository that Hugging Face's `kernels` package can load, for any device and torch.

    python -m vision_attn.kernels.hub FOLDER

    FOLDER/build/torch-noarch/       the package itself: modules, launch configurations, metadata.json
    FOLDER/build/torch-noarch/vision_attn_kernels/__init__.py       for older versions of `kernels`, the same names
    FOLDER/README.md                 the card

Kernels import each other relatively and name their custom ops after the package they stand in, so that two versions can
be loaded into one process. Source: the "Kernel requirements" page of `kernels`' documentation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

NAME = "vision_attn_kernels"
VARIANT = "torch-noarch"
# Compiling ahead of time and this layout are for those who have the sources.
_LEFT_OUT = ("aot.py", "binary.py", "chips.py", "hub.py")

_INIT = '''"""Windowed, block-sparse and agent attention as portable Triton kernels; see the functions' docstrings."""

from .biased import agent, biased
from .block_sparse import block_sparse
from .windowed import windowed

__all__ = ["agent", "biased", "block_sparse", "windowed"]
'''
_COMPATIBLE = '''"""The same names for versions of `kernels` that look for a package of this name."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).resolve().parents[1] / "__init__.py"
_name = f"{__name__}_flat"
_spec = importlib.util.spec_from_file_location(_name, _path, submodule_search_locations=[str(_path.parent)])
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
__all__ = _module.__all__
globals().update({name: getattr(_module, name) for name in __all__})
'''
_CARD = """---
license: apache-2.0
tags:
- kernels
---

# vision_attn_kernels

Attention over windows of a token grid (Generalized Neighborhood Attention, CLEAR's circle), over listed blocks of keys,
and through agents, for CUDA and ROCm GPUs: Triton only, nothing to build. Forward and backward without atomics, with
log-sum-exp, grouped heads, strided inputs and `torch.compile`.

```python
from kernels import get_kernel

attention = get_kernel("<publisher>/vision_attn_kernels", version=1)
output, lse = attention.windowed(
    query, key, value, None, None, None, None, [64, 64], [13, 13], [1, 1], [1, 1], [False, False], 0, 0, 64**-0.5
)
```
"""


def lay_out(folder: Path) -> Path:
    """Write the repository's files; returns the package's folder.

    Raises:
        FileExistsError: the folder holds something else.
    """
    target = folder / "build" / VARIANT
    if folder.exists() and any(folder.iterdir()) and not target.exists():
        raise FileExistsError(f"hub: folder must be empty or an earlier layout, got {str(folder)!r}")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    sources = Path(__file__).parent
    for path in sorted((*sources.glob("*.py"), *sources.glob("*.json"))):
        if path.name not in _LEFT_OUT:
            shutil.copyfile(path, target / path.name)
    (target / "__init__.py").write_text(_INIT, encoding="utf-8")
    (target / "metadata.json").write_text(json.dumps({"version": 1, "python-depends": []}) + "\n", encoding="utf-8")
    (target / NAME).mkdir()
    (target / NAME / "__init__.py").write_text(_COMPATIBLE, encoding="utf-8")
    (folder / "README.md").write_text(_CARD, encoding="utf-8")
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vision_attn.kernels.hub", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to lay it out; made if need be")
    options = parser.parse_args(arguments)
    try:
        print(f"The kernel repository: {lay_out(options.folder)}")
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
