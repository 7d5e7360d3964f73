"""What is asked and what comes back; groups, threads, errors."""

import os
import threading
import time

import numpy as np
import pytest
import torch

from tests.media.clips import read_number
from tokenprune.errors import DecodeError, MediaError
from tokenprune.media import Clip, Video, index_video, probe, read_video, stream_video
from tokenprune.media.decode.frames import Resizer
from tokenprune.media.decode.pool import FrameDecoder
from tokenprune.media.decode.rows import _block
from tokenprune.media.reader import group_bounds


def workers_alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenprune")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert workers_alive() == []


def test_probe(clip):
    info = probe(str(clip("h264_sound").path))

    assert (info.width, info.height, info.frame_count) == (192, 112, 72)
    assert info.duration_seconds == pytest.approx(2.4, abs=1e-3)
    assert info.average_fps == pytest.approx(30, abs=0.02)
    assert info.codec == "h264" and "mp4" in info.container
    assert info.has_audio and not probe(clip("vp9").path).has_audio
    assert info.path == str(clip("h264_sound").path)


def test_frames_are_spread_over_the_video(clip):
    path = clip("h264_bframes").path
    assert read_video(path, frames=4).indices.tolist() == [0, 24, 47, 71]
    assert read_video(path, frames=1).indices.tolist() == [0]
    assert len(read_video(path)) == 64
    assert read_video(path, frames=500).indices.tolist() == list(range(72))
    assert read_video(path, frames=3, start=1, end=2).indices.tolist() == [30, 45, 59]


def test_fps_takes_the_frame_on_screen(clip):
    path = clip("h264_bframes").path
    assert read_video(path, fps=2).indices.tolist() == [0, 15, 30, 45, 60]
    assert read_video(path, fps=4, start=1.01, end=1.6).indices.tolist() == [30, 37, 45]
    assert read_video(path, fps=1000, end=0.1).indices.tolist() == [0, 1, 2]
    uneven = read_video(clip("h264_uneven").path, fps=3)
    times = index_video(clip("h264_uneven").path).seconds
    expected = {max(np.flatnonzero(times <= k / 3 + 1e-6)) for k in range(int(times[-1] * 3) + 1)}
    assert set(uneven.indices.tolist()) >= expected


def test_seconds_take_the_frame_on_screen(clip):
    video = read_video(clip("h264_bframes").path, seconds=[2.0, 0.0, 0.999, 1.0, 2.4])
    assert video.indices.tolist() == [60, 0, 29, 30, 71]
    assert [read_number(frame) for frame in video.frames.numpy()] == [60, 0, 29, 30, 71]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "frames must be a whole number of at least 1, got 0"),
        ({"frames": -3}, "frames must be a whole number of at least 1, got -3"),
        ({"frames": 2.5}, "frames must be a whole number of at least 1, got 2.5"),
        ({"fps": 0}, "fps must be a number above 0, got 0"),
        ({"fps": -1.0}, "fps must be a number above 0, got -1.0"),
        ({"fps": float("nan")}, "fps must be a number above 0, got nan"),
        ({"frames": 4, "fps": 1}, "give one of .*, got frames and fps"),
        ({"indices": []}, "indices must name at least one frame"),
        ({"indices": [3, 72]}, r"indices must be whole numbers from 0 to 71 .*, got 72"),
        ({"indices": [-1]}, r"indices must be whole numbers from 0 to 71 .*, got -1"),
        ({"seconds": []}, "seconds must name at least one time"),
        ({"seconds": [9.0]}, r"seconds must lie from 0 to 2\.400 .*, got 9.0"),
        ({"seconds": [float("nan")]}, "seconds must lie from 0"),
        ({"indices": [1], "start": 0.5}, "start and end go with frames or fps, not with indices"),
        ({"start": 2, "end": 1}, "start and end must satisfy .*got start=2 end=1"),
        ({"start": -1}, "start and end must satisfy .*got start=-1"),
        ({"start": 5}, r"start < 2\.400 .*got start=5"),
        ({"size": (0, 5)}, r"size must be \(height, width\), .*got \(0, 5\)"),
        ({"size": (5,)}, r"size must be \(height, width\), .*got \(5,\)"),
        (
            {"size": lambda height, width, frames: (height / 2, width)},
            r"size must be .*\(56\.0, 192\)",
        ),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_wrong_request_fails(arguments, message, clip):
    for reader in (read_video, stream_video):
        with pytest.raises(MediaError, match=message) as caught:
            reader(clip("h264_bframes").path, **arguments)
        assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_video_knows_itself(clip):
    video = read_video(clip("h264_bframes").path, frames=3)

    assert video.frames.dtype == torch.uint8 and video.frames.is_contiguous()
    assert video.pts_seconds.dtype == torch.float64 and video.indices.dtype == torch.int64
    assert len(video) == 3 and "frames=[3, 3, 112, 192]" in repr(video)
    assert video.timings.index_seconds > 0 and video.timings.decode_seconds > 0
    with pytest.raises(MediaError, match=r"indices must be \[3\]"):
        type(video)(**{**vars(video), "indices": video.indices[:2]})


