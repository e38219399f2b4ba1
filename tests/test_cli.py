"""Every command as a user types it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vision_attn as va
from vision_attn.benchmark import attention_bench, backbone_bench, guidance_bench, summary
from vision_attn.operators.registry import unregister_operator

SMALL = ["--size", "36x48", "--steps", "1"]


def test_help_lists_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("compare", "generate", "bench", "simulate", "tune", "operators", "backends", "verify"):
        assert f" {command} " in out
    for later in ("plan", "demo"):
        assert f" {later} " not in out


def test_no_arguments_give_the_help_alone(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert " compare " in out


def test_the_installed_command_answers_quickly():
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vision_attn.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0
    assert "compare" in answer.stdout
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert imported.isdisjoint({"diffusers", "transformers", "timm", "gradio", "triton"})


def test_compare_writes_sheet_and_json_and_prints_a_table(run, tiny_flux_folder, tmp_path):
    out_folder = tmp_path / "out"
    code, out, _ = run(
        "compare", "--model", tiny_flux_folder, *SMALL, "--repeats", 1, "--warmup", 0, "--out", out_folder,
        "--ops", "dense", "clear(radius=2)", "neighborhood(kernel_size=(3, 5))",
    )  # fmt: skip
    assert code == 0
    assert sorted(path.name for path in out_folder.iterdir()) == ["compare.json", "compare.png"]
    with Image.open(out_folder / "compare.png") as sheet:
        assert sheet.width > 3 * 320
    content = json.loads((out_folder / "compare.json").read_text())
    names = ["dense", "clear(radius=2)", "neighborhood(kernel_size=(3, 5))"]
    assert [row["operator"] for row in content["rows"]] == names
    request = content["request"]
    assert (request["height_px"], request["width_px"], request["steps"], request["guidance"]) == (36, 48, 1, 3.0)
    assert request["prompt"] == json.loads((tiny_flux_folder / "vision_attn.json").read_text())["prompt"]
    assert all(row["caption"].startswith("wrong") for row in content["rows"])
    for name in names:
        assert name in out
    assert out.splitlines()[-1] == f"The picture: {out_folder / 'compare.png'}"


def test_compare_json_is_all_that_standard_output_holds(run, tiny_flux_folder, tmp_path):
    code, out, err = run(
        "compare", "--model", tiny_flux_folder, *SMALL, "--repeats", 1, "--warmup", 0, "--json", "--out", tmp_path,
        "--prompt", "something else", "--seed", 7, "--ops", "clear(radius=2)",
    )  # fmt: skip
    assert code == 0
    content = json.loads(out)
    assert [row["operator"] for row in content["rows"]] == ["dense", "clear(radius=2)"]
    assert content["rows"][0]["caption"] is None
    assert (content["request"]["prompt"], content["request"]["seed"]) == ("something else", 7)
    assert "compare.png" in err


def test_generate_writes_the_picture_of_the_operator(run, tiny_flux_folder, tmp_path):
    pictures = {}
    for name, op in (("dense", "dense"), ("local", "clear(radius=2)"), ("again", "clear(radius=2)")):
        code, out, _ = run(
            "generate", "--model", tiny_flux_folder, *SMALL, "--op", op, "--out", tmp_path / f"{name}.png"
        )
        assert code == 0
        assert out == f"The picture: {tmp_path / f'{name}.png'}\n"
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    assert pictures["dense"].shape == (36, 48, 3)
    assert np.array_equal(pictures["local"], pictures["again"])
    assert not np.array_equal(pictures["local"], pictures["dense"])


def test_generate_patches_the_layers_that_are_named(run, tiny_flux_folder, tmp_path):
    some, every = tmp_path / "some.png", tmp_path / "every.png"
    arguments = ["generate", "--model", tiny_flux_folder, *SMALL, "--op", "clear(radius=2)"]
    assert run(*arguments, "--layers", "single_transformer_blocks.*", "--out", some)[0] == 0
    assert run(*arguments, "--layers", "single_transformer_blocks.*", "transformer_blocks.*", "--out", every)[0] == 0
    assert not np.array_equal(np.asarray(Image.open(some)), np.asarray(Image.open(every)))


def test_operators_as_table_and_json(run):
    code, out, _ = run("operators")
    assert code == 0
    assert "clear(radius, down_factor=1, proportional=False)" in out
    code, out, _ = run("operators", "--json")
    assert {row["name"] for row in json.loads(out)} == set(va.operators())


def test_backends_as_table_and_json(run):
    code, out, _ = run("backends")
    assert code == 0
    assert out.splitlines()[0].split() == ["backend", "usable", "here", "why"]
    code, out, _ = run("backends", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["tiled"] == {"name": "tiled", "available": True, "reason": ""}
    assert rows.keys() == set(va.backends())


def test_verify_prints_its_checks(run, tiny_flux_folder):
    code, out, _ = run("verify", "--model", tiny_flux_folder)
    assert code == 0
    assert "Dense is bit-identical" in out
    assert "FAILED" not in out
    code, out, _ = run("verify", "--model", tiny_flux_folder, "--json")
    content = json.loads(out)
    assert content["passed"] is True
    assert {"name", "passed", "detail"} == content["checks"][0].keys()


def test_verify_ends_with_1_when_a_check_fails(run, tiny_flux_folder, monkeypatch):
    def fail(pipe):
        raise va.PatchError("verify: target must pass every check, got\ncheck  FAILED")

    monkeypatch.setattr(va, "verify", fail, raising=False)
    code, out, err = run("verify", "--model", tiny_flux_folder)
    assert (code, out) == (1, "")
    assert "check  FAILED" in err


def test_simulate_prints_the_counts_and_draws_them(run, tmp_path):
    window = ["simulate", "--grid", "256x256", "--kernel-size", "80", "--stride", "16x1"]
    tiles = ["--q-tile", "16x16", "--kv-tile", "16x8", "--fraction", "0.518", "--steps", "28", "--dense-steps", "9"]
    code, out, err = run(*window, *tiles, "--plot", tmp_path / "new" / "plot.png")
    assert (code, err) == (0, "")
    assert "60 of 512 at worst" in out
    assert "1.45x" in out
    with Image.open(tmp_path / "new" / "plot.png") as picture:
        assert picture.size == (920, 560)
    code, out, _ = run(*window, *tiles, "--json")
    numbers = json.loads(out)
    assert (numbers["visited_worst"], numbers["total"], numbers["fully_block_sparse"]) == (60, 512, False)
    assert round(numbers["end_to_end"], 2) == 1.45
    code, out, _ = run("simulate", "--grid", "8x64x64", "--radius", "2x8x8", "--dynamic-kv", "--json")
    assert json.loads(out)["q_tile"] == [4, 4, 8]
    code, out, _ = run("simulate", "--grid", "64", "--kernel-size", "8", "--is-causal")
    assert code == 0


def test_tune_writes_the_table_and_says_how_to_use_it(run, tmp_path, monkeypatch):
    from vision_attn.kernels import tune

    asked = []
    monkeypatch.setattr(tune, "require", lambda *args: None)
    monkeypatch.setattr(
        tune, "tune", lambda *args, window, on_run: asked.append((*args, window)) or {"windowed_forward": {"sm90": []}}
    )
    code, out, _ = run(
        "tune", "--head-dims", "64", "96", "--dtypes", "float16", "--window", 16, "--out", tmp_path / "mine.json"
    )
    assert code == 0
    assert asked == [(tune.KERNELS, [64, 96], ["float16"], 16)]
    assert json.loads((tmp_path / "mine.json").read_text()) == {"windowed_forward": {"sm90": []}}
    assert f"VISION_ATTN_LAUNCH_CONFIGS={tmp_path / 'mine.json'}" in out


def test_bench_of_own_cases(run):
    arguments = ["bench", "--ops", "clear(radius=3)", "neighborhood(kernel_size=5)", "--grid", "16x8", "--heads", 2]
    arguments += ["--head-dim", 16, "--repeats", 1, "--warmup", 0, "--no-flex", "--threads", 1]
    code, out, _ = run(*arguments)
    assert code == 0
    assert "clear(radius=3), 16x8 tokens, 2 heads of 16" in out
    assert "neighborhood(kernel_size=5), 16x8 tokens" in out
    assert "linear: 4" not in out
    code, out, _ = run(*arguments, "--json")
    content = json.loads(out)
    assert [case["case"]["grid"] for case in content["cases"]] == [[16, 8], [16, 8]]
    assert (content["growth"], content["environment"]["threads"]) == (None, 1)


def test_bench_of_a_chosen_backend(run):
    arguments = ["bench", "--ops", "clear(radius=2)", "--grid", "8x8", "--heads", 1, "--head-dim", 16, "--no-flex"]
    code, out, _ = run(*arguments, "--backend", "triton", "--repeats", 1, "--warmup", 0, "--json")
    ours, _dense = json.loads(out)["cases"][0]["contenders"]
    assert code == 0
    assert ours["max_error"] < 2e-5


def test_bench_of_the_standard_cases_adds_growth_and_memory(run, monkeypatch):
    monkeypatch.setattr(attention_bench, "STANDARD_CASES", (attention_bench.Case(va.Clear(radius=3), (16, 8)),))
    monkeypatch.setattr(attention_bench, "growth", lambda **options: 4.5)
    monkeypatch.setattr(
        attention_bench, "probe", lambda grid, **shape: {"peak_bytes": 9 * 2**20, "inputs_bytes": 3 * 2**20, **shape}
    )
    code, out, _ = run("bench", "--repeats", 1, "--no-flex", "--head-dim", 16)
    assert code == 0
    assert "clear(radius=3), 16x8 tokens, 8 heads of 16" in out
    assert "4.50 times as long" in out
    assert "need 9 MiB" in out


def test_bench_of_backbones(run, monkeypatch):
    asked = []

    def report(operators, **options):
        asked.append((operators, options["repeats"], options["dtype"]))
        return summary_of_nothing

    summary_of_nothing = backbone_bench.BackboneReport({"model": "tiny"}, ())
    monkeypatch.setattr(backbone_bench, "backbone_report", report)
    code, out, _ = run("bench", "--suite", "backbones", "--ops", "agent(agents=4)", "halo(4, 1)", "--repeats", 2)
    assert (code, "model tiny" in out) == (0, True)
    out = run("bench", "--suite", "backbones", "--json")[1]
    assert json.loads(out) == {"environment": {"model": "tiny"}, "rows": []}
    assert asked == [
        ([va.Agent(4), va.Halo(4, 1)], 2, torch.float32),
        (backbone_bench.OPERATORS, 7, torch.float32),
    ]


def test_bench_of_guidance(run, monkeypatch):
    asked = []

    def report(**options):
        asked.append((options["repeats"], options["dtype"]))
        return guidance_bench.GuidanceReport({"model": "tiny"}, ())

    monkeypatch.setattr(guidance_bench, "guidance_report", report)
    code, out, _ = run("bench", "--suite", "guidance", "--repeats", 2)
    assert (code, "model tiny" in out) == (0, True)
    assert json.loads(run("bench", "--suite", "guidance", "--json")[1]) == {
        "environment": {"model": "tiny"},
        "rows": [],
    }
    assert asked == [(2, torch.float32), (7, torch.float32)]


OPERATOR = """
from dataclasses import dataclass

