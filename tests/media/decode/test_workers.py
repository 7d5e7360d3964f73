"""Worker threads and processes: the same frames, no hang, nothing left behind."""

import ast
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.media.clips import read_number
from tokenprune.errors import DecodeError, MediaError
from tokenprune.media import VideoReader, index_video, read_video, stream_video
from tokenprune.media.decode.plan import plan_units
from tokenprune.media.decode.pool import FrameDecoder
from tokenprune.media.decode.rows import Ring
from tokenprune.media.decode.worker import UnitDecoder
from tokenprune.media.reader import group_bounds


def children() -> list[int]:
    """Decoding processes started by this one that are alive, or dead and not waited for."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            command = (entry.parent / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        # The dead have no command; others are not the reader's, such as a compiler's.
        if parent == os.getpid() and (not command or "tokenprune.media" in command):
            found.append(int(entry.parent.name))
    return found


def descriptors() -> set[str]:
    """Open files of this process that have to do with the reader."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if "memfd:tokenprune" in target or target.endswith((".mp4", ".mkv", ".ts", ".webm")):
            found.add(target)
    return found


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    gc.collect()
    assert [t for t in threading.enumerate() if t.name.startswith("tokenprune")] == []
    assert children() == []
    assert descriptors() == set()


@pytest.mark.parametrize("kind", ["h264_open_gop", "h264_one_keyframe", "h264_rotated", "hevc"])
def test_processes_give_the_same(kind, clip):
    path = clip(kind).path
    threads = read_video(path, frames=30, workers=2)
    processes = read_video(path, frames=30, workers=2, worker_kind="process")

    assert torch.equal(processes.frames, threads.frames)
    assert torch.equal(processes.indices, threads.indices)
    assert processes.pictures_decoded == threads.pictures_decoded > 0
    assert processes.bytes_read > 0


def test_processes_stream_through_a_ring(clip):
    path = clip("h264_bframes").path
    whole = read_video(path, frames=72)
    stream = stream_video(path, frames=72, group=5, first_group=2, workers=2, worker_kind="process")
    groups = list(stream)

    assert [len(group) for group in groups] == [2] + [5] * 14
    assert torch.equal(torch.cat([group.frames for group in groups]), whole.frames)


def test_large_frames_stream_through_a_ring(clip, monkeypatch):
    """Its slots are then no more than a group has; what was delivered is not written again."""
    monkeypatch.setattr("tokenprune.media.decode.pool.AHEAD_BYTES", 1)
    path = clip("h264_all_intra").path
    whole = read_video(path, frames=72)
    for first in (2, 4):
        groups = list(
            stream_video(path, frames=72, group=4, first_group=first, worker_kind="process")
        )
        assert torch.equal(torch.cat([group.frames for group in groups]), whole.frames)


def test_shared_memory_outlives_the_reader(clip):
    video = read_video(clip("h264_bframes").path, frames=9, worker_kind="process", workers=1)
    gc.collect()
    numbers = [read_number(frame) for frame in video.frames.numpy()]
    assert numbers == video.indices.tolist()


def test_leaving_a_stream_ends_its_processes(clip):
    stream = stream_video(
        clip("h264_all_intra").path, frames=72, group=4, workers=2, worker_kind="process"
    )
    next(stream)
    assert children()
    stream.close()
    assert children() == []


def test_death_of_a_process_is_noticed(clip):
    stream = stream_video(
        clip("h264_all_intra").path, frames=72, group=4, workers=1, worker_kind="process"
    )
    next(stream)
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(DecodeError, match=r"cannot decode '.*mp4': a decoding process died \(SIGK"):
        list(stream)


def test_death_of_one_of_several_is_noticed(clip):
    stream = stream_video(
        clip("h264_all_intra").path, frames=72, group=4, workers=3, worker_kind="process"
    )
    next(stream)
    os.kill(children()[0], signal.SIGKILL)
    with pytest.raises(DecodeError, match="a decoding process died"):
        list(stream)


def test_a_process_that_hangs_is_given_up(clip):
    stream = stream_video(
        clip("h264_all_intra").path,
        frames=72,
        group=4,
        workers=1,
        worker_kind="process",
        timeout_seconds=0.5,
    )
    next(stream)
    (pid,) = children()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DecodeError, match=r"nothing was decoded for 0.5 seconds"):
        list(stream)


