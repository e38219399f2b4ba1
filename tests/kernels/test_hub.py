"""The kernels as a repository of their own: laid out, it imports without this package and computes the same."""

import subprocess
import sys

import pytest

from vision_attn.kernels import hub

PROGRAM = """
import importlib.util, sys
import torch

spec = importlib.util.spec_from_file_location("loaded_kernels", sys.argv[1] + "/__init__.py")
package = importlib.util.module_from_spec(spec)
sys.modules["loaded_kernels"] = package
spec.loader.exec_module(package)
x = torch.randn(1, 20, 2, 16, generator=torch.Generator().manual_seed(0))
window = ([4, 5], [3, 3], [1, 1], [1, 1], [False, False], 0)
output, lse = package.windowed(x, x, x, None, None, None, None, *window, 0, 0.25)
position = torch.cartesian_prod(torch.arange(4), torch.arange(5))
start = (position - 1).clamp(min=0).minimum(torch.tensor([1, 2]))
seen = ((position[None] >= start[:, None]) & (position[None] < start[:, None] + 3)).all(-1)
q = x.transpose(1, 2).double()
truth = (q @ q.transpose(-1, -2) * 0.25).masked_fill(~seen, float("-inf")).softmax(-1) @ q
torch.testing.assert_close(output.double(), truth.transpose(1, 2), atol=1e-5, rtol=1e-5)
assert package.agent(x, x, x, x[:, :3], None, None, 0.25, 0.25).shape == x.shape
assert package.block_sparse(x, x, x, torch.zeros(1, 1, 2, 1, dtype=torch.int32), 10, 10, 0.25)[0].shape == x.shape
assert not any(name.split(".")[0] == "vision_attn" for name in sys.modules)

# The name that older versions look for, and another copy in the same process.
spec = importlib.util.spec_from_file_location("older", sys.argv[1] + "/vision_attn_kernels/__init__.py")
older = importlib.util.module_from_spec(spec)
spec.loader.exec_module(older)
again = older.windowed(x, x, x, None, None, None, None, *window, 0, 0.25)[0]
assert older.windowed is not package.windowed and torch.equal(again, output)
print("imported on its own")
"""


def test_the_laid_out_tree_imports_and_computes_on_its_own(tmp_path):
    target = hub.lay_out(tmp_path / "repository")
    assert target == tmp_path / "repository" / "build" / "torch-noarch"
    assert hub.lay_out(tmp_path / "repository") == target  # again, over the first
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(target)], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert answer.returncode == 0, answer.stderr
    assert "imported on its own" in answer.stdout


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="folder must be empty or an earlier layout"):
        hub.lay_out(tmp_path)
    assert hub.main([str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert hub.main([str(tmp_path / "new")]) == 0
    assert "The kernel repository" in capsys.readouterr().out
