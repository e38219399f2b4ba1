import json
import math

import numpy as np
import pytest
from PIL import Image

from vision_attn.benchmark.output import picture_format, table, to_json, write_all, write_picture


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.bin"
    seen = []

    def write(file):
        file.write(b"first ")
        file.flush()
        seen.append(path.exists())
        file.write(b"last")

    write_all({path: write})
    assert seen == [False]
    assert path.read_bytes() == b"first last"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing_new_and_nothing_broken(tmp_path, interruption):
    path = tmp_path / "file.bin"
    path.write_bytes(b"from before")

    def write(file):
        file.write(b"half")
        raise interruption

    with pytest.raises(interruption):
        write_all({path: write})
    assert path.read_bytes() == b"from before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_several_files_appear_together_or_not_at_all(tmp_path):
    first, second = tmp_path / "first.bin", tmp_path / "second.bin"
    told = []

    def fail(file):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_all({first: lambda file: file.write(b"1"), second: fail}, on_ready=told.append)
    assert (list(tmp_path.iterdir()), told) == ([], [])
    write_all(
        {first: lambda file: file.write(b"1"), second: lambda file: file.write(b"2")},
        on_ready=lambda paths: told.append((paths, first.exists())),
    )
    assert told == [((first, second), False)]
    assert (first.read_bytes(), second.read_bytes()) == (b"1", b"2")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_in_the_way_is_found_before_anything_is_written(tmp_path):
    (tmp_path / "second.json").mkdir()
    writes = {tmp_path / name: lambda file: file.write(b"content") for name in ("first.png", "second.json")}
    with pytest.raises(IsADirectoryError, match=r"write_all: writes must name files, got '.*second\.json'"):
        write_all(writes)
    assert [entry.name for entry in tmp_path.iterdir()] == ["second.json"]


def test_the_longest_name_that_a_system_takes_can_be_written(tmp_path):
    path = tmp_path / f"{'n' * 251}.png"
    assert write_picture(path, np.zeros((2, 3, 3), dtype=np.float32)).is_file()


def test_json_holds_no_bare_infinity():
    text = to_json({"psnr": math.inf, "lost": [math.nan, 1.5], "grid": (2, 3)})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "psnr": "inf",
        "lost": [None, 1.5],
        "grid": [2, 3],
    }
    assert to_json({}).endswith("\n")


def test_table_aligns_words_left_and_numbers_right():
    text = table(["operator", "s", "PSNR"], [["dense", "10.0", "identical"], ["clear(radius=8)", "2.5", "31.0 dB"]])
    assert text.splitlines() == [
        "operator            s  PSNR",
        "---------------  ----  ---------",
        "dense            10.0  identical",
        "clear(radius=8)   2.5  31.0 dB",
    ]


def test_picture_is_written_as_seen(tmp_path):
    image = np.zeros((2, 3, 3), dtype=np.float32)
    image[0, 1] = (1.0, 0.5, 7.0)
    path = write_picture(tmp_path / "image.png", image)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (2, 3, 3)
    assert pixels[0, 1].tolist() == [255, 128, 255]


def test_video_becomes_an_animation(tmp_path):
    video = np.linspace(0, 1, 4, dtype=np.float32)[:, None, None, None] * np.ones((4, 6, 8, 3), dtype=np.float32)
    path = write_picture(tmp_path / "video.gif", video)
    with Image.open(path) as animation:
        assert (animation.n_frames, animation.size) == (4, (8, 6))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("image.txt", (2, 3, 3), r"picture_format: out must end in \.png.*got '.*image\.txt'"),
        ("image", (2, 3, 3), r"picture_format: out must end in \.png.*got '.*image'"),
        ("video.jpg", (4, 2, 3, 3), r"picture_format: out must end in \.gif.*got '.*video\.jpg'"),
        ("black_and_white.xbm", (2, 3, 3), r"picture_format: out must end in \.png.*got '.*black_and_white\.xbm'"),
        ("needs_a_plugin.bufr", (2, 3, 3), r"picture_format: out must end in \.png.*got '.*needs_a_plugin\.bufr'"),
    ],
)
def test_bad_input(tmp_path, name, shape, message):
    with pytest.raises(ValueError, match=message):
        write_picture(tmp_path / name, np.zeros(shape, dtype=np.float32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp", "a.gif"])
def test_formats_that_are_offered_can_be_written(tmp_path, name):
    path = write_picture(tmp_path / name, np.zeros((4, 6, 3), dtype=np.float32))
    with Image.open(path) as picture:
        assert (picture.size, picture.format) == ((6, 4), picture_format(path))
