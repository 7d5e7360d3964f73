"""Frames come upright and with square pixels, whatever the file says of how they are stored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.media.clips import HEIGHT, WIDTH, Clip, decode_sequentially, draw, encode, x264
from tokenprune.errors import MediaError
from tokenprune.media import PixelLimits, Rendering, VideoReader, index_video, probe, read_video
from tokenprune.media.index.geometry import Orientation, orientation

ONE = 1 << 16
# How the encoder is given each picture, so that the matrix [a, b, c, d] turns it upright.
TURNS = {
    (1, 0, 0, 1): lambda picture: picture,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (-1, 0, 0, -1): lambda picture: np.rot90(picture, 2),
    (0, 1, -1, 0): lambda picture: np.rot90(picture, 1),
    (0, -1, 1, 0): lambda picture: np.rot90(picture, -1),
    (0, 1, 1, 0): lambda picture: np.transpose(picture, (1, 0, 2)),
    (0, -1, -1, 0): lambda picture: np.rot90(np.transpose(picture, (1, 0, 2)), 2),
}


def with_matrix(clip: Clip, matrix: tuple[float, float, float, float]) -> Path:
    """Write a display matrix into the header of an MP4's track."""
    a, b, c, d = (round(value * ONE) for value in matrix)
    content = bytearray(clip.path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    for cell, value in enumerate([a, b, 0, c, d, 0, 0, 0, 1 << 30]):
        content[at + 4 * cell : at + 4 * cell + 4] = value.to_bytes(4, "big", signed=True)
    clip.path.write_bytes(content)
    return clip.path


@pytest.mark.parametrize("matrix", TURNS)
@pytest.mark.parametrize("worker_kind", ["thread", "process"])
def test_all_eight_orientations_come_upright(matrix, worker_kind, tmp_path):
    clip = encode(tmp_path / "a.mp4", numbers=range(3), options=x264("qp=10"), turn=TURNS[matrix])
    path = with_matrix(clip, matrix)
    video = read_video(path, frames=3, worker_kind=worker_kind)
    assert video.frames.shape == (3, 3, HEIGHT, WIDTH)
    assert (video.info.height, video.info.width) == (HEIGHT, WIDTH)
    stored = TURNS[matrix](draw(0)).shape
    assert (video.info.stored_height, video.info.stored_width) == stored[:2]
    for number, frame in enumerate(video.frames.permute(0, 2, 3, 1).numpy()):
        error = np.abs(frame.astype(int) - draw(number))
        assert error.mean() < 8  # a wrong turn: above 30
    small = read_video(path, frames=1, size=(56, 96)).frames[0].permute(1, 2, 0).numpy()
    assert np.abs(small.astype(int) - draw(0)[::2, ::2]).mean() < 12


def test_orientations_by_number():
    found = {(a, b, c, d): orientation((a, b, 0, c, d, 0, 0, 0, 1 << 30)) for a, b, c, d in TURNS}
    assert set(found.values()) == {
        Orientation(mirrored, turn) for mirrored in (False, True) for turn in (0, 90, 180, 270)
    }


@pytest.mark.parametrize(
    "matrix", [(0.9, 0.4, -0.4, 0.9), (1, 0, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1)]
)
def test_other_matrices_warn_and_leave_frames_as_stored(matrix, tmp_path):
    clip = encode(tmp_path / "a.mp4", numbers=range(3), options=x264("bframes=0"))
    truth = decode_sequentially(clip.path)
    path = with_matrix(clip, matrix)
    with pytest.warns(UserWarning, match=r"a\.mp4' asks for frames to be skewed.* as they are"):
        video = read_video(path, frames=3)
    assert np.array_equal(video.frames.numpy(), truth)
    assert video.info.rotation == 0 and not video.info.mirrored


def squeezed(folder: Path, ratio: str, turn=None, **settings) -> Path:
    options = x264(f"sar={ratio}:qp=10") | settings
    return encode(folder / "a.mp4", numbers=range(3), options=options, turn=turn).path


def test_frames_come_with_square_pixels(tmp_path):
    """Stored at half of their width."""
    path = squeezed(tmp_path, "2/1", turn=lambda picture: picture[:, ::2])
    info = probe(path)
    assert (info.height, info.width) == (HEIGHT, WIDTH)
    assert (info.stored_height, info.stored_width, info.pixel_aspect) == (HEIGHT, WIDTH // 2, 2)
    frame = read_video(path, frames=1).frames[0].permute(1, 2, 0).numpy()
    assert np.abs(frame.astype(int) - draw(0)).mean() < 8


def test_frames_as_stored(tmp_path):
    path = squeezed(tmp_path, "4/3")
    reader = VideoReader(path, rendering=Rendering(aspect="stored"))
    assert (reader.info.height, reader.info.width) == (HEIGHT, WIDTH)
    assert np.array_equal(reader.read(frames=3).frames.numpy(), decode_sequentially(path))
    assert reader.info.pixel_aspect == pytest.approx(4 / 3)


def test_rules_for_sizes_see_the_displayed_size(tmp_path):
    path = squeezed(tmp_path, "3/1")
    seen = []

    def rule(height, width, frames):
        seen.append((height, width))
        return PixelLimits(min_pixels=28 * 28)(height, width, frames)

    video = read_video(path, frames=2, size=rule)
    assert set(seen) == {(HEIGHT, 3 * WIDTH)}
    assert video.frames.shape[2:] == (112, 588)


def test_turned_frames_are_widened_before_they_are_turned(tmp_path):
    clip = encode(
        tmp_path / "a.mp4",
        numbers=range(2),
        options=x264("sar=2/1"),
        turn=lambda picture: np.rot90(picture, 1)[:, ::2],
    )
    path = with_matrix(clip, (0, 1, -1, 0))
    info = index_video(path).info
    assert (info.height, info.width) == (HEIGHT, WIDTH)
    assert (info.stored_height, info.stored_width) == (WIDTH, HEIGHT // 2)
    frame = read_video(path, frames=1).frames[0].permute(1, 2, 0).numpy()
    assert np.abs(frame.astype(int) - draw(0)).mean() < 20


@pytest.mark.parametrize("ratio", ["1/1", "100/1", "1/100"])
def test_pixels_that_no_screen_has_count_as_square(ratio, tmp_path):
    info = probe(squeezed(tmp_path, ratio))
    assert (info.width, info.pixel_aspect) == (WIDTH, 1)


def test_other_aspects_fail():
    with pytest.raises(MediaError, match='aspect must be "displayed" or "stored", got \'wide\''):
        Rendering(aspect="wide")
    for name in ("deinterlace", "tone_map"):
        with pytest.raises(MediaError, match=f"{name} must be True or False, got 'no'"):
            Rendering(**{name: "no"})


def test_the_index_tells_sizes_of_plain_files(clip):
    info = probe(clip("h264_bframes").path)
    assert (info.stored_height, info.stored_width) == (info.height, info.width)
    assert torch.equal(
        read_video(clip("h264_bframes").path, frames=2).frames,
        read_video(
            clip("h264_bframes").path, frames=2, rendering=Rendering(aspect="stored")
        ).frames,
    )
