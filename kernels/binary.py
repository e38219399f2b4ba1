"""What a compiled kernel's binary says of itself: registers, spills, tensor-core instructions, loops.

NVIDIA's binaries are read with the `cuobjdump` and `nvdisasm` that come with Triton, AMD's from Triton's assembly text.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from .control_flow import Jump, natural_loops

# Tensor-core instructions: of Ampere to Ada (HMMA), Hopper (HGMMA), Blackwell (UTC..MMA), AMD (v_mfma).
_TENSOR = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma\w*)\b")
_EXPONENTIAL = re.compile(r"\b(MUFU\.EX2|v_exp_f32\w*)\b")
# Registers kept in memory: NVIDIA's local loads and stores, AMD's scratch ones.
_SPILL = re.compile(r"\b(STL|LDL|scratch_load\w*|scratch_store\w*|buffer_store_dword\w* .*offset:.*Folded Spill)\b")
_SASS_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_GCN_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
# Label that a branch names, None for the program's end; whether the next instruction is never reached from it.
_NamedJump = tuple[str | None, bool]


@dataclass(frozen=True)
class Loop:
    """A loop over keys or queries.

    Attributes:
        instructions: Of its body.
        tensor: Tensor-core instructions of its body.
    """

    instructions: int
    tensor: int


@dataclass(frozen=True)
class Binary:
    """What one compiled kernel needs.

    Attributes:
        registers: Per thread.
        spills: Instructions that move registers to memory or back.
        lanes: Scalars that an AMD kernel keeps in lanes of vector registers for want of scalar ones: no memory traffic.
        tensor: Tensor-core instructions.
        loops: Innermost of the loops that compute exponentials, as every loop over keys or queries does.
    """

    registers: int
    spills: int
    tensor: int
    loops: tuple[Loop, ...]
    lanes: int = 0


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
    return _read(sass.splitlines(), int(registers[1]), _sass_jump)


def read_amdgcn(assembly: str) -> Binary:
    """The binary of an AMD kernel; its registers are the vector ones, accumulators included."""
    binary = _read(assembly.splitlines(), int(_field(assembly, "vgpr_count")), _gcn_jump)
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


def _read(lines: Sequence[str], registers: int, jump_of: Callable[[str], _NamedJump | None]) -> Binary:
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        label = _SASS_LABEL.match(line) or _GCN_LABEL.match(line)
        text = _instruction(line)
        if label:
            labels[label[1]] = len(code)
        elif text:
            code.append(text)
    named = {index: jump for index, text in enumerate(code) if (jump := jump_of(text)) is not None}
    jumps = {index: Jump(labels.get(target) if target else None, always) for index, (target, always) in named.items()}
    return Binary(
        registers,
        sum(bool(_SPILL.search(line)) for line in code),
        sum(bool(_TENSOR.search(line)) for line in code),
        tuple(_attention_loops(code, natural_loops(len(code), jumps))),
    )


def _attention_loops(code: Sequence[str], loops: Sequence[Sequence[int]]) -> Iterator[Loop]:
    """Loops with exponentials but none in a loop of theirs; within them may be loops that wait for memory."""
    attending = [set(body) for body in loops if any(_EXPONENTIAL.search(code[index]) for index in body)]
    for body in attending:
        if not any(other < body for other in attending):
            yield Loop(len(body), sum(bool(_TENSOR.search(code[index])) for index in body))


def _instruction(line: str) -> str:
    """The instruction of a line of either assembly; empty where there is none."""
    sass = _SASS_LINE.match(line)
    if sass:
        return sass[1]
    text = line.split(";")[0].strip()
    return text if line.startswith("\t") and not text.startswith((".", "/*")) else ""


def _sass_jump(text: str) -> _NamedJump | None:
    branch = re.search(r"\b(BRA|CALL)\b.*`\((\.L_x_\d+)\)", text)
    if branch:
        # A call returns; the compiler also leaves loops by calls that do not.
        conditional = branch[1] == "CALL" or text.startswith("@") or re.search(r"\bBRA\S*\s+!?U?P\d", text)
        return branch[2], not conditional
    return (None, True) if re.match(r"(EXIT|RET)\b", text) else None


def _gcn_jump(text: str) -> _NamedJump | None:
    branch = re.match(r"s_(c?)branch\w*\s+(\.LBB\d+_\d+)", text)
    if branch:
        return branch[2], not branch[1]
    return (None, True) if re.match(r"s_(endpgm|setpc)", text) else None


@lru_cache(maxsize=4)
def _tool(name: str) -> str:
    import triton

    path = Path(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    if not path.exists():
        raise RuntimeError(f"aot: {name} must come with triton, {path} does not exist: use triton's own wheel")
    return str(path)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True).stdout
