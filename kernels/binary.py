"""What a compiled kernel's binary says of itself: registers, spills, tensor-core instructions, loops.

NVIDIA's binaries are read with the `cuobjdump` and `nvdisasm` that come with Triton, AMD's from Triton's assembly text.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

# Tensor-core instructions: of Ampere to Ada (HMMA), Hopper (HGMMA), Blackwell (UTC..MMA), AMD (v_mfma).
_TENSOR = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma\w*)\b")
_EXPONENTIAL = re.compile(r"\b(MUFU\.EX2|v_exp_f32\w*)\b")
# Registers kept in memory: NVIDIA's local loads and stores, AMD's scratch ones.
_SPILL = re.compile(r"\b(STL|LDL|scratch_load\w*|scratch_store\w*|buffer_store_dword\w* .*offset:.*Folded Spill)\b")
_SASS_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_GCN_LABEL = re.compile(r"^(\.LBB\d+_\d+):")


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Attributes:
        instructions: Of its body.
        tensor: Tensor-core instructions of its body.
        attends: Whether it computes exponentials, as every loop over keys or queries does.
    """

    instructions: int
    tensor: int
    attends: bool


@dataclass(frozen=True)
class Binary:
    """What one compiled kernel needs.

    Attributes:
        registers: Per thread.
        spills: Instructions that move registers to memory or back.
        lanes: Scalars that an AMD kernel keeps in lanes of vector registers for want of scalar ones: no memory traffic.
        tensor: Tensor-core instructions.
        loops: Innermost loops.
    """

    registers: int
    spills: int
    tensor: int
    loops: tuple[Loop, ...]
    lanes: int = 0

    @property
    def attention_loops(self) -> tuple[Loop, ...]:
        """Innermost loops that compute exponentials."""
        return tuple(loop for loop in self.loops if loop.attends)


def read_cubin(cubin: bytes) -> Binary:
    """The binary of an NVIDIA kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
        sass = _run("nvdisasm", "-c", str(path))
    registers = re.search(r"\bREG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"read_cubin: cuobjdump named no registers: {usage[:200]!r}")
    return _read(sass.splitlines(), int(registers[1]), _sass_branch)


def read_amdgcn(assembly: str) -> Binary:
    """The binary of an AMD kernel; its registers are the vector ones, accumulators included."""
    binary = _read(assembly.splitlines(), int(_field(assembly, "vgpr_count")), _gcn_branch)
    # The compiler spills scalars to lanes first; it says by the size of the private segment if any went to memory.
    in_memory = int(_field(assembly, "private_segment_fixed_size")) > 0
    scalars = int(_field(assembly, "sgpr_spill_count"))
    spills = max(binary.spills, int(_field(assembly, "vgpr_spill_count")), scalars if in_memory else 0)
    return replace(binary, spills=spills, lanes=0 if in_memory else scalars)


def _field(assembly: str, name: str) -> str:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    if found is None:
        raise RuntimeError(f"read_amdgcn: the assembly has no field {name}")
    return found[1]


def _read(lines: list[str], registers: int, branch_of) -> Binary:  # type: ignore[no-untyped-def]
    code: list[str] = []
    labels: dict[str, int] = {}
    backward: list[tuple[int, int]] = []
    for line in lines:
        label = _SASS_LABEL.match(line) or _GCN_LABEL.match(line)
        if label:
            labels[label[1]] = len(code)
            continue
        instruction, target = branch_of(line)
        if instruction is None:
            continue
        if target in labels:
            backward.append((labels[target], len(code) + 1))
        code.append(instruction)
    # A branch to itself behind the end is padding.
    loops = [(start, stop) for start, stop in backward if stop - start > 1]
    innermost = [
        (start, stop)
        for start, stop in loops
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in loops)
    ]
    return Binary(
        registers,
        sum(bool(_SPILL.search(line)) for line in code),
        sum(bool(_TENSOR.search(line)) for line in code),
        tuple(_loop(code[start:stop]) for start, stop in innermost),
    )


def _loop(body: list[str]) -> Loop:
    tensor = sum(bool(_TENSOR.search(line)) for line in body)
    return Loop(len(body), tensor, any(_EXPONENTIAL.search(line) for line in body))


def _sass_branch(line: str) -> tuple[str | None, str | None]:
    match = _SASS_LINE.match(line)
    if match is None:
        return None, None
    target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", match[1])
    return match[1], target[1] if target else None


def _gcn_branch(line: str) -> tuple[str | None, str | None]:
    text = line.split(";")[0].strip()
    if not line.startswith("\t") or not text or text.startswith("."):
        return None, None
    target = re.match(r"s_c?branch\w*\s+(\.LBB\d+_\d+)", text)
    return text, target[1] if target else None


@lru_cache(maxsize=4)
def _tool(name: str) -> str:
    import triton

    path = Path(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    if not path.exists():
        raise RuntimeError(f"aot: {name} must come with triton, {path} does not exist: use triton's own wheel")
    return str(path)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True).stdout