class Evenly(Clip):
    """Frames of no file, eight of which last a second."""

    source_fps = 8.0


def test_a_clip_needs_no_file(clip):
    frames, indices = torch.zeros(3, 3, 8, 12, dtype=torch.uint8), torch.tensor([0, 2, 6])
    made = Evenly(frames, torch.tensor([0.0, 0.26, 0.74], dtype=torch.float64), indices)
    metadata = made.metadata

    assert len(made) == 3 and repr(made) == "Evenly(frames=[3, 3, 8, 12])"
    assert made.even_indices.tolist() == metadata.frames_indices == [0, 2, 6]
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (7, 8.0, 7 / 8)
    assert (metadata.height, metadata.width) == (8, 12)
    video = read_video(clip("h264_bframes").path, frames=3)
    assert isinstance(video, Clip) and video.source_fps == video.info.average_fps


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": torch.zeros(3, 8, 12)}, r"frames must be \[F, 3, H, W\], got \[3, 8, 12\]"),
        ({"pts_seconds": torch.zeros(2)}, r"pts_seconds must be \[3\], got \[2\]"),
        ({"indices": torch.zeros(3, 1)}, r"indices must be \[3\], got \[3, 1\]"),
    ],
)
def test_wrong_clips_fail(wrong, message):
    right = {
        "frames": torch.zeros(3, 3, 8, 12, dtype=torch.uint8),
        "pts_seconds": torch.zeros(3, dtype=torch.float64),
        "indices": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(MediaError, match=message):
        Evenly(**{**right, **wrong})


def test_each_frame_of_a_video_is_a_substitute_or_not(clip):
    video = read_video(clip("h264_bframes").path, frames=3)
    with pytest.raises(MediaError, match=r"substituted must be \[3\], got \[2\]"):
        Video(**{**vars(video), "substituted": video.substituted[:2]})


def test_metadata_for_transformers(clip):
    from transformers.video_utils import VideoMetadata

    metadata = read_video(clip("h264_bframes").path, frames=3, size=(56, 84)).metadata

    assert isinstance(metadata, VideoMetadata)
    assert metadata.frames_indices == [0, 36, 71]
    assert metadata.timestamps == pytest.approx([0, 36 / 30, 71 / 30], abs=1e-2)
    assert (metadata.total_num_frames, metadata.width, metadata.height) == (72, 84, 56)


@pytest.mark.parametrize("kind", ["h264_open_gop", "h264_one_keyframe", "h264_raw", "vp9"])
@pytest.mark.parametrize("workers", [1, 3])
def test_stream_gives_the_same_in_groups(kind, workers, clip):
    whole = read_video(clip(kind).path, frames=50, workers=1)
    groups = list(stream_video(clip(kind).path, group=8, frames=50, workers=workers))

    assert [len(group) for group in groups] == [4, 8, 8, 8, 8, 8, 6]
    for name in ("frames", "indices", "pts_seconds"):
        joined = torch.cat([getattr(group, name) for group in groups])
        assert torch.equal(joined, getattr(whole, name))
    assert groups[-1].pictures_decoded <= 72


def test_stream_wants_order(clip):
    for wrong in ([3, 1], [1, 1]):
        with pytest.raises(MediaError, match="delivers frames in order"):
            stream_video(clip("h264_bframes").path, indices=wrong)
    with pytest.raises(MediaError, match="group must be at least 1 frame, got 0"):
        stream_video(clip("h264_bframes").path, group=0)


def test_leaving_a_stream_stops_its_workers(clip):
    stream = stream_video(clip("h264_all_intra").path, group=4, frames=72, workers=3)
    next(stream)
    assert workers_alive()
    stream.close()
    assert workers_alive() == []


def test_window_bounds_memory(clip):
    for kind in ("h264_all_intra", "h264_one_keyframe"):
        index = index_video(clip(kind).path)
        bounds = group_bounds(72, 4, 4)
        with FrameDecoder(
            index, np.arange(72), (112, 192), bounds=bounds, window=8, workers=3
        ) as decoder:
            ahead = 0
            for group in decoder.groups():
                time.sleep(0.01)  # a slow caller: the workers run into the window
                blocks = list(decoder._rows._blocks)
                assert all(4 * block < group.first + 4 + 8 for block in blocks)
                ahead = max(ahead, len(blocks))
            assert ahead > 1  # or there was nothing to bound


def test_large_frames_are_not_piled_up(clip, monkeypatch):
    """Of large ones there is one group ahead, and no more."""
    monkeypatch.setattr("tokenprune.media.decode.pool.AHEAD_BYTES", 1)
    index = index_video(clip("h264_all_intra").path)
    bounds = group_bounds(72, 4, 2)
    with FrameDecoder(
        index, np.arange(72), (112, 192), bounds=bounds, window=12, workers=3
    ) as decoder:
        for group in decoder.groups():
            time.sleep(0.01)
            taken = group.first + len(group.frames)
            assert all(bounds[block] < taken + 4 for block in decoder._rows._blocks)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's accounts")
def test_memory_of_groups_is_given_back():
    """What a thread frees, the allocator might keep for the thread."""

    def resident():
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def work():
        for _ in range(6):
            blocks = []
            for _ in range(3):
                block = _block(16, (448, 448))
                block[:] = 1
                blocks.append(block)
                small.append(np.ones(100_000, np.uint8))  # these stay, between the others
            high.append(resident())

    small: list[object] = []
    high: list[float] = []
    before = resident()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert max(high) - before > 25 and resident() - before < 10  # MiB


def test_a_rate_above_the_file_s_gives_all_frames(clip):
    assert read_video(clip("h264_bframes").path, fps=5000).indices.tolist() == list(range(72))
    part = read_video(clip("h264_bframes").path, fps=5000, start=1.01, end=1.5)
    assert part.indices.tolist() == list(range(30, 45))
    none = read_video(clip("h264_bframes").path, fps=5000, start=1.01, end=1.0100005)
    assert none.indices.tolist() == [30]


def test_a_colon_in_a_name_is_no_protocol(clip, tmp_path, monkeypatch):
    (tmp_path / "12:30.mp4").write_bytes(clip("h264_bframes").path.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert read_video("12:30.mp4", frames=3).indices.tolist() == [0, 36, 71]


def test_processors_are_told_the_time_of_uneven_frames(clip):
    for kind in ("h264_uneven", "h264_edit_list", "h264_ts_offset", "h264_bframes"):
        video = read_video(clip(kind).path, frames=1000)
        told = np.array(video.metadata.timestamps)
        assert np.abs(told - video.pts_seconds.numpy()).max() < 0.51 / video.info.average_fps
        if kind != "h264_uneven":
            assert video.metadata.frames_indices == video.indices.tolist()


def test_worker_error_reaches_the_caller(clip, monkeypatch):
    def fail(*_):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(Resizer, "__call__", fail)
    with pytest.raises(DecodeError, match=r"cannot decode .*\.mp4'.*no more memory"):
        read_video(clip("h264_bframes").path, frames=10, workers=2)


def test_closed_decoder_gives_no_more(clip):
    index = index_video(clip("h264_all_intra").path)
    bounds = group_bounds(72, 4, 4)
    with FrameDecoder(index, np.arange(72), (8, 8), bounds=bounds, window=8, workers=2) as decoder:
        groups = decoder.groups()
        next(groups)
        decoder.close()
        with pytest.raises(DecodeError, match="was closed"):
            list(groups)
