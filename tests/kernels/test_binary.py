"""Reading compiled kernels, on short assembly texts written for the purpose."""

import dataclasses

import pytest

from vision_attn.kernels import aot, binary
from vision_attn.kernels.binary import Binary, Loop
from vision_attn.kernels.launch import LaunchConfig

SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, RZ ;
.L_x_1:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R14, R4 ;
        /*0060*/                   MUFU.EX2 R9, R4 ;
        /*0070*/                   STL [R1+0x4], R9 ;
.L_x_5:
        /*0074*/                   SYNCS.PHASECHK.TRANS64 P3, [R8], R9 ;
        /*0078*/              @!P3 BRA `(.L_x_5) ;
        /*0080*/              @!P0 BRA `(.L_x_2) ;
        /*0090*/                   LDL R9, [R1+0x4] ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   FADD R9, R9, R9 ;
        /*00c0*/               @P2 BRA `(.L_x_3) ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4) ;
"""
GCN = """
\tv_mov_b32_e32 v1, 0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
\tv_exp_f32_e32 v3, v4
\ts_cbranch_scc1 .LBB0_1
.LBB0_2:
\ts_endpgm
    .private_segment_fixed_size: {segment}
    .sgpr_spill_count: {scalars}
    .vgpr_count:     72
    .vgpr_spill_count: {vectors}
"""


# The compiler leaves a loop by a call that does not return.
LEFT_BY_A_CALL = """
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/                   MUFU.EX2 R9, R4 ;
        /*0030*/               @P4 CALL.REL.NOINC `(.L_x_2) ;
        /*0040*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   EXIT ;
"""


def read_sass(monkeypatch, sass):
    usage = " Function kernel:\n  REG:168 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:600"
    monkeypatch.setattr(binary, "_run", lambda tool, *rest: usage if tool == "cuobjdump" else sass)
    return binary.read_cubin(b"")


def test_an_nvidia_binary(monkeypatch):
    """The innermost of two nested loops, with a wait in it; neither one without exponentials nor padding."""
    found = read_sass(monkeypatch, SASS)
    assert (found.registers, found.spills, found.tensor) == (168, 2, 3)
    assert found.loops == (Loop(8, 2),)


def test_a_register_count_that_is_not_there(monkeypatch):
    monkeypatch.setattr(binary, "_run", lambda *rest: "no usage")
    with pytest.raises(RuntimeError, match="cuobjdump named no registers: 'no usage'"):
        binary.read_cubin(b"")


def test_a_loop_that_a_call_leaves(monkeypatch):
    assert read_sass(monkeypatch, LEFT_BY_A_CALL).loops == (Loop(4, 1),)


@pytest.mark.parametrize(
    ("segment", "scalars", "vectors", "spills", "lanes"),
    [(0, 0, 0, 0, 0), (0, 7, 0, 0, 7), (16, 7, 0, 7, 0), (64, 0, 9, 9, 0)],
)
def test_an_amd_binary(segment, scalars, vectors, spills, lanes):
    """Scalars that are kept in vector lanes are no spills to memory."""
    found = binary.read_amdgcn(GCN.format(segment=segment, scalars=scalars, vectors=vectors))
    assert found == Binary(72, spills, 1, (Loop(3, 1),), lanes)


def test_an_amd_spill_instruction_counts():
    text = GCN.format(segment=8, scalars=0, vectors=0).replace(
        "\ts_endpgm", "\tscratch_load_dword v1, off, s0\n\ts_endpgm"
    )
    assert binary.read_amdgcn(text).spills == 1


def test_an_amd_field_that_is_not_there():
    with pytest.raises(RuntimeError, match="the assembly has no field vgpr_count"):
        binary.read_amdgcn("\ts_endpgm\n")


# ---- the gate ----

LAUNCH = aot.Launch("sm90", "windowed_forward", "box", "bf16", 64, LaunchConfig(128, 64, 8, 3))
GOOD = Binary(128, 0, 8, (Loop(300, 8),))


def test_a_good_binary_passes_with_its_predictions():
    """128 registers of 256 threads let two programs run where 64 warps fit; a step makes 4 x 128 x 64 x 64 FLOPs."""
    report = aot.judge(LAUNCH, GOOD, 48 * 1024)
    assert report.faults == ()
    assert report.occupancy == 2 * 8 / 64
    assert (report.flops, report.bytes) == (4 * 128 * 64 * 64, 2 * 64 * 64 * 2)
    assert report.intensity == 128
    assert (report.bound, report.peak) == ("memory", pytest.approx(128 * 3.35e12 / 989e12))
    assert report.to_dict()["predicted_occupancy"] == 0.25


@pytest.mark.parametrize(
    ("change", "shared", "fault"),
    [
        ({"spills": 3}, 0, "3 spills"),
        ({}, 228 * 1024, "233472 bytes of shared memory, 232448 is the limit"),
        ({"loops": ()}, 0, "no attention loop found"),
        (
            {"loops": (Loop(9, 8), Loop(9, 0))},
            0,
            "an attention loop without tensor-core instructions",
        ),
    ],
)
def test_a_bad_binary_does_not_pass(change, shared, fault):
    assert aot.judge(LAUNCH, dataclasses.replace(GOOD, **change), shared).faults == (fault,)


def test_the_table_shows_what_is_wrong(monkeypatch, capsys):
    bad = aot.judge(LAUNCH, dataclasses.replace(GOOD, spills=3), 0)
    monkeypatch.setattr(aot, "compile_all", lambda chosen, processes: iter([aot.judge(LAUNCH, GOOD, 0), bad]))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert aot.main(["--chips", "sm90"]) == 1
    head, good, wrong, step, note = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["chip", "kernel", "window"]
    assert good.endswith(" ok")
    assert wrong.endswith(" 3 spills")
    assert good.split()[-6:-1] == ["2.1", "16", "128", "memory", "43%"]
    assert step.startswith("MFLOP and KiB")
    assert "computed, not measured" in note


def test_the_gate_compiles_every_row_for_four_chips(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(aot, "compile_all", lambda chosen, processes: asked.extend(chosen) or iter(()))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert aot.main(["--gate"]) == 0
    capsys.readouterr()
    assert {launch.chip for launch in asked} == {"sm80", "sm90", "sm100", "gfx942"}
    rows = 6 * (3 * 2 + 6)  # head dims and dtypes; three kernels have two windows each, six have none
    assert len(asked) == len(set(asked)) == 4 * rows


def test_interpreted_kernels_are_not_judged(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        aot.main([])
    assert "TRITON_INTERPRET must not be set" in capsys.readouterr().err
