"""Limits to what is read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenprune.errors import MediaError
from tokenprune.media import Limits, read_video, stream_video, use_limits
from tokenprune.media.limits import check_sound, current_limits


def test_frames_have_limits(clip):
    path = clip("h264_bframes").path
    with use_limits(Limits(frames=5)):
        assert len(read_video(path, frames=5)) == 5
        for attempt in (read_video, stream_video):
            with pytest.raises(MediaError, match=r"6 frames of .* limit of 5.*MAX_FRAMES=6"):
                attempt(path, frames=6)
            with pytest.raises(MediaError, match="64 frames of"):
                attempt(path)


def test_clips_have_limits_but_streams_need_less(clip):
    path = clip("h264_bframes").path
    with use_limits(Limits(clip_bytes=3 * 100 * 100 * 9)):
        assert len(read_video(path, frames=9, size=(100, 100))) == 9
        with pytest.raises(MediaError, match=r"10 frames of 100x100 .* take 300,000 bytes, more"):
            read_video(path, frames=10, size=(100, 100))
        assert len(list(stream_video(path, frames=10, size=(100, 100)))) == 2


def test_sizes_have_limits(clip):
    path = clip("h264_bframes").path
    with (
        use_limits(Limits(pixels=112 * 192 - 1)),
        pytest.raises(MediaError, match="192x112: 21,50"),
    ):
        read_video(path)
    with use_limits(Limits(pixels=112 * 192)), pytest.raises(MediaError, match="more than the lim"):
        read_video(path, size=(112, 193))


def test_sound_has_limits():
    with use_limits(Limits(sound_seconds=2)), pytest.raises(MediaError, match="limit of 2 seconds"):
        check_sound("a.wav", 2.1)
    with use_limits(Limits(sound_seconds=math.inf)):
        check_sound("a.wav", 1e9)


def test_limits_are_numbers(monkeypatch):
    assert Limits(pixels=np.int64(4), frames=torch.tensor(5)) == Limits(pixels=4, frames=5)
    for wrong in (0, -1, True, 2.5, "many", math.nan):
        with pytest.raises(MediaError, match="pixels must be a whole number of at least 1, got"):
            Limits(pixels=wrong)
    with pytest.raises(MediaError, match="sound_seconds must be a number above 0, got 0"):
        Limits(sound_seconds=0)
    monkeypatch.setenv("TOKENPRUNE_MAX_SOUND_SECONDS", "1.5")
    assert current_limits() == Limits(sound_seconds=1.5)
    monkeypatch.setenv("TOKENPRUNE_MAX_FRAMES", "many")
    with pytest.raises(MediaError, match="TOKENPRUNE_MAX_FRAMES must be a number above 0, got 'ma"):
        current_limits()
