"""Exact frames from every kind of file, judged by the numbers on them and by a plain decode."""

import numpy as np
import pytest
import torch

from tests.media.clips import KINDS, decode_sequentially, read_number
from tokenprune.media import index_video, read_video
from tokenprune.media.decode.plan import plan_units

COUNTED = {"h264_avi", "h264_raw"}  # no presentation times: decoded from the start


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_right(kind, clip, truth):
    video = read_video(clip(kind).path, frames=1000, workers=1)

    assert [read_number(frame) for frame in video.frames.numpy()] == clip(kind).numbers
    assert np.array_equal(video.frames.numpy(), truth(kind))
    assert video.indices.tolist() == list(range(len(clip(kind).numbers)))
    assert video.info.frame_count == len(clip(kind).numbers)
    assert video.damaged == 0
    assert video.pts_seconds[0] == 0 and (video.pts_seconds.diff() > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_frames_are_right_in_any_order(kind, clip, truth):
    count = len(clip(kind).numbers)
    wanted = np.random.default_rng(3).integers(0, count, 7).tolist() + [count - 1, 0]
    video = read_video(clip(kind).path, indices=wanted, workers=3)

    assert np.array_equal(video.frames.numpy(), truth(kind)[wanted])
    assert video.indices.tolist() == wanted
    assert video.damaged == 0


@pytest.mark.parametrize("kind", ["h264_open_gop", "hevc_open_gop_mkv", "h264_ts_offset"])
def test_each_frame_alone_is_right(kind, clip, truth):
    for rank in range(10, 44):  # two open groups with their leading pictures
        video = read_video(clip(kind).path, indices=[rank], workers=1)
        assert np.array_equal(video.frames[0].numpy(), truth(kind)[rank]), rank
        assert video.damaged == 0


@pytest.mark.parametrize("kind", ["h264_open_gop", "h264_one_keyframe", "hevc", "vp9", "mpeg4_avi"])
def test_number_of_workers_changes_nothing(kind, clip):
    one = read_video(clip(kind).path, frames=20, workers=1)
    three = read_video(clip(kind).path, frames=20, workers=3)

    assert torch.equal(one.frames, three.frames)
    assert torch.equal(one.indices, three.indices)
    assert torch.equal(one.pts_seconds, three.pts_seconds)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - COUNTED - {"h264_one_frame"}))
def test_few_frames_cost_little_decoding(kind, clip):
    count = len(clip(kind).numbers)
    video = read_video(clip(kind).path, indices=[count // 3], workers=1)
    assert 1 <= video.pictures_decoded <= count * 2 // 3


@pytest.mark.parametrize("kind", ["h264_open_gop", "hevc_open_gop_mkv"])
def test_cut_units_give_the_same(kind, clip, truth, monkeypatch):
    """Long units are cut inside open GOPs; here, wherever they can be."""
    index = index_video(clip(kind).path)
    monkeypatch.setattr("tokenprune.media.decode.plan._wanted", lambda *_: 0.0)
    assert len(plan_units(index, np.arange(72), 2)) > 1 == len(plan_units(index, np.arange(72)))
    video = read_video(clip(kind).path, frames=72, workers=2)
    assert np.array_equal(video.frames.numpy(), truth(kind))
    assert video.damaged == 0


def test_non_reference_frames_are_skipped(clip):
    video = read_video(clip("h264_one_keyframe").path, indices=[60], workers=1)
    assert video.pictures_decoded < 45  # 61 lie on the way; a third of them serve no other


def test_temporal_sub_layers_are_not_skipped(clip):
    assert index_video(clip("hevc").path).skippable
    assert not index_video(clip("hevc_layers").path).skippable


def test_scaled_in_the_decoder(clip):
    path = clip("h264_bframes").path
    video = read_video(path, indices=[3, 50], size=(56, 98), workers=1)

    assert video.frames.shape == (2, 3, 56, 98)
    assert np.array_equal(video.frames.numpy(), decode_sequentially(path, (56, 98))[[3, 50]])


def test_size_rule_sees_the_upright_picture(clip):
    seen = []

    def half(height: int, width: int, frames: int) -> tuple[int, int]:
        seen.append((height, width, frames))
        return height // 2, width // 2

    plain = read_video(clip("h264_bframes").path, frames=1, size=half)
    turned = read_video(clip("h264_rotated").path, frames=1, size=half)

    assert seen == [(112, 192, 1), (112, 192, 1)]
    assert plain.frames.shape == turned.frames.shape == (1, 3, 56, 96)
    assert turned.info.rotation == 270
    assert read_number(turned.frames[0].numpy()) == 0


def test_times_of_uneven_frames(clip):
    steps = np.random.default_rng(5).choice([10, 20, 40, 130, 700], 72)
    expected = (np.cumsum(steps) - steps[0]) / 1000
    for kind in ("h264_uneven", "h264_uneven_mkv"):
        video = read_video(clip(kind).path, frames=72)
        assert video.pts_seconds.numpy() == pytest.approx(expected, abs=1e-9)


def test_times_count_from_the_first_frame(clip):
    video = read_video(clip("h264_ts_offset").path, frames=72)
    assert video.info.start_seconds > 999
    assert video.pts_seconds.numpy() == pytest.approx(np.arange(72) / 30, abs=1e-4)
    joined = read_video(clip("h264_ts_joined").path, frames=96)
    assert joined.pts_seconds.numpy() == pytest.approx(np.arange(96) / 30, abs=1e-3)
