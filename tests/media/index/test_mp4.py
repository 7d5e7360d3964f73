"""The table of an MP4 file: equal to a scan, or not used; wrong tables are found out."""

import dataclasses

import av
import numpy as np
import pytest
import torch

from tests.media.clips import KINDS, read_number
from tokenprune.errors import DecodeError
from tokenprune.media import VideoReader, index_video, read_video, stream_video
from tokenprune.media.index import mp4

TABLES = {
    "h264_bframes": True,
    "h264_sound": True,
    "h264_open_gop": True,
    "h264_one_frame": True,
    "h264_one_keyframe": True,
    "h264_rotated": True,
    "h264_uneven": True,
    "h264_edit_list": True,
    "hevc": True,
    "av1": True,
    "mpeg4": True,
    "h264_fragmented": False,
    "h264_mkv": False,
    "h264_ts_offset": False,
}
COLUMNS = ("pts", "dts", "size", "keyframe", "place", "epoch", "order", "seconds")


@pytest.mark.parametrize("kind", TABLES)
def test_table_tells_what_a_scan_tells(kind, clip):
    assert kind in KINDS
    found = index_video(clip(kind).path)
    scanned = index_video(clip(kind).path, scan=True)

    assert found.scanned is not TABLES[kind] and scanned.scanned
    for name in COLUMNS:
        assert np.array_equal(getattr(found, name), getattr(scanned, name)), name
    assert found.info == scanned.info


def test_first_group_needs_no_pass_over_the_file(clip):
    path = clip("h264_all_intra").path
    index = index_video(path)
    assert not index.scanned
    total = int(index.size.sum())
    stream = stream_video(path, frames=72, group=4, first_group=1, workers=1)
    assert next(stream).bytes_read < total / 3
    stream.close()


def wrong(table):
    """The table with the times of two pictures exchanged, far behind its first packets."""
    shift = table.shift.copy()
    shift[[60, 61]] = shift[[61, 60]] + np.array([512, -512])
    return dataclasses.replace(table, shift=shift)


def test_wrong_table_is_found_out(clip, monkeypatch):
    path = clip("h264_bframes").path
    right = read_video(path, frames=72)
    good = mp4.sample_table
    monkeypatch.setattr("tokenprune.media.index.build.sample_table", lambda *_: wrong(good(*_)))

    assert not np.array_equal(index_video(path).pts, index_video(path, scan=True).pts)
    assert index_video(path).timed
    video = read_video(path, frames=72)
    assert torch.equal(video.frames, right.frames)
    assert [read_number(frame) for frame in video.frames.numpy()] == clip("h264_bframes").numbers


def test_wrong_table_is_found_out_in_a_stream(clip, monkeypatch):
    """What is still due is decoded by a scan."""
    path = clip("h264_bframes").path
    good = mp4.sample_table
    monkeypatch.setattr("tokenprune.media.index.build.sample_table", lambda *_: wrong(good(*_)))

    reader = VideoReader(path, workers=2)
    groups = list(reader.stream(frames=72, group=5, first_group=3))
    assert reader.index.scanned
    assert [len(group) for group in groups] == [3, *[5] * 13, 4]
    numbers = [read_number(frame) for group in groups for frame in group.frames.numpy()]
    assert numbers == clip("h264_bframes").numbers
    assert [group.indices[0].item() for group in groups] == [0, *range(3, 72, 5)]
    read = [group.bytes_read for group in groups]
    assert read == sorted(read) and groups[-1].pictures_decoded >= 72


def test_wrong_table_after_frames_that_a_scan_does_not_know(clip, monkeypatch):
    path = clip("h264_bframes").path
    good = mp4.sample_table

    def wrong_early(*arguments):
        table = wrong(good(*arguments))
        return dataclasses.replace(table, discard=np.arange(len(table.size)) > 65)

    monkeypatch.setattr("tokenprune.media.index.build.sample_table", wrong_early)
    stream = stream_video(path, frames=10, group=2, workers=1)
    with pytest.raises(DecodeError, match=r"table of packets in .*mp4' is wrong.*after \d+ frames"):
        list(stream)


def test_counts_beyond_the_table_are_not_believed(clip, tmp_path):
    """They would be taken for gigabytes."""
    whole = clip("h264_bframes").path
    content = whole.read_bytes()
    for box, place in {b"elst": 8, b"stts": 12, b"ctts": 12, b"stsz": 12}.items():
        damaged = bytearray(content)
        damaged[content.index(box) + place] |= 0x40
        path = tmp_path / f"{box.decode()}.mp4"
        path.write_bytes(damaged)
        with av.open(str(whole)) as container:
            stream = container.streams.video[0]
            assert mp4.sample_table(str(whole), stream) is not None
            assert mp4.sample_table(str(path), stream) is None, box


def test_table_at_odds_with_its_first_packets_is_not_used(clip, monkeypatch):
    path = clip("h264_bframes").path
    good = mp4.sample_table

    def shorter(*arguments):
        table = good(*arguments)
        return dataclasses.replace(table, size=table.size - 1)

    monkeypatch.setattr("tokenprune.media.index.build.sample_table", shorter)
    assert index_video(path).scanned


def test_cut_file_is_scanned(clip):
    path = clip("h264_bframes").path
    content = path.read_bytes()
    start, end = content.index(b"moov") - 4, content.rindex(b"mdat")
    if start < end:
        pytest.fail("the clip's table should come last")
    # The table moved on, past the end of the data that remains.
    head, moov = content[: len(content) // 2], content[start:]
    cut = path.with_name("cut_data.mp4")
    mdat = content.index(b"mdat") - 4
    size = len(head) - mdat
    cut.write_bytes(content[:mdat] + size.to_bytes(4, "big") + head[mdat + 4 :] + moov)
    assert index_video(cut).scanned
