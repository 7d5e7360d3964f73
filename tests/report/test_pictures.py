"""Pictures of what was kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.methods.doubles import grid, join, sound
from tokenprune import prune
from tokenprune.errors import MediaError
from tokenprune.report.pictures import check_picture, overlay, save_picture
from tokenprune.testing.tiny import build

GAP = 4


def white(frames: int, height: int = 96, width: int = 160) -> Tensor:
    return torch.full((frames, 3, height, width), 255, dtype=torch.uint8)


def centers(picture: Image.Image, rows: int, columns: int, left: int = 0, top: int = 0,
            height: int = 96, width: int = 160) -> Tensor:  # fmt: skip
    """Brightness in the middle of each cell of a frame, `[rows, columns]` in [0, 1]."""
    values = np.asarray(picture.convert("L")).astype(float) / 255
    y = top + ((np.arange(rows) + 0.5) * height / rows).astype(int)
    x = left + ((np.arange(columns) + 0.5) * width / columns).astype(int)
    return torch.from_numpy(values[np.ix_(y, x)])


def test_dropped_tokens_are_dark():
    layout = grid(3, 5)
    presence = torch.ones(15)
    presence[[0, 7, 14]] = 0.0
    presence[4] = 0.5
    picture = overlay(layout, presence, white(1))

    assert picture.mode == "RGB" and picture.size == (160, 96)
    light = centers(picture, 3, 5).flatten()
    assert light[[0, 7, 14]].max() < 0.2
    assert light[4] == pytest.approx(0.16 + 0.84 * 0.5, abs=0.02)
    rest = [number for number in range(15) if number not in (0, 4, 7, 14)]
    assert light[rest].min() > 0.98


def test_frames_lie_side_by_side():
    layout = grid(2, 2, frames=6, video=True)
    presence = torch.ones(24)
    presence[4 * 4 + 3] = 0.0  # frame 4, last cell
    picture = overlay(layout, presence, white(6), columns=3)

    assert picture.size == (3 * 160 + 2 * GAP, 2 * 96 + GAP)
    for frame in range(6):
        left, top = frame % 3 * (160 + GAP), frame // 3 * (96 + GAP)
        light = centers(picture, 2, 2, left, top)
        assert (light[1, 1] < 0.2) == (frame == 4)
        assert light[0].min() > 0.98
    assert picture.getpixel((162, 50)) == (255, 255, 255)


@pytest.mark.parametrize("frames, canvases", [(6, 3), (5, 3), (1, 1), (7, 4)])
def test_frames_may_share_a_canvas(frames, canvases):
    layout = grid(1, 1, frames=canvases, video=True)
    for dark in range(canvases):
        presence = torch.ones(canvases)
        presence[dark] = 0.0
        picture = overlay(layout, presence, white(frames), columns=frames)
        found = [
            number
            for number in range(frames)
            if float(centers(picture, 1, 1, number * (160 + GAP))) < 0.2
        ]
        assert found == [number for number in range(frames) if number // 2 == dark]


def test_many_frames_are_thinned_out_and_shrunk():
    layout = grid(2, 2, frames=200, video=True)
    picture = overlay(layout, torch.ones(800), white(200))

    assert max(picture.size) <= 1600
    assert picture.size[0] > 800 and picture.size[1] > 400


def test_small_pictures_are_enlarged_without_blur():
    picture = overlay(grid(2, 2), torch.tensor([1.0, 0.0, 1.0, 1.0]), white(1, 20, 32))

    assert picture.size == (192, 120)
    light = centers(picture, 2, 2, height=120)
    assert light[0, 1] < 0.2 and light.flatten()[[0, 2, 3]].min() > 0.98


def test_colours_stay():
    frames = torch.zeros(1, 3, 60, 200, dtype=torch.uint8)
    frames[:, 0] = 200
    picture = overlay(grid(1, 1), torch.ones(1), frames)

    assert picture.getpixel((100, 30)) == (200, 0, 0)


@pytest.mark.parametrize("kind", ["tensor", "pil", "list", "one", "arrays", "array"])
def test_frames_of_all_kinds(kind):
    layout = grid(2, 2)
    frames = white(1)
    array = frames[0].permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    given = {
        "tensor": frames,
        "pil": [picture.convert("RGBA")],
        "list": [picture],
        "one": picture,
        "arrays": [array],
        "array": array[None],
    }[kind]

    expected = overlay(layout, torch.zeros(4), frames)
    assert np.array_equal(np.asarray(overlay(layout, torch.zeros(4), given)), np.asarray(expected))


def test_images_of_different_size():
    layout = join(grid(2, 2), grid(3, 1))
    pictures = [Image.new("RGB", (200, 100), "white"), Image.new("RGB", (160, 240), "white")]
    presence = torch.ones(7)
    presence[4] = 0.0  # the top of the second one
    picture = overlay(layout, presence, pictures, columns=2)

    assert picture.size == (200 * 2 + GAP, 240)
    assert centers(picture, 2, 2, height=100, width=200).min() > 0.98
    light = centers(picture, 3, 1, left=204, height=240)
    assert light[0, 0] < 0.2 and light[1:].min() > 0.98


def test_tiles_that_each_have_a_picture_are_all_drawn():
    layout = replace(grid(1, 2, frames=4), item=torch.zeros(8, dtype=torch.int64))
    assert layout.canvas.unique().tolist() == [0, 1, 2, 3] and (layout.frame == -1).all()
    presence = torch.ones(8)
    presence[[1, 4]] = 0.0  # of the first tile the right one, of the third the left one
    picture = overlay(layout, presence, white(4), columns=2)
    light = [
        centers(picture, 1, 2, number % 2 * (160 + GAP), number // 2 * (96 + GAP)).flatten()
        for number in range(4)
    ]
    assert (torch.cat(light) < 0.2).nonzero()[:, 0].tolist() == [1, 4]
    # One picture for all of them shows the first, which with most families is the whole.
    light = centers(overlay(layout, presence, white(1)), 1, 2).flatten()
    assert (light < 0.2).tolist() == [False, True]


def test_sounds_are_left_out():
    layout = join(sound(5), grid(2, 2))
    presence = torch.tensor([0.0] * 5 + [1.0] * 4)

    assert centers(overlay(layout, presence, white(1)), 2, 2).min() > 0.98


def test_nothing_to_draw_fails():
    with pytest.raises(MediaError, match="got 0 frames and 1 canvases"):
        overlay(grid(2, 2), torch.ones(4), white(0))
    with pytest.raises(MediaError, match="got 1 frames and 0 canvases"):
        overlay(sound(5), torch.ones(5), white(1))
    with pytest.raises(MediaError, match="got 0 frames"):
        overlay(grid(2, 2), torch.ones(4), [])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl_video", "llava_onevision"])
def test_the_overlay_of_a_report(name):
    tiny = build(name)
    with torch.no_grad(), prune(tiny.model, "random(keep=0.25)") as report:
        tiny.model(**tiny.inputs())
    layout = report.last.layouts[0]
    canvases = len(set(layout.canvas.tolist()))
    rows, columns = int(layout.row.max()) + 1, int(layout.column.max()) + 1
    picture = report.overlay(white(canvases), columns=canvases)

    assert picture.size[0] == canvases * (160 + GAP) - GAP  # not shrunk
    light = [
        centers(picture, rows, columns, number * (160 + GAP)).flatten()
        for number in range(canvases)
    ]
    bright = (torch.cat(light) > 0.98).nonzero()[:, 0]
    kept = report.last.decisions[0].kept
    assert bright.tolist() == torch.isin(layout.position, kept).nonzero()[:, 0].tolist()


# -- files


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_pictures_are_written(suffix, tmp_path):
    path = tmp_path / f"kept{suffix}"
    save_picture(Image.new("RGB", (8, 6)), path)
    with Image.open(path) as picture:
        assert picture.size == (8, 6)


def test_paths_that_cannot_be_written_fail(tmp_path):
    for name in ("kept", "kept.mp4", "kept.txt", ".png"):
        with pytest.raises(MediaError, match="suffix must name a format; use .png, .jpg or .webp"):
            check_picture(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    for name in ("folder.png", "nothing/kept.png"):
        with pytest.raises(MediaError, match="in a folder that exists and may be written to"):
            save_picture(Image.new("RGB", (8, 6)), tmp_path / name)


def test_a_failure_to_write_fails(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(MediaError, match="kept.png'.*No space left on device"):
        save_picture(Image.new("RGB", (8, 6)), tmp_path / "kept.png")
