import json
import math

import numpy as np
import pytest
from PIL import Image

from vision_attn.benchmark.output import table, to_json, write_json, write_picture, write_whole


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.bin"
    seen = []

    def write(file):
        file.write(b"first ")
        file.flush()
        seen.append(path.exists())
        file.write(b"last")

    assert write_whole(path, write) == path
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
        write_whole(path, write)
    assert path.read_bytes() == b"from before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_json_holds_no_bare_infinity(tmp_path):
    path = write_json(tmp_path / "a.json", {"psnr": math.inf, "lost": [math.nan, 1.5], "grid": (2, 3)})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
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
        ("video.jpg", (4, 2, 3, 3), r"write_picture: out must end in \.gif.*got '.*video\.jpg'"),
    ],
)
def test_bad_input(tmp_path, name, shape, message):
    with pytest.raises(ValueError, match=message):
        write_picture(tmp_path / name, np.zeros(shape, dtype=np.float32))
    assert list(tmp_path.iterdir()) == []
