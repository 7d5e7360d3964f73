"""The corpus of hard files: every frame is the right one, whole, alone, and in groups."""

from collections.abc import Callable
from functools import cache

import av
import numpy as np
import pytest
import torch

from tests.media.clips import KINDS, Clip, decode_sequentially, read_number
from tests.media.corpus import CORPUS
from tokenprune.media import read_video, stream_video

SIZE = (112, 192)  # of the frames of most clips; the others are scaled to it
SHORT, LONG = 72, 300
# These are displayed otherwise than a plain decode gives them.
ELSEWISE = {"h264_turned_90", "h264_turned_180"}
INTERLACED = {"h264_bottom_field_first", "mpeg2_ts_interlaced"}
# Their frames have no PTS, or PTS that fall back.
WITHOUT_PTS = {
    "h264_asf",
    "h264_ts_other_size",
    "h264_twin_times",
    "hevc_raw",
    "mpeg1_raw",
    "mpeg2_ps_joined",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Clip]:
    """Gives the clip of a kind with so many frames."""

    @cache
    def make(kind: str, count: int) -> Clip:
        return CORPUS[kind](tmp_path_factory.mktemp(kind), count)

    return make


def numbers_on(frames: torch.Tensor) -> list[int]:
    return [read_number(frame) for frame in frames.numpy()]


def test_kinds_are_many():
    assert KINDS.keys().isdisjoint(CORPUS) and len(KINDS) + len(CORPUS) > 100


@pytest.mark.parametrize("kind", CORPUS)
def test_every_frame_is_right(kind, made):
    clip = made(kind, SHORT)
    video = read_video(clip.path, frames=10_000, size=SIZE, workers=2)

    assert numbers_on(video.frames) == clip.numbers
    assert video.info.frame_count == len(clip.numbers)
    assert video.damaged == 0
    assert (video.pts_seconds.diff() >= 0).all()
    if kind not in ELSEWISE:
        assert np.array_equal(
            video.frames.numpy(),
            decode_sequentially(clip.path, SIZE, deinterlace=kind in INTERLACED),
        )


@pytest.mark.parametrize("kind", CORPUS)
def test_chosen_frames_are_right(kind, made):
    clip = made(kind, SHORT)
    wanted = np.random.default_rng(7).integers(0, len(clip.numbers), 5).tolist()
    video = read_video(clip.path, indices=wanted, size=SIZE, workers=1)

    assert numbers_on(video.frames) == [clip.numbers[rank] for rank in wanted]
    assert video.damaged == 0


@pytest.mark.parametrize("kind", [*KINDS, *CORPUS])
def test_every_gap_is_sought(kind, made, clip, monkeypatch):
    """Short files would be read on in; long ones are not."""
    monkeypatch.setattr("tokenprune.media.decode.demux.SEEK_GAP_BYTES", -1)
    hard = made(kind, SHORT) if kind in CORPUS else clip(kind)
    wanted = list(range(len(hard.numbers) - 1, -1, -11))
    for workers in (1, 3):
        video = read_video(hard.path, indices=wanted, size=SIZE, workers=workers)
        assert numbers_on(video.frames) == [hard.numbers[rank] for rank in wanted]
        assert video.damaged == 0


@pytest.mark.parametrize("kind", CORPUS)
def test_times_are_the_file_s(kind, made):
    """As a plain decode gives PTS, where it gives them to every frame."""
    path = made(kind, SHORT).path
    with av.open(str(path)) as container:
        plain = [frame.time for frame in container.decode(video=0)]
    if None in plain or (np.diff(plain) <= 0).any():
        assert kind in WITHOUT_PTS
        return
    video = read_video(path, frames=10_000, size=(8, 8))
    assert video.pts_seconds.numpy() == pytest.approx(np.array(plain) - plain[0], abs=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("kind", CORPUS)
def test_long_files(kind, made):
    """Many GOPs: few frames, each alone, and a stream on several workers."""
    clip = made(kind, LONG)
    count = len(clip.numbers)
    wanted = np.random.default_rng(1).permutation(count)[:40].tolist()
    video = read_video(clip.path, indices=wanted, size=SIZE, workers=2)
    assert numbers_on(video.frames) == [clip.numbers[rank] for rank in wanted]
    assert video.damaged == 0
    if kind not in ELSEWISE:
        assert np.array_equal(
            video.frames.numpy(),
            decode_sequentially(clip.path, SIZE, deinterlace=kind in INTERLACED)[wanted],
        )
    for frame, rank in zip(video.frames[:10], wanted, strict=False):
        alone = read_video(clip.path, indices=[rank], size=SIZE, workers=1)
        assert torch.equal(alone.frames[0], frame)
    ranks = sorted(wanted)
    seen = []
    for part in stream_video(clip.path, group=7, indices=ranks, size=SIZE, workers=3):
        assert not part.substituted.any()
        seen += numbers_on(part.frames)
    assert seen == [clip.numbers[rank] for rank in ranks]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["h264_ts_offset_5", "h264_twin_times", "hevc_ts", "mpeg1_ps"])
def test_each_frame_alone(kind, made):
    clip = made(kind, SHORT)
    for rank, number in enumerate(clip.numbers):
        alone = read_video(clip.path, indices=[rank], size=SIZE, workers=1)
        assert numbers_on(alone.frames) == [number]


def test_frames_that_share_a_time(made):
    """PTS do not identify them, so they are counted; none is left out."""
    clip = made("h264_twin_times", SHORT)
    assert numbers_on(read_video(clip.path, frames=2).frames) == [0, SHORT - 1]
    assert numbers_on(read_video(clip.path, seconds=[0.0, 0.07]).frames) == [1, 3]