def test_processes_end_with_a_caller_that_was_killed(clip, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, subprocess, time\n"
        "from tokenprune.media import stream_video\n"
        f"stream = stream_video({str(clip('h264_all_intra').path)!r}, frames=72, group=4,"
        " workers=2, worker_kind='process')\n"
        "next(stream)\n"
        "print(subprocess.run(['pgrep', '-P', str(os.getpid()), 'python'], capture_output=True,"
        " text=True).stdout.split(), flush=True)\n"
        "time.sleep(60)\n"
    )
    caller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in ast.literal_eval(caller.stdout.readline())]
    caller.kill()
    caller.communicate()
    assert len(workers) == 2
    end = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_error_in_a_process_reaches_the_caller(clip, tmp_path):
    path = tmp_path / "gone.mp4"
    path.write_bytes(clip("h264_bframes").path.read_bytes())
    reader = VideoReader(path, worker_kind="process", workers=1)
    path.unlink()
    with pytest.raises(MediaError, match="no such file: .*gone.mp4"):
        reader.read(frames=4)


def test_processes_need_no_main_guard(clip, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from tokenprune.media import read_video\n"
        f"video = read_video({str(clip('h264_bframes').path)!r}, frames=5, workers=2,"
        " worker_kind='process')\n"
        "print(video.indices.tolist())\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert (ran.stdout, ran.stderr) == ("[0, 18, 36, 53, 71]\n", "")


def test_processes_load_no_torch(clip):
    stream = stream_video(
        clip("h264_all_intra").path, frames=72, group=4, workers=1, worker_kind="process"
    )
    next(stream)
    (pid,) = children()
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    stream.close()


def test_a_worker_that_hangs_is_given_up(clip, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr("tokenprune.media.decode.pool.CLOSE_SECONDS", 0.1)
    monkeypatch.setattr("tokenprune.media.decode.worker.fill", lambda *_, **__: free.wait() and [])
    begin = time.monotonic()
    with pytest.raises(DecodeError, match=r"nothing was decoded for 0.3 seconds.*timeout_seconds"):
        read_video(clip("h264_bframes").path, frames=4, workers=1, timeout_seconds=0.3)
    assert time.monotonic() - begin < 5
    free.set()
    for thread in threading.enumerate():
        if thread.name.startswith("tokenprune"):
            thread.join(5)


def test_an_error_comes_at_its_frame(clip, monkeypatch):
    """Groups before it arrive, also if their units take longer."""
    path = clip("h264_all_intra").path
    index = index_video(path)
    units = plan_units(index, np.arange(72), 3)
    bad = next(unit for unit in units if unit.row >= 40)
    decode = UnitDecoder.decode

    def fail_at_one(self, unit):
        if unit.row == bad.row:
            raise RuntimeError("no more memory")
        time.sleep(0.05)
        decode(self, unit)

    monkeypatch.setattr(UnitDecoder, "decode", fail_at_one)
    for _ in range(3):
        taken = []
        with pytest.raises(DecodeError, match="no more memory"):
            for group in stream_video(path, frames=72, group=4, first_group=4, workers=3):
                taken += group.indices.tolist()
        assert taken == list(range(bad.row // 4 * 4))


def test_an_error_waits_for_no_unit_behind_it(clip, monkeypatch):
    path = clip("h264_all_intra").path
    free = threading.Event()
    decode = UnitDecoder.decode

    def fail_first(self, unit):
        if unit.row == 0:
            raise RuntimeError("no more memory")
        free.wait(20)
        decode(self, unit)

    monkeypatch.setattr(UnitDecoder, "decode", fail_first)
    monkeypatch.setattr("tokenprune.media.decode.pool.CLOSE_SECONDS", 0.1)
    begin = time.monotonic()
    with pytest.raises(DecodeError, match="no more memory"):
        read_video(path, frames=72, workers=3)
    assert time.monotonic() - begin < 5
    free.set()
    for thread in threading.enumerate():
        if thread.name.startswith("tokenprune"):
            thread.join(5)


def test_streams_of_one_reader_may_be_mixed(clip):
    reader = VideoReader(clip("h264_bframes").path, workers=2)
    pairs = zip(
        reader.stream(frames=72, group=8, first_group=8),
        reader.stream(frames=36, group=4, first_group=4),
        strict=True,
    )
    for whole, half in pairs:
        assert whole.indices.tolist()[0] <= half.indices.tolist()[0]
        assert [read_number(frame) for frame in half.frames.numpy()] == half.indices.tolist()


def test_threads_that_cannot_be_started_leave_nothing(clip, monkeypatch):
    start, started = threading.Thread.start, []

    def limited(thread):
        if started and thread.name.startswith("tokenprune"):
            raise RuntimeError("can't start new thread")
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        read_video(clip("h264_all_intra").path, frames=72, workers=3, worker_kind="process")
    assert len(started) == 1


def test_cores_without_units_serve_the_codec(clip):
    index = index_video(clip("h264_one_keyframe").path)
    bounds = group_bounds(1, 1, 1)
    decoder = FrameDecoder(index, np.array([71]), (8, 8), bounds=bounds, window=1, workers=4)
    worker = decoder._worker(0)
    assert len(decoder._threads) == 1 and worker._decoder._context.thread_count == 4
    worker.close()


def test_a_window_within_a_unit_leaves_cores_to_the_codec(clip):
    """Other workers would wait for it to come to their units."""
    index = index_video(clip("h264_bframes").path)
    units = len(plan_units(index, np.arange(72), 4))
    assert units == 5
    for window, threads, workers in ((8, 4, 2), (30, 2, 3), (72, 1, 4)):
        decoder = FrameDecoder(
            index, np.arange(72), (8, 8), bounds=group_bounds(72, 8, 8), window=window, workers=4
        )
        assert (decoder._codec_threads, len(decoder._threads)) == (threads, workers)


def test_closing_does_not_wait_for_the_unit(clip):
    """A file with one keyframe is one unit, of which only the last frame is wanted."""
    index = index_video(clip("h264_one_keyframe").path)
    bounds = group_bounds(1, 1, 1)
    decoder = FrameDecoder(index, np.array([71]), (112, 192), bounds=bounds, window=1, workers=1)
    decoder._rows.close()
    with decoder:
        pass
    assert decoder.pictures_decoded == 0


@pytest.mark.parametrize("worker_kind", ["thread", "process"])
def test_no_more_is_decoded_and_read_than_planned(worker_kind, clip, monkeypatch):
    monkeypatch.setattr("tokenprune.media.decode.demux.SEEK_GAP_BYTES", -1)  # pass over nothing
    index = index_video(clip("h264_bframes").path)
    for wanted in ([5], [1, 70], [30, 31, 50], list(range(72))):
        units = plan_units(index, np.array(wanted))
        video = read_video(
            clip("h264_bframes").path, indices=wanted, workers=1, worker_kind=worker_kind
        )
        packets = sum(unit.last - unit.first + 1 for unit in units)
        if worker_kind == "thread":  # the patch stays in this process
            assert video.bytes_read == sum(unit.size_bytes for unit in units)
        assert len(wanted) <= video.pictures_decoded <= packets


def test_memory_is_bounded_behind_damage(clip, tmp_path):
    """A frame that cannot be had does not make the reader hold all that follow it."""
    import av

    source = clip("h264_one_keyframe").path
    path = tmp_path / "hole.mp4"
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        hole = next(p for p in packets[10:] if not p.is_keyframe and p.size > 300)
        content[hole.pos + 4 : hole.pos + hole.size] = bytes(hole.size - 4)
    path.write_bytes(content)
    index = index_video(path)
    bounds = group_bounds(72, 4, 4)
    for workers in (1, 2):
        with FrameDecoder(
            index, np.arange(72), (56, 96), bounds=bounds, window=8, workers=workers
        ) as decoder:
            damaged = 0
            for group in decoder.groups():
                assert all(4 * block < group.first + 12 for block in decoder._rows._blocks)
                damaged += int(group.substituted.sum())
            assert 0 < damaged < 72


def test_a_ring_has_no_name():
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    ring = Ring(3, (4, 5), 2)
    assert ring.rows.shape == (3, 3, 4, 5) and ring.counters.shape == (2, 2)
    ring[4][:] = 7
    assert (Ring(3, (4, 5), 2, ring.descriptor).rows[1] == 7).all()
    if os.path.isdir("/dev/shm"):
        assert set(os.listdir("/dev/shm")) == before
    ring.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"worker_kind": "fiber"}, 'worker_kind must be "thread" or "process", got \'fiber\''),
        ({"backend": "guess"}, "backend must be .*, got 'guess'"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0, got 0"),
        (
            {"worker_kind": "process", "backend": "decord"},
            "worker_kind='process' is for our own decoder, but decord",
        ),
    ],
)
def test_wrong_workers_fail(arguments, message, clip):
    for reader in (read_video, stream_video, VideoReader):
        with pytest.raises(MediaError, match=message):
            reader(clip("h264_bframes").path, **arguments)
    for first in (0, 9):
        with pytest.raises(MediaError, match=f"first_group must be from 1 to .*8.*, got {first}"):
            stream_video(clip("h264_bframes").path, first_group=first)


def test_a_reader_reads_as_often_as_wanted(clip):
    reader = VideoReader(clip("h264_bframes").path, workers=2)
    assert len(reader) == 72 and "frames=72" in repr(reader)
    assert reader.read(indices=[50, 3]).indices.tolist() == [50, 3]
    assert sum(len(group) for group in reader.stream(fps=5)) == 12
    assert reader.info.frame_count == 72 and reader.index_seconds > 0
