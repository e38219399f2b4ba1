"""Compiles every kernel ahead of time for GPUs that need not be here, reads the binaries and judges them.

    python -m vision_attn.kernels.aot [--chips sm80 sm90 ... | --gate] [--json]

Every row of `launch_configs.json` is compiled, windows for a 3-D box and a 2-D circle with text and extra keys. One
passes if no register is spilled, its shared memory fits the chip, and every loop over keys or queries has tensor-core
instructions. Occupancy and roofline are predictions from the binary and from datasheets: nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from .binary import Binary, read_amdgcn, read_cubin
from .chips import CHIPS, GATE, Chip
from .launch import LaunchConfig, config_of, rows_for, tables, tile_shape

# Module and function of each kernel of the table.
KERNELS = {
    "windowed_forward": ("windowed_forward", "_windowed_forward_kernel"),
    "windowed_backward_dq": ("windowed_backward", "_windowed_backward_dq_kernel"),
    "windowed_backward_dkv": ("windowed_backward", "_windowed_backward_dkv_kernel"),
    "block_sparse_forward": ("block_sparse_kernels", "_block_sparse_forward_kernel"),
    "block_sparse_backward_dq": ("block_sparse_kernels", "_block_sparse_backward_dq_kernel"),
    "block_sparse_backward_dkv": ("block_sparse_kernels", "_block_sparse_backward_dkv_kernel"),
    "biased_forward": ("biased_kernels", "_biased_forward_kernel"),
    "biased_backward_dq": ("biased_kernels", "_biased_backward_dq_kernel"),
    "biased_backward_dkv": ("biased_kernels", "_biased_backward_dkv_kernel"),
}
# A grid that every tile divides, for shapes and rates; the binary does not depend on it.
_BOX_GRID, _CIRCLE_GRID = (32, 64, 64), (1, 128, 128)


@dataclass(frozen=True)
class Launch:
    """One kernel with one launch for one chip."""

    chip: str
    kernel: str
    window: str
    dtype: str
    head_dim: int
    config: LaunchConfig

    @property
    def tiles(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Query and key tile."""
        grid = _CIRCLE_GRID if self.window == "circle" else _BOX_GRID
        return tile_shape(self.config.q_tokens, grid), tile_shape(self.config.kv_tokens, grid)


@dataclass(frozen=True)
class Report:
    """What became of a launch.

    Attributes:
        launch: What was compiled.
        binary: What the compiler made.
        shared: Bytes of shared memory per program.
        occupancy: Predicted share of a multiprocessor's warps that are resident.
        flops: Of one step of the inner loop.
        bytes: That this step reads from memory or cache.
        bound: What the chip's datasheet says limits the loop where data come from main memory, if a model is named.
        peak: Predicted share of the chip's tensor-core rate under that limit.
        faults: Why the launch does not pass; empty where it does.
    """

    launch: Launch
    binary: Binary
    shared: int
    occupancy: float
    flops: int
    bytes: int
    bound: str
    peak: float
    faults: tuple[str, ...]

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        loops = [dataclasses.asdict(loop) for loop in self.binary.loops]
        config = dataclasses.asdict(self.launch.config)
        names = ("chip", "kernel", "window", "dtype", "head_dim")
        return (
            {name: getattr(self.launch, name) for name in names}
            | config
            | {
                "registers": self.binary.registers,
                "spills": self.binary.spills,
                "scalars_in_lanes": self.binary.lanes,
                "shared_bytes": self.shared,
                "tensor_instructions": self.binary.tensor,
                "attention_loops": loops,
                "predicted_occupancy": self.occupancy,
                "step_flops": self.flops,
                "step_bytes": self.bytes,
                "flops_per_byte": self.intensity,
                "predicted_bound": self.bound,
                "predicted_share_of_peak": self.peak,
                "faults": list(self.faults),
            }
        )


def launches(chips: Sequence[str], kernels: Sequence[str] = tuple(KERNELS)) -> Iterator[Launch]:
    """Every launch of the table for these chips."""
    for chip in chips:
        for kernel in kernels:
            for row in rows_for(tables()[-1][kernel], chip):
                config = config_of(row)
                for window in ("box", "circle") if kernel.startswith("windowed") else ("",):
                    dtype = "fp32" if row["bits"] == 32 else "bf16"
                    yield Launch(chip, kernel, window, dtype, row["head_dim"], config)


