"""What processors are told of frames that do not come evenly is each frame's own time."""

import numpy as np
import pytest

from tests.media.clips import encode, x264
from tests.media.corpus import CORPUS
from tokenprune.media import VideoInfo, read_video, stream_video
from tokenprune.media.index.clock import clock_rate

SLIDES = [0, 1, 2, 3, 4, 5, 300, 301, 302, 303, 600]  # seconds


@pytest.fixture(scope="module", params=["mp4", "mkv"])
def slides(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / f"slides.{request.param}"
    times = [1000 * second for second in SLIDES]
    options = x264("keyint=4:bframes=0")
    return encode(path, numbers=range(len(SLIDES)), options=options, times=times).path


def test_each_frame_s_own_time_is_told(slides):
    video = read_video(slides, frames=100)
    assert video.pts_seconds.tolist() == pytest.approx(SLIDES, abs=1e-3)
    assert video.metadata.timestamps == pytest.approx(SLIDES, abs=1e-3)
    # The rate, all that some processors take, is the average over the file.
    duration = video.info.duration_seconds
    assert video.metadata.sampled_fps == pytest.approx(len(SLIDES) / duration, rel=1e-4)
    assert video.metadata.duration == duration


def test_chosen_frames_and_groups_are_told_the_same(slides):
    some = read_video(slides, indices=[2, 6, 10])
    assert some.metadata.timestamps == pytest.approx([2, 300, 600], abs=1e-3)
    told = [time for group in stream_video(slides, group=3) for time in group.metadata.timestamps]
    assert told == pytest.approx(SLIDES, abs=1e-3)


def test_one_rate_is_known_to_be_off(slides):
    step, error = read_video(slides, frames=100).pace
    assert step == pytest.approx(600 / 11, rel=0.05)
    assert error > 4 * step


@pytest.mark.parametrize("frames", [2, 7, 72])
def test_one_rate_fits_frames_spread_evenly(frames, clip):
    step, error = read_video(clip("h264_bframes").path, frames=frames).pace
    assert error <= step * 1.01


@pytest.mark.parametrize(
    "kind", ["h264_bframes", "h264_mkv", "h264_ts_offset", "h264_edit_list", "vp9", "mpeg2_ps"]
)
def test_even_frames_are_told_by_rank(kind, clip):
    video = read_video(clip(kind).path, frames=9)
    assert video.metadata.frames_indices == video.indices.tolist()
    assert video.metadata.timestamps == pytest.approx(video.pts_seconds.tolist(), abs=2.1e-3)
    assert video.metadata.fps == pytest.approx(30, abs=0.02)
    assert video.metadata.total_num_frames == video.info.frame_count


@pytest.mark.parametrize("kind", ["h264_ntsc", "h264_ts_joined"])
def test_other_rates(kind, clip, tmp_path):
    path = CORPUS[kind](tmp_path, 90).path if kind in CORPUS else clip("h264_ts_joined").path
    video = read_video(path, frames=1000, size=(8, 8))
    assert np.abs(np.array(video.metadata.timestamps) - video.pts_seconds.numpy()).max() < 2.1e-3


def test_dropped_frames(tmp_path):
    """A screen recorder leaves out what is the same."""
    times = [round(1000 * number / 30) for number in range(200) if number % 7 and number % 31 < 25]
    clip = encode(
        tmp_path / "a.mp4", numbers=range(len(times)), options=x264("bframes=2"), times=times
    )
    video = read_video(clip.path, frames=1000, size=(8, 8))
    told = np.array(video.metadata.timestamps)
    assert told == pytest.approx((np.array(times) - times[0]) / 1000, abs=1e-3)


def test_usual_rates_are_told_as_such():
    """Else a whole second would be told as the one before, where a processor rounds down."""
    for rate in (30.0, 25.0, 24000 / 1001, 30000 / 1001, 59.94, 12.5):
        seconds = np.arange(300) / rate
        found = clock_rate(seconds, rate * (1 + 1e-15))
        assert found == pytest.approx(rate, rel=1e-6)
        if rate in (30.0, 25.0):
            assert int(5 * rate / found) == 5 and found == rate
    assert clock_rate(np.array([0.0, 1.0, 5.0]), 0.5) == 1000


def test_infos_without_a_clock_go_by_their_average():
    info = VideoInfo("x", 3.0, 90, 30.0, 8, 8, "h264", "mp4", False, 0, 0.0)
    assert info.clock == (30.0, 90)