import vision_attn as va
from neighbour import WEIGHT


@va.register_operator("averaging")
@dataclass(frozen=True)
class Averaging:
    \"\"\"Averages all values.\"\"\"

    weight: float = WEIGHT

    def __call__(self, query, key, value, layout, scale=None):
        return self.weight * value.mean(1, keepdim=True).expand_as(value)
"""


@pytest.fixture
def own_operator(tmp_path, monkeypatch):
    """A folder with a module that registers `averaging`; what it imports lies beside it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "averaging_operator.py").write_text(OPERATOR)
    (tmp_path / "neighbour.py").write_text("WEIGHT = 0.25\n")
    yield tmp_path
    unregister_operator("averaging")
    for name in ("averaging_operator", "neighbour"):
        sys.modules.pop(name, None)


def test_operators_of_a_module_in_the_current_folder(run, own_operator, monkeypatch):
    monkeypatch.chdir(own_operator)
    code, out, _ = run("operators", "--import", "averaging_operator")
    assert code == 0
    assert re.search(r"averaging\(weight=0\.25\) +Averages all values\.", out)


def test_operators_of_a_file_elsewhere_are_drawn_with(run, own_operator, tiny_flux_folder, tmp_path):
    file = own_operator / "averaging_operator.py"
    arguments = ["--import", file, "--import", file, "--model", tiny_flux_folder, *SMALL]
    picture = tmp_path / "image.png"
    assert run("generate", *arguments, "--op", "averaging(weight=0.5)", "--out", picture)[0] == 0
    assert picture.is_file()
    code, out, _ = run(
        "compare", *arguments, "--ops", "averaging", "--repeats", 1, "--warmup", 0, "--json", "--out", tmp_path
    )
    assert code == 0
    assert [row["operator"] for row in json.loads(out)["rows"]] == ["dense", "averaging()"]


