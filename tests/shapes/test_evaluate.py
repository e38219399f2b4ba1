"""Evaluation on held-out captions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from vision_attn.shapes.card import model_card
from vision_attn.shapes.evaluate import KindScore, Report, evaluate, generate, held_out_scenes, main
from vision_attn.shapes.scenes import KINDS, sample_scene


@pytest.fixture(scope="module")
def pipeline(tiny_flux_folder: Path) -> FluxPipeline:
    result = FluxPipeline.from_pretrained(tiny_flux_folder)
    result.set_progress_bar_config(disable=True)
    return result


def test_pictures_do_not_depend_on_the_batch_they_are_drawn_in(pipeline: FluxPipeline) -> None:
    captions, seeds = ["a red circle", "a blue star and a red square"], [5, 6]
    together = generate(pipeline, captions, seeds, 24, 32, num_inference_steps=2)
    alone = generate(pipeline, captions[1:], seeds[1:], 24, 32, num_inference_steps=2)[0]
    assert together[1].shape == (24, 32, 3)
    assert together[1].dtype == np.uint8
    # Batched matrix products may round differently: one grey level.
    assert np.abs(together[1].astype(int) - alone.astype(int)).max() <= 1
    assert np.abs(together[1].astype(int) - together[0].astype(int)).max() > 10


def test_held_out_captions_are_fixed_and_not_those_of_a_training_run() -> None:
    assert [scene.caption for scene in held_out_scenes("two", 3)] == [
        scene.caption for scene in held_out_scenes("two", 5, 96, 64)
    ][:3]
    held_out = [scene.spec for scene in held_out_scenes("many", 30)]
    trained = {sample_scene([0, step, index], kind="many").spec for step in range(10) for index in range(24)}
    assert not trained.intersection(held_out)


def test_a_perfect_and_an_untrained_painter(pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained = evaluate(pipeline, 1, ((24, 32),), num_inference_steps=1)
    assert [row.kind for row in untrained.rows] == list(KINDS)
    assert all(row.right == 0 for row in untrained.rows)

    def paint(_: FluxPipeline, captions: list[str], *rest: object) -> list[np.ndarray]:
        from vision_attn.shapes.scenes import render

        scenes = {
            scene.caption: scene
            for scene in (sample_scene([20_011_203, k, i], kind=KINDS[k]) for k in range(4) for i in range(3))
        }
        return [render(scenes[caption]) for caption in captions]

    monkeypatch.setattr("vision_attn.shapes.evaluate.generate", paint)
    perfect = evaluate(pipeline, 3)
    assert all((row.objects, row.colors, row.right) == (1, 1, 1) for row in perfect.rows)
    assert perfect.rates()["relation 48x48 right"] == 1


def test_the_report_is_a_table() -> None:
    row = KindScore("two", 48, 64, 50, objects=0.5, colors=0.76, right=0.25)
    table = Report((row,), 20, 3.0).markdown().splitlines()
    assert table[-1] == "| 48x64 | two objects | 50 | 50 % | 76 % | 25 % |"
    assert len({line.count("|") for line in table}) == 1


def test_the_command_writes_its_scores(
    tiny_flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    options = ["--sizes", "24x32", "32x24:2", "--captions-per-kind", "1", "--steps", "1", "--json", str(out)]
    main([str(tiny_flux_folder), *options])
    printed = capsys.readouterr().out
    assert "| 24x32 | one object | 1 |" in printed
    assert "| 32x24 | one object | 2 |" in printed
    assert not (tiny_flux_folder / "README.md").exists()
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["num_inference_steps"] == 1
    assert [row["kind"] for row in content["rows"]] == list(KINDS) * 2


def test_the_card_states_settings_scores_and_training(tiny_flux_folder: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_flux_folder, directory)
    report = Report((KindScore("many", 48, 64, 50, objects=0.5, colors=0.76, right=0.25),), 20, 3.0)
    card = model_card(directory, report)
    assert report.markdown() in card
    assert "No note on these weights." in card
    assert "--sizes 48x64:50`" in card
    (directory / "training.md").write_text("Trained for one step.", encoding="utf-8")
    assert "Trained for one step." in model_card(directory, report)


def test_bad_input_is_refused(pipeline: FluxPipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluate: captions_per_kind must be at least 1, got 0: use 50"):
        evaluate(pipeline, 0)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--sizes", "48"])
    assert "size must look like 48x64" in capsys.readouterr().err
    assert torch.is_grad_enabled()