def compile_launch(launch: Launch) -> Report:
    """Compile one launch and read its binary.

    Raises:
        RuntimeError: Triton is set to interpret kernels.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _function(launch.kernel)
    if not hasattr(kernel, "arg_names") or triton.knobs.runtime.interpret:
        raise RuntimeError("aot: TRITON_INTERPRET must not be set: interpreted kernels are not compiled")
    chip = CHIPS[launch.chip]
    constants = _constants(launch, chip)
    signature = {name: _type(name, launch, constants) for name in kernel.arg_names}
    options: dict[str, int] = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    if launch.config.registers is not None and chip.backend == "cuda":
        options["maxnreg"] = launch.config.registers
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=_aligned(kernel.arg_names, signature)),
        target=GPUTarget(chip.backend, chip.arch, chip.warp_size),
        options=options,
    )
    binary = read_cubin(compiled.asm["cubin"]) if chip.backend == "cuda" else read_amdgcn(compiled.asm["amdgcn"])
    return judge(launch, binary, compiled.metadata.shared)


def judge(launch: Launch, binary: Binary, shared: int) -> Report:
    """Faults of a binary, and what to expect of it."""
    chip = CHIPS[launch.chip]
    loops = binary.loops
    faults = []
    if binary.spills:
        faults.append(f"{binary.spills} spills")
    if shared > chip.shared_per_program:
        faults.append(f"{shared} bytes of shared memory, {chip.shared_per_program} is the limit")
    if not loops:
        faults.append("no attention loop found")
    if any(loop.tensor == 0 for loop in loops):
        faults.append("an attention loop without tensor-core instructions")
    occupancy = _occupancy(launch, chip, binary, shared)
    return Report(launch, binary, shared, occupancy, *_roofline(launch, chip), tuple(faults))


def _occupancy(launch: Launch, chip: Chip, binary: Binary, shared: int) -> float:
    warps = launch.config.warps
    if chip.backend == "cuda":
        per_warp = -(-binary.registers * chip.warp_size // 256) * 256  # allocated in units of 256
        programs = min(
            chip.registers // (per_warp * warps), chip.max_warps // warps, chip.max_programs,
            chip.shared // max(shared + 1024, 1),  # one KiB per program is the system's
        )  # fmt: skip
        return programs * warps / chip.max_warps
    # A CDNA compute unit has four SIMDs; registers are per lane, in units of 8, accumulators among them.
    waves = min(chip.registers // (-(-binary.registers // 8) * 8), chip.max_warps)
    programs = min(4 * waves // warps, chip.max_programs, chip.shared // max(shared, 1))
    return programs * warps / (4 * chip.max_warps)


def _roofline(launch: Launch, chip: Chip) -> tuple[int, int, str, float]:
    """FLOPs and bytes of one step of the inner loop, what limits it, and the share of the peak that is left."""
    config, width = launch.config, launch.head_dim
    size = 4 if launch.dtype == "fp32" else 2
    products = {"forward": 2, "dq": 3, "dkv": 4}[launch.kernel.rsplit("_", 1)[1]]
    flops = 2 * products * config.q_tokens * config.kv_tokens * width
    walked = config.q_tokens if launch.kernel.endswith("dkv") else config.kv_tokens
    moved = 2 * walked * width * size
    if not chip.tensor_flops or launch.dtype == "fp32":
        return flops, moved, "", 0.0
    peak = min(1.0, flops / moved * chip.bandwidth / chip.tensor_flops)
    return flops, moved, "tensor cores" if peak == 1.0 else "memory", peak


def _function(kernel: str) -> Any:
    module, name = KERNELS[kernel]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def _constants(launch: Launch, chip: Chip) -> dict[str, Any]:
    import triton

    q_tile, kv_tile = launch.tiles
    constants: dict[str, Any] = {
        "WINDOWED": True,
        "BALL": launch.window == "circle",
        "CAUSAL": (False, False, False),
        "AXES": 2 if launch.window == "circle" else 3,
        "HAS_BIAS": launch.kernel.startswith("biased"),
        "HAS_EXTRA": True,
        "HAS_EXTRA_BIAS": False,
        "BIAS_GRAD": True,
        "OFFSET": triton.language.int32,
        "COUNT": False,
        "ALIGNED": False,
        "Q_TILE": q_tile,
        "KV_TILE": kv_tile,
        "BLOCK_Q": launch.config.q_tokens,
        "BLOCK_K": launch.config.kv_tokens,
        "D": launch.head_dim,
        "DV": launch.head_dim,
        "BLOCK_D": launch.head_dim,
        "BLOCK_DV": launch.head_dim,
        "PRECISION": "tf32x3" if launch.dtype == "fp32" and chip.backend == "cuda" else "ieee",
    }
    return {name: value for name, value in constants.items() if name in _function(launch.kernel).arg_names}


_INTEGERS = ("counter_ptr", "index_ptr", "count_ptr", "order_ptr", "begin_ptr")
_SINGLE = ("lse_ptr", "delta_ptr", "grad_bias_ptr")
_STRIDES = {"bias_strides": 4, "grad_bias_strides": 4, "index_strides": 4, "order_strides": 2, "begin_strides": 2}


def _type(name: str, launch: Launch, constants: dict[str, Any]) -> Any:
    """Triton's type of an argument, by the kernels' naming."""
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*i32" if name in _INTEGERS else "*fp32" if name in _SINGLE else f"*{launch.dtype}"
    if name.endswith("_strides"):
        # What a split loop writes has one stride more.
        written = name in ("out_strides", "grad_q_strides", "grad_k_strides", "grad_v_strides")
        split = launch.kernel.startswith("biased") and (
            written or (name, launch.kernel) == ("lse_strides", "biased_forward")
        )
        return ("i32",) * (4 if split else _STRIDES.get(name, 3))
    if name in ("grid", "window", "stride", "dilation"):
        return ("i32", "i32", "i32")
    return "fp32" if name == "scale" else "i32"


def _aligned(names: Sequence[str], signature: dict[str, Any]) -> dict[tuple[int, ...], Any]:
    """Pointers and strides are multiples of 16, as those of any tensor with a usual head dim."""
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(names):
        if name.endswith("_ptr"):
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.endswith("_strides") and name.startswith(("q_", "k_", "v_", "extra_", "out_", "grad_")):
            attributes |= {(index, part): [["tt.divisibility", 16]] for part in range(len(signature[name]))}
    return attributes


def compile_all(chosen: Iterable[Launch], processes: int | None = None) -> Iterator[Report]:
    """Compile launches in several processes; reports come in order."""
    workers = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_launch, list(chosen))


_HEAD = (
    "chip", "kernel", "window", "dtype", "D", "tile", "warps", "stages", "regs", "spills", "lanes", "shared", "tensor",
    "loops", "occup.", "MFLOP", "KiB", "FLOP/B", "predicted", "gate",
)  # fmt: skip
_WIDTHS = (-7, -25, -7, -5, 4, 9, 5, 6, 5, 6, 5, 7, 6, 14, 6, 6, 4, 6, -17, 0)


def _line(*cells: Any) -> str:
    return " ".join(
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}" if width else str(cell)
        for cell, width in zip(map(str, cells), _WIDTHS, strict=True)
    )


def table(reports: Sequence[Report]) -> str:
    """One line per launch."""
    lines = [_line(*_HEAD)]
    for report in reports:
        launch, config, binary = report.launch, report.launch.config, report.binary
        loops = "/".join(str(loop.instructions) for loop in binary.loops)
        bound = f"{report.bound} {report.peak:.0%}" if report.bound else ""
        tile, gate = f"{config.q_tokens}x{config.kv_tokens}", "; ".join(report.faults) or "ok"
        shape = (launch.chip, launch.kernel, launch.window, launch.dtype, launch.head_dim, tile)
        held = (binary.registers, binary.spills, binary.lanes, report.shared)
        needs = (config.warps, config.stages, *held, binary.tensor, loops)
        step = (f"{report.flops / 1e6:.1f}", f"{report.bytes / 1024:.0f}", f"{report.intensity:.0f}")
        lines.append(_line(*shape, *needs, f"{report.occupancy:.0%}", *step, bound, gate))
    models = ", ".join(f"{chip.name} {chip.model}" for chip in CHIPS.values() if chip.model)
    lines.append(
        "MFLOP and KiB are those of a step of the inner loop, FLOP/B their ratio.\n"
        "occup. and predicted are computed, not measured: resident warps, and the share of the datasheet's tensor-core "
        f"rate if every tile came from main memory ({models})"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a launch does not pass."""
    parser = argparse.ArgumentParser(prog="python -m vision_attn.kernels.aot", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--chips", nargs="+", choices=list(CHIPS), default=list(CHIPS), help="default: all")
    which.add_argument("--gate", action="store_true", help=f"those of continuous integration: {', '.join(GATE)}")
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS), help="default: all")
    parser.add_argument("--processes", type=int, help="compilers at a time; default: one per core")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET must not be set: interpreted kernels are not compiled")
    chosen = list(launches(GATE if options.gate else options.chips, options.kernels))
    reports = []
    for report in compile_all(chosen, options.processes):
        reports.append(report)
        if sys.stderr.isatty():
            end = "\n" if len(reports) == len(chosen) else ""
            print(f"\r{len(reports)} of {len(chosen)} compiled", end=end, file=sys.stderr, flush=True)
    print(json.dumps([report.to_dict() for report in reports], indent=2) if options.json else table(reports))
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(main())