def test_an_interruption_after_the_work_does_not_deny_it(run, tiny_flux_folder, tmp_path, monkeypatch):
    def interrupt(comparison):
        raise KeyboardInterrupt

    monkeypatch.setattr(summary, "comparison_table", interrupt)
    arguments = ["--model", tiny_flux_folder, *SMALL, "--repeats", 1, "--warmup", 0, "--ops", "dense"]
    code, _, err = run("compare", *arguments, "--out", tmp_path)
    picture, numbers = tmp_path / "compare.png", tmp_path / "compare.json"
    assert code == 130
    expected = f"vision-attn: interrupted, each of {picture}, {numbers} is whole or as it was before"
    assert err.splitlines()[-1].endswith(expected)
    assert sorted(tmp_path.iterdir()) == [numbers, picture]


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_leaves_no_half_written_file(tiny_flux_folder, tmp_path):
    command = [sys.executable, "-m", "vision_attn.cli", "compare", "--model", str(tiny_flux_folder), "--out", "out"]
    process = subprocess.Popen(
        [*command, "--size", "32x32", "--repeats", "1000"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    # The progress bar appears when the model is loaded and the work has begun.
    for line in process.stderr:
        if "image" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].endswith("vision-attn: interrupted, nothing was written")
    assert "Traceback" not in err
    assert [path for path in Path(tmp_path).rglob("*") if path.is_file()] == []
