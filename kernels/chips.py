"""GPUs that the kernels are compiled for: compiler target, limits of a multiprocessor, and datasheet rates.

Sources: NVIDIA's CUDA programming guide (technical specifications per compute capability) and H100 datasheet (SXM);
AMD's CDNA 3 architecture guide and MI300X datasheet. Rates are dense, without sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One architecture.

    Attributes:
        name: As `vision_attn.kernels.launch.architecture_of` gives it.
        backend: Triton's name of the maker's backend.
        arch: Triton's name of the architecture.
        warp_size: Threads of a warp.
        registers: 32-bit registers of a multiprocessor; of an AMD SIMD, per lane.
        max_warps: Warps that a multiprocessor (an AMD SIMD) holds at a time.
        max_programs: Programs that a multiprocessor holds at a time.
        shared_per_program: Bytes of shared memory (AMD: LDS) that one program can have.
        shared: Bytes of shared memory of a multiprocessor.
        tensor_flops: Half-precision tensor-core FLOPs per second, 0 where no model is named.
        bandwidth: Bytes per second from main memory, 0 where no model is named.
        model: What the two rates are those of.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    registers: int
    max_warps: int
    max_programs: int
    shared_per_program: int
    shared: int
    tensor_flops: float = 0.0
    bandwidth: float = 0.0
    model: str = ""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm80", "cuda", 80, 32, 65536, 64, 32, 163 * 1024, 164 * 1024),
        Chip("sm89", "cuda", 89, 32, 65536, 48, 24, 99 * 1024, 100 * 1024),
        Chip("sm90", "cuda", 90, 32, 65536, 64, 32, 227 * 1024, 228 * 1024, 989e12, 3.35e12, "H100 SXM"),
        Chip("sm100", "cuda", 100, 32, 65536, 64, 32, 227 * 1024, 228 * 1024),
        Chip("sm120", "cuda", 120, 32, 65536, 48, 24, 99 * 1024, 100 * 1024),
        Chip("gfx942", "hip", "gfx942", 64, 512, 8, 16, 64 * 1024, 64 * 1024, 1307e12, 5.3e12, "MI300X"),
    )
}
# What a continuous check compiles for: the oldest and the newest data-center chips of both makers.
GATE = ("sm80", "sm90", "sm100", "gfx942")
