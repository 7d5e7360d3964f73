"""Animated pictures: videos with the times of their own frames, on white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media.clips import draw, read_number
from tokenprune.errors import DecodeError, MediaError
from tokenprune.media import (
    Limits,
    VideoReader,
    index_video,
    probe,
    read_picture,
    read_video,
    stream_video,
    use_limits,
)

DURATIONS = [100, 40, 250, 1000, 40, 60, 500]  # ms
BEGINS = [0.0, 0.1, 0.14, 0.39, 1.39, 1.43, 1.49]
FORMS = {
    "gif": {},
    "png": {},
    "webp": {"lossless": True},
    "avif": {"quality": 95},
}


def animate(path: Path, durations: list[int] = DURATIONS, **settings: object) -> Path:
    frames = [Image.fromarray(draw(n)) for n in range(len(durations))]
    options = FORMS[path.suffix[1:]] | settings
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **options)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_frames_and_their_times(form, tmp_path):
    path = animate(tmp_path / f"a.{form}")
    video = read_video(path, frames=100)

    assert [read_number(frame) for frame in video.frames.numpy()] == list(range(7))
    assert video.pts_seconds.numpy() == pytest.approx(BEGINS, abs=1e-3)
    info = video.info
    assert (info.frame_count, info.codec, info.has_audio) == (7, form, False)
    assert info.duration_seconds == pytest.approx(1.99, abs=1e-3)
    assert info.average_fps == pytest.approx(7 / 1.99, rel=1e-3)
    assert (info.height, info.width) == draw(0).shape[:2]
    assert read_picture(path) is None and probe(path) == info


@pytest.mark.parametrize("form", FORMS)
def test_frames_are_chosen_as_of_any_video(form, tmp_path):
    reader = VideoReader(animate(tmp_path / f"a.{form}"))

    def numbers(**request: object) -> list[int]:
        return [read_number(frame) for frame in reader.read(**request).frames.numpy()]

    assert numbers(indices=[5, 0, 5]) == [5, 0, 5]
    assert numbers(seconds=[0.38, 0.4, 1.9]) == [2, 3, 6]
    assert numbers(fps=2) == [0, 3, 6]  # at 0, 0.5, 1 and 1.5 seconds
    assert numbers(start=0.39, end=1.4, frames=9) == [3, 4]
    assert reader.read(frames=2, size=(28, 48)).frames.shape == (2, 3, 28, 48)
    groups = list(stream_video(reader.info.path, group=3, frames=7))
    assert [len(group) for group in groups] == [3, 3, 1]
    assert [read_number(f) for group in groups for f in group.frames.numpy()] == list(range(7))


@pytest.mark.parametrize("form", ["gif", "png", "webp"])
def test_frames_without_a_time_last_as_browsers_show_them(form, tmp_path):
    path = animate(tmp_path / f"a.{form}", [0, 10, 20, 0])
    assert read_video(path).pts_seconds.tolist() == pytest.approx([0, 0.1, 0.2, 0.22])
    assert probe(path).duration_seconds == pytest.approx(0.32)


@pytest.mark.parametrize("form", FORMS)
def test_animations_lie_on_white(form, tmp_path):
    frames = []
    for n in range(4):
        drawn = np.zeros((48, 64, 4), np.uint8)
        drawn[8 * n : 8 * n + 8] = (40 * n, 20, 10, 255)
        frames.append(Image.fromarray(drawn))
    path = tmp_path / f"a.{form}"
    disposal = {"gif": {"disposal": 2}, "png": {"disposal": 1}}.get(form, {})
    settings = FORMS[form] | disposal | {"duration": 100}
    frames[0].save(path, save_all=True, append_images=frames[1:], **settings)

    for n, frame in enumerate(read_video(path).frames.permute(0, 2, 3, 1).numpy().astype(int)):
        bars = np.zeros(48, bool)
        bars[8 * n : 8 * n + 8] = True
        assert np.abs(frame[8 * n + 2 : 8 * n + 6] - (40 * n, 20, 10)).max() < 16
        assert frame[~bars][::8].min() > 230
    black = read_video(path, background="black").frames
    assert black[0, :, 30].max() < 20


def test_a_picture_for_programs_that_know_no_apng_is_no_frame(tmp_path):
    frames = [Image.fromarray(draw(n)) for n in range(3)]
    path = tmp_path / "a.png"
    cover = Image.new("RGB", frames[0].size, "red")
    cover.save(path, save_all=True, append_images=frames, default_image=True, duration=200)
    assert [read_number(frame) for frame in read_video(path).frames.numpy()] == [0, 1, 2]
    assert probe(path).duration_seconds == pytest.approx(0.6)

    cover.save(path, save_all=True, append_images=frames[:1], default_image=True)
    assert read_picture(path) is not None  # one frame is no animation


def test_a_video_in_an_animation_of_one_frame_is_a_picture(tmp_path):
    for form in FORMS:
        Image.fromarray(draw(3)).save(tmp_path / f"a.{form}", save_all=True)
        assert read_picture(tmp_path / f"a.{form}") is not None
        assert len(read_video(tmp_path / f"a.{form}")) == 1


def test_what_is_left_of_a_cut_animation(tmp_path):
    path = animate(tmp_path / "a.gif")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    video = read_video(path)
    assert 2 <= len(video) < 7
    assert [read_number(frame) for frame in video.frames.numpy()] == list(range(len(video)))
    assert index_video(path).error
    path.write_bytes(whole[:2000])
    with pytest.raises(DecodeError, match="cannot read"):
        read_video(path)


def test_animations_have_limits(tmp_path):
    path = animate(tmp_path / "a.webp")
    with (
        use_limits(Limits(frames=6)),
        pytest.raises(
            MediaError, match=r"7 frames of .*a.webp' are more than the limit of 6; .*MAX_FRAMES=7"
        ),
    ):
        read_video(path)
    with use_limits(Limits(pixels=100)), pytest.raises(MediaError, match="more than the limit of"):
        read_video(path)


def test_other_backends_refuse_animations(tmp_path):
    pytest.importorskip("torchcodec")
    with pytest.raises(DecodeError, match="only MP4 and Matroska"):
        read_video(animate(tmp_path / "a.gif"), backend="torchcodec")


def test_a_still_picture_is_a_video_of_one_frame(tmp_path):
    drawn = np.zeros((20, 30, 4), np.uint8)
    Image.fromarray(drawn).save(tmp_path / "a.png")
    video = read_video(tmp_path / "a.png")
    assert len(video) == 1 and (video.frames == 255).all()
    assert video.pts_seconds.tolist() == [0.0]
