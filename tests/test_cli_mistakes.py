"""What a user can get wrong on the command line: one readable line and exit code 2, and nothing left behind."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn import cli
from vision_attn.benchmark import generation

SMALL = ["--size", "36x48", "--steps", "1"]


WRONG = [
    (["compare", "--size", "256"], r"--size must be HEIGHTxWIDTH such as 256x384, got '256'"),
    (["compare", "--size", "0x64"], r"--size must be HEIGHTxWIDTH .* got '0x64'"),
    (["compare", "--size", "64x-4"], r"--size must be HEIGHTxWIDTH .* got '64x-4'"),
    (
        ["compare", "--ops", "clera(radius=8)"],
        r"parse: text must name one of agent, .*, clear, .*got 'clera\(radius=8\)'",
    ),
    (
        ["compare", "--ops", "clear(radius=8"],
        r"parse: text must read name\(field=value, \.\.\.\).*got 'clear\(radius=8'",
    ),
    (["compare", "--ops", "clear(radius=-1)"], r"Clear: radius must be above 0.*got -1"),
    (["compare", "--ops", "clear(size=8)"], r"parse: clear takes the fields radius, .*'size'"),
    (["compare", "--ops"], r"[Oo]ption '?--ops'? requires an argument"),
    (["compare", "--ops", "--seed", "3"], r"[Oo]ption '?--ops'? requires an argument"),
    (["generate", "--layers", "--op", "clear(radius=2)"], r"[Oo]ption '?--layers'? requires an argument"),
    (["compare", "--model", "no-such-model"], r"model must be one of shapes-flux.*got 'no-such-model'"),
    (["compare", "--model", "."], r"holds no model_index\.json"),
    (["compare", "--steps", "0"], r"Invalid value for '--steps'"),
    (["compare", "--repeats", "many"], r"Invalid value for '--repeats': .*int"),
    (["compare", "--sise", "64x64"], r"No such option:? '?--sise"),
    (["comprae"], r"No such command 'comprae'"),
    (["generate", "--op", "clear()"], r"parse: 'clear\(\)' does not make a clear operator: .*radius"),
    (["generate", "--out", "image.txt"], r"out must end in \.png.*got 'image\.txt'"),
    (["generate", "--out", "image.xbm"], r"out must end in \.png.*got 'image\.xbm'"),
    (
        ["generate", "--out", "/proc/image.png"],
        r"--out must be in a folder that can be written, got '/proc/image\.png'",
    ),
    (
        ["generate", "--out", f"{'n' * 300}.png"],
        r"--out must be in a folder that can be written, got 'n+\.png'.*too long",
    ),
    (
        ["compare", "--out", f"new/{'n' * 300}"],
        r"--out must be in a folder that can be written, got 'new/n+'.*too long",
    ),
    (
        ["generate", "--model", "MODEL", "--size", "37x47"],
        r"multiples of 4 pixels .*got 37x47: the nearest size is 36x48",
    ),
    (["compare", "--model", "MODEL", "--size", "36x2"], r"multiples of 4 pixels .*got 36x2: the nearest size is 36x4"),
    (["generate", "--model", "MODEL", "--size", "1x1"], r"multiples of 4 pixels .*got 1x1: the nearest size is 4x4"),
    (["generate", "--model", "MODEL", "--device", "gpu"], r"--device must be cpu, cuda or cuda:N, got 'gpu'"),
    (
        ["generate", "--model", "MODEL", "--dtype", "int8"],
        r"--dtype must be one of float32, float16, bfloat16, got 'int8'",
    ),
    (["generate", "--model", "MODEL", "--frames", "5"], r"FluxPipeline takes no num_frames"),
    (["generate", "--model", "MODEL", *SMALL, "--layers", "nothing.*", "--op", "dense"], r"patch: .*nothing\.\*"),
    (["bench", "--ops", "dense"], r"bench: ops must be clear\(radius=\.\.\.\)"),
    (["bench", "--ops", "clear(radius=3)", "--grid", "8by8"], r"--grid must be HEIGHTxWIDTH .* got '8by8'"),
    (["bench", "--grid", "9x9x9"], r"--grid must be HEIGHTxWIDTH .* got '9x9x9'"),
    (["bench", "--backend", "cudnn"], r"--backend must be one of auto, dense, tiled, .*got 'cudnn'"),
    (["simulate", "--grid", "8x8", "--kernel-size", "3", "--steps", "4"], r"--fraction must come with --steps"),
    (["tune", "--window", "0"], r"tune: window must be 1 to 128 tokens per axis, got 0"),
    (["tune", "--head-dims", "0"], r"tune: head_dims must be 1 to 256, got 0"),
    (["tune", "--head-dims", "64", "512"], r"tune: head_dims must be 1 to 256, got 512"),
    (["bench", "--suite", "vit"], r"--suite must be attention, backbones or guidance, got 'vit'"),
    (["bench", "--suite", "guidance", "--ops", "dense"], r"--ops must be left out with --suite guidance"),
    (["bench", "--suite", "guidance", "--grid", "8x8"], r"--grid must be left out with --suite guidance"),
    (["bench", "--suite", "backbones", "--heads", "4"], r"--heads must be left out with --suite backbones"),
    (["bench", "--suite", "backbones", "--no-flex", "--ops", "agent"], r"--no-flex must be left out with --suite"),
    (["bench", "--suite", "backbones", "--ops", "agnet"], r"parse: text must name one of agent, .* got 'agnet'"),
    (["bench", "--grid", "16x8"], r"--grid must come with --ops, got '16x8' alone"),
    (["tune", "--kernels", "dense"], r"tune: kernels must be among windowed_forward, .* got 'dense'"),
    (["tune", "--dtypes", "int8"], r"tune: dtypes must be among float16, bfloat16, float32, got 'int8'"),
    (["tune"], r"tune: device must be a CUDA or ROCm GPU, torch sees none"),
    (["simulate"], r"[Mm]issing option '?--grid"),
    (["simulate", "--grid", "8by8"], r"--grid must be one to three whole numbers .* got '8by8'"),
    (["simulate", "--grid", "8x8x8x8", "--radius", "2"], r"--grid must be one to three whole numbers"),
    (["simulate", "--grid", "8x8", "--kernel-size", "9"], r"kernel_size=\(9, 9\) does not fit the token grid \(8, 8\)"),
    (["simulate", "--grid", "8x8"], r"kernel_size or radius must be given, got neither"),
    (
        ["simulate", "--grid", "8x8", "--radius", "wide"],
        r"--radius must be numbers such as 8, 7.5 or 2x8x8, got 'wide'",
    ),
    (["simulate", "--grid", "8x8", "--radius", "nan"], r"radius must be above 0 and finite, got nan"),
    (["simulate", "--grid", "8x8", "--radius", "2", "--plot", "a.png"], r"--plot must come with --kernel-size"),
    (["simulate", "--grid", "8x8", "--kernel-size", "3", "--plot", "a.txt"], r"out must end in \.png"),
    (["simulate", "--grid", "8x8", "--kernel-size", "3", "--fraction", "2"], r"fraction must be 0 to 1, got 2"),
    (["bench", "--device", "vulkan"], r"--device must be one that this machine has, got 'vulkan': .*use cpu"),
    (["bench", "--device", "meta"], r"--device must be one that this machine has, got 'meta': .*use cpu"),
    (
        ["bench", "--ops", "neighborhood(kernel_size=(3,3,3))", "--grid", "8x8"],
        r"kernel_size must be one number or two.*got \(3, 3, 3\)",
    ),
    (
        ["operators", "--import", "no_such_module"],
        r"--import must name a module .*got 'no_such_module': ModuleNotFound",
    ),
    (
        ["operators", "--import", "no_such_file.py"],
        r"--import must name a module .*got 'no_such_file\.py': FileNotFound",
    ),
    (
        ["bench", "--ops", "clear(radius=3)", "--grid", "9x8"],
        r"grid must be made of multiples of \(8, 8\), got \(9, 8\)",
    ),
    (["operators", "clear"], r"[Gg]ot unexpected extra argument"),
    (["generate", "--size", "99999999x64"], r"--size must be at most 16384 pixels on each side, got '99999999x64'"),
    (["generate", "--seed", "-1"], r"--seed must be 0 to .* got -1"),
    (["compare", "--seed", "99999999999999999999999"], r"--seed must be .* got 99999999999999999999999"),
    (["generate", "--guidance", "nan"], r"--guidance must be a finite number, got nan"),
    (
        ["compare", "--out", f"{__file__}/out"],
        r"--out must be in a folder that can be written, got '.*test_cli_mistakes.py/out'",
    ),
    (["verify", "--model", "no-such-model"], r"model must be one of shapes-flux"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_users_mistake_is_one_readable_line_and_exit_code_2(
    run, tmp_path, monkeypatch, tiny_flux_folder, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(tiny_flux_folder if argument == "MODEL" else argument for argument in arguments))
    assert code == 2
    assert out == ""
    lines = [line for line in err.split("\n") if line]
    assert len(lines) == 1
    assert lines[0].startswith("vision-attn: ")
    assert_matches(message, lines[0])
    assert list(tmp_path.iterdir()) == []


def assert_matches(pattern, text):
    assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["generate", "--out", "image.png"], "image.png"),
        (["compare", "--out", "."], "compare.json"),
        (["compare", "--out", "."], "compare.png"),
    ],
)
def test_a_folder_where_a_file_must_go_is_found_before_the_work(run, tmp_path, monkeypatch, arguments, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    monkeypatch.setattr(generation, "generate", pytest.fail)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert_matches(f"^vision-attn: --out must leave {folder} free for a file, got '.*': a folder has that name\n$", err)
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_an_empty_prompt_is_drawn_as_such(run, tiny_flux_folder, tmp_path):
    example = json.loads((tiny_flux_folder / "vision_attn.json").read_text(encoding="utf-8"))["prompt"]
    prompts = {"own": [], "empty": ["--prompt", ""], "example": ["--prompt", example]}
    pictures = {}
    for name, prompt in prompts.items():
        path = tmp_path / f"{name}.png"
        assert run("generate", "--model", tiny_flux_folder, *SMALL, *prompt, "--out", path)[0] == 0
        pictures[name] = np.asarray(Image.open(path))
    assert np.array_equal(pictures["own"], pictures["example"])
    assert not np.array_equal(pictures["own"], pictures["empty"])


def test_more_than_the_memory_holds_is_one_line(run, tiny_flux_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda pipe, request: torch.zeros(2**50))
    code, _, err = run("generate", "--model", tiny_flux_folder, "--out", tmp_path / "image.png")
    assert code == 2
    assert_matches(r"^vision-attn: out of memory: .*ask for a smaller size\n$", err)


def test_a_model_that_the_memory_cannot_hold_is_not_called_broken(run, tiny_flux_folder, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *args, **kwargs: torch.zeros(2**50))
    code, _, err = run("verify", "--model", tiny_flux_folder)
    assert (code, err.startswith("vision-attn: out of memory: ")) == (2, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fails.py", "1 / 0", "ZeroDivisionError: division by zero"),
        ("stops.py", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("half.py", "def", "SyntaxError: .*half.py, line 1"),
        ("json.py", "", "ImportError: the name json is taken"),
    ],
)
def test_a_module_that_fails_is_one_line(run, tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / name).write_text(content)
    before = sys.modules.get(name.removesuffix(".py"))
    code, out, err = run("operators", "--import", tmp_path / name)
    assert (code, out) == (2, "")
    assert_matches(f"^vision-attn: --import must name a module .*got '{tmp_path / name}': {message}.*\n$", err)
    assert sys.modules.get(name.removesuffix(".py")) is before


def test_a_device_that_is_not_there(run, tiny_flux_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run("generate", "--model", tiny_flux_folder, "--device", "cuda")
    assert (code, err) == (
        2,
        "vision-attn: --device must be one that this machine has, got 'cuda': torch sees no GPU, use cpu\n",
    )


def test_a_model_without_example_needs_a_prompt(run, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    code, _, err = run("compare", "--model", tmp_path)
    assert code == 2
    assert_matches("--prompt must be given, since '.*' brings no example", err)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def bug():
        raise AssertionError("ours")

    monkeypatch.setattr("vision_attn.benchmark.listing.backend_rows", bug)
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["backends"])


def test_the_traceback_of_a_mistake_can_be_had(monkeypatch):
    monkeypatch.setenv("VISION_ATTN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--size must be"):
        cli.main(["compare", "--size", "wide"])
