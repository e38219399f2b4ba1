"""The compositional benchmark with methods that draw rendered scenes: every number is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.benchmark.compose_bench import Task, compose_bench
from vision_attn.benchmark.compose_methods import METHODS, build_methods
from vision_attn.benchmark.compose_sheet import draw_composition_sheet
from vision_attn.shapes.scenes import CaptionSpec, Scene, parse_caption, render, sample_scene

CAPTIONS = (
    "a red circle and a blue square",
    "a green star, a black circle and a red square",
    "a purple star and a black square",
    "a blue circle and a yellow triangle",
)


def drawn(spec: CaptionSpec) -> np.ndarray:
    """A scene of these objects: places of another scene with as many."""
    kind = {1: "one", 2: "two"}.get(len(spec.objects), "many")
    places = next(
        scene.objects
        for scene in (sample_scene(seed, 64, 64, kind) for seed in range(100))
        if len(scene.objects) == len(spec.objects) and all(item.spec.size is None for item in scene.objects)
    )
    objects = tuple(
        type(place)(item, place.center, place.radius) for place, item in zip(places, spec.objects, strict=True)
    )
    return render(Scene(64, 64, spec, "white", objects)) / 255


def painter(keep: Callable[[int, int], int], log: list[Any]) -> Callable[..., Any]:
    """A method that draws the first `keep(place, seed)` objects of each caption."""

    def method(captions: list[str], *, generator: list[torch.Generator], output_type: str, **options: Any) -> Any:
        assert output_type == "np"
        seeds = [each.initial_seed() for each in generator]
        log.append((captions, seeds, options))
        images = [
            drawn(CaptionSpec(parse_caption(caption).objects[: keep(*reversed(divmod(seed, 1_000_003)))]))
            for caption, seed in zip(captions, seeds, strict=True)
        ]
        return SimpleNamespace(images=np.stack(images))

    return method


@pytest.fixture(scope="module")
def bench() -> Any:
    log: list[Any] = []
    methods = {
        "plain": painter(lambda place, seed: 1 if place < 2 else 9, log),  # two of four right, in both seeds
        "better": painter(lambda place, seed: 1 if (place, seed) == (0, 1) else 9, log),
    }
    names: list[str] = []
    task = Task(CAPTIONS, seeds=2, options={"num_inference_steps": 7}, batch=3)
    report = compose_bench(methods, task, about={"model": "painter"}, on_run=names.append)
    return SimpleNamespace(report=report, log=log, names=names, task=task)


def test_shares_gains_and_rates(bench: Any) -> None:
    plain, better, *others = bench.report.rows
    assert (plain.right, better.right) == (4 / 8, 7 / 8)
    assert (plain.gain, better.gain) == (0, 3 / 8)
    assert plain.gain_interval == (0, 0)
    assert better.gain_interval[0] < 3 / 8 < better.gain_interval[1]
    assert plain.missing == pytest.approx((1 + 2) * 2 / (9 * 2))  # captions 0 and 1 lack one and two of nine objects
    assert better.missing == pytest.approx(1 / 18)
    assert (plain.wrong, plain.extra) == (0, 0)
    assert plain.pictures == 8
    assert [(row.method, row.captions, row.pictures) for row in others] == [
        ("plain", "2 objects", 6), ("better", "2 objects", 6), ("plain", "3 objects", 2), ("better", "3 objects", 2),
    ]  # fmt: skip
    assert [row.right for row in others] == pytest.approx([4 / 6, 5 / 6, 0, 1])


def test_methods_draw_the_same_captions_from_the_same_noise_in_turns(bench: Any) -> None:
    assert bench.names == ["plain", "better"] * 4 == ["plain", "better"] * bench.task.calls
    for one, other in zip(bench.log[::2], bench.log[1::2], strict=True):
        assert one == other
        assert one[2] == {"num_inference_steps": 7}
    seeds = [seed for _, chunk, _ in bench.log[::2] for seed in chunk]
    assert len(set(seeds)) == 8


def test_report_and_sheet(bench: Any) -> None:
    content = json.loads(json.dumps(bench.report.to_dict()))
    assert content["environment"]["model"] == "painter"
    assert content["rows"][1]["method"] == "better"
    lines = str(bench.report).splitlines()
    assert "87.5" in next(line for line in lines if line.startswith("all") and "better" in line)
    assert "+37.5" in next(line for line in lines if line.startswith("all") and "better" in line)
    sheet = np.asarray(draw_composition_sheet(bench.report, rows=2))
    full = draw_composition_sheet(bench.report)
    assert sheet.shape[1] == full.width
    assert sheet.shape[0] < full.height
    scaled = Image.fromarray(bench.report.pictures["better"][1]).resize((128, 128), Image.Resampling.NEAREST)
    assert any(
        np.array_equal(sheet[top : top + 128, left : left + 128], np.asarray(scaled))
        for top in range(200, sheet.shape[0] - 128)
        for left in (336 + 142,)
    )


def test_plain_must_be_there() -> None:
    with pytest.raises(ValueError, match="methods must hold 'plain', to compare with, got other"):
        compose_bench({"other": painter(lambda place, seed: 1, [])}, Task(CAPTIONS, 1, {}), about={})


def test_every_method_is_built_and_plain_is_the_pipeline_itself() -> None:
    from tiny_pipelines import make_sd

    pipe = make_sd()
    methods = build_methods(pipe, METHODS, {"a-star": {"share": 0.3}})
    assert tuple(methods) == METHODS
    assert methods["plain"] is pipe
    assert methods["a-star"].keywords == {"loss": "a-star", "share": 0.3}
    assert methods["attend-and-excite"].keywords == {"loss": "attend-and-excite"}
    assert methods["structured-covering"].keywords == {"mode": "covering"}
    assert list(build_methods(pipe, ["a-star", "a-star"], {})) == ["plain", "a-star"]
    with pytest.raises(ValueError, match=r"methods must be of plain, structured-paper, .*, got 'magic'"):
        build_methods(pipe, ["magic"], {})


def test_the_command(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    from vision_attn.shapes.model import save_pipeline
    from vision_attn.shapes.model_sd import build_sd_pipeline, default_sd_settings

    save_pipeline(
        build_sd_pipeline(0), tmp_path / "model", default_sd_settings() | {"guidance": {"a-star": {"share": 1}}}
    )
    arguments = ["compose-bench", "--model", tmp_path / "model", "--captions", 2, "--seeds", 1, "--steps", 2]
    arguments += ["--methods", "a-star", "structured-paper", "--out", tmp_path / "out"]
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    content = json.loads(out)
    assert [row["method"] for row in content["rows"][:3]] == ["plain", "a-star", "structured-paper"]
    assert content["environment"]["num_inference_steps"] == 2
    assert content["environment"]["guidance_scale"] == 4
    assert json.loads((tmp_path / "out" / "compose.json").read_text()) == content
    with Image.open(tmp_path / "out" / "compose.png") as picture:
        assert picture.width > 3 * 128


def test_all_captions_of_a_small_split_and_a_model_without_an_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tiny_pipelines import make_sd

    from vision_attn import command_bench, command_input
    from vision_attn.pipelines import loading

    monkeypatch.setattr(loading, "load_pipeline", lambda *place, **options: make_sd())
    monkeypatch.setattr(loading, "run_defaults", lambda model: {})
    for split, count in (("one", 19), ("two", 100), ("hard", 150)):
        request = command_input.read_request(None, 0, None, 3, None, None)
        _, task, _ = command_bench.compose_task("sd", ["plain"], split, None, 1, False, request, "cpu", "float32")
        assert len(task.captions) == count
        assert task.options == {"num_inference_steps": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "one", "--tuning"], "split must have captions for tuning, got 'one'"),
        (["--methods", "magic"], "methods must be of plain, .* got 'magic'"),
        (["--split", "easy"], "split must be one of .*, got 'easy'"),
        (["--captions", 999], "count must be from 1 to 200 of split 'hard', got 999"),
        (["--model", "shapes-flux"], "pipe must be a Stable Diffusion pipeline with a UNet, got FluxPipeline"),
    ],
)
def test_mistakes(run: Callable[..., tuple[int, str, str]], arguments: list[Any], message: str, tmp_path: Path) -> None:
    import re

    code, _, err = run("compose-bench", "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()
