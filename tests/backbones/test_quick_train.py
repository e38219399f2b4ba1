"""Quick training: its tasks, that a backbone learns, and what the command says."""

import json

import pytest
import torch

import vision_attn as va
from vision_attn.backbones import quick_train
from vision_attn.backbones.quick_data import Task, digits, shapes
from vision_attn.backbones.quick_train import VARIANTS, Result, accuracy, main, markdown, train
from vision_attn.shapes.detector import detect
from vision_attn.shapes.scenes import COLORS, SHAPES


def test_shapes_are_what_their_labels_say():
    task = shapes(seed=3, train=40, test=20)
    assert (task.train.shape, task.test.shape, task.classes) == ((40, 3, 64, 64), (20, 3, 64, 64), 24)
    right = 0
    for image, label in zip(task.test, task.test_labels.tolist(), strict=True):
        picture = ((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        color, shape = list(COLORS)[label // len(SHAPES)], SHAPES[label % len(SHAPES)]
        right += [(found.color, found.shape) for found in detect(picture)] == [(color, shape)]
    assert right >= 19
    again = shapes(seed=3, train=40, test=20)
    assert torch.equal(again.train, task.train)
    assert not torch.equal(shapes(seed=4, train=40, test=20).train, task.train)


def test_digits_are_split_once():
    sklearn = pytest.importorskip("sklearn.datasets")
    task = digits(seed=0)
    assert (len(task.train), len(task.test), task.classes) == (1397, 400, 10)
    small = torch.cat([task.test, task.train])[:, 0, ::8, ::8]
    assert small.shape[1:] == (8, 8)
    stock = {(tuple(image.ravel()), label) for image, label in zip(*sklearn.load_digits(return_X_y=True), strict=True)}
    ours = {
        (tuple(((image + 1) * 8).ravel().tolist()), label)
        for image, label in zip(small, torch.cat([task.test_labels, task.train_labels]).tolist(), strict=True)
    }
    assert ours == stock


def test_a_backbone_learns_digits():
    task, losses = digits(), []
    model = train(VARIANTS["biformer"], task, epochs=1, on_step=losses.append)
    assert len(losses) == 44
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert accuracy(model, task) > 0.6


def small_task():
    torch.manual_seed(0)
    images = torch.randn(40, 3, 64, 64)
    return Task(images, torch.arange(40) % 4, images[:8], torch.arange(8) % 4, 4)


def test_training_is_the_same_again_and_goes_through_the_operator():
    task, calls = small_task(), []
    variant = VARIANTS["vit-gna"]
    first, second = (train(variant, task, 1, seed=1, on_step=calls.append) for _ in range(2))
    assert calls[:2] == calls[2:]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with torch.no_grad():
        patched = first(task.test)
        va.unpatch(first)
        assert not torch.equal(first(task.test), patched)


def test_a_loss_that_is_not_finite_stops():
    task = small_task()
    task.train[3] = float("nan")
    with pytest.raises(RuntimeError, match="the loss of va_biformer_tiny must be finite, got nan"):
        train(VARIANTS["biformer"], task, 1)


def test_table():
    results = [Result("nat", "shapes", 1234567, 0.5, 100.0), Result("nat", "digits", 1234567, 0.875, 300.0)]
    assert markdown(results).splitlines() == [
        "| backbone | parameters | shapes, accuracy | digits, accuracy | training images/s |",
        "| --- | --- | --- | --- | --- |",
        "| nat | 1,234,567 | 50.0% | 87.5% | 200 |",
    ]
    rows = markdown([*results, Result("vit", "shapes", 10, 0.25, 50.0)]).splitlines()
    assert rows[-1] == "| vit | 10 | 25.0% | - | 50 |"


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quick_train, "TASKS", {"shapes": lambda seed: small_task()})
    threads = torch.get_num_threads()
    main(["--model", "nat", "--data", "shapes", "--epochs", "1", "--threads", "1", "--out", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    assert "| nat | " in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert (result["variant"], result["task"]) == ("nat", "shapes")


def test_interruption_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    def interrupted(variants, tasks, epochs, seed):
        yield Result("nat", "shapes", 10, 0.5, 100.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(quick_train, "run", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["--out", str(tmp_path / "out.json")])
    assert end.value.code == 130
    assert "interrupted after 1 results" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out.json").read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_what_is_missing_is_told_before_any_training(monkeypatch, capsys):
    def missing(seed):
        raise ImportError("digits need scikit-learn")

    monkeypatch.setattr(quick_train, "TASKS", {"shapes": lambda seed: small_task(), "digits": missing})
    monkeypatch.setattr(quick_train, "train", lambda *arguments: pytest.fail("trained"))
    with pytest.raises(SystemExit):
        main(["--model", "nat"])
    assert "digits need scikit-learn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "invalid choice: 'resnet'"),
        (["--data", "imagenet"], "invalid choice: 'imagenet'"),
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--epochs", "many"], "argument --epochs: invalid whole_number value: 'many'"),
        (["--seed", "-1"], "argument --seed: must be at least 0, got -1"),
        (["--out", "/nowhere/out.json"], "--out must be a file in a folder that exists, got /nowhere/out.json"),
        (["--out", "/"], "--out must be a file in a folder that exists, got /"),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
