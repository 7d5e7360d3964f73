"""The plan, on packet tables written by hand; seeks that land in the wrong place."""

import numpy as np
import pytest

from tokenprune.media import PacketIndex, VideoInfo, index_video
from tokenprune.media.decode.demux import PacketReader
from tokenprune.media.decode.plan import decode_starts, earlier_start, plan_units


def table(pts, keyframes, epoch=None, timed=True):
    """An index of packets with these times, in decode order."""
    pts = np.array(pts)
    place = np.argsort(np.argsort(pts))
    info = VideoInfo("x", len(pts) / 30, len(pts), 30.0, 8, 8, "h264", "mp4", False, 0, 0.0)
    return PacketIndex(
        info=info,
        pts=pts,
        dts=np.arange(len(pts)),
        size=np.full(len(pts), 100),
        keyframe=np.isin(np.arange(len(pts)), keyframes),
        place=place,
        epoch=np.zeros(len(pts), int) if epoch is None else np.array(epoch),
        order=np.argsort(pts),
        seconds=np.sort(pts) / 30.0,
        timed=timed,
        skippable=True,
        error=None,
    )


CLOSED = table([0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10], [0, 4, 8])
OPEN = table([0, 3, 1, 2, 6, 4, 5, 9, 7, 8], [0, 4])  # 4 and 5 lead keyframe 6


def units(index, ranks):
    return [(u.first, u.last, u.row, u.ranks.tolist()) for u in plan_units(index, np.array(ranks))]


def test_a_unit_runs_from_keyframe_to_target():
    assert units(CLOSED, [5]) == [(4, 6, 0, [5])]
    assert units(CLOSED, [1, 2]) == [(0, 3, 0, [1, 2])]


def test_gops_without_targets_are_left_out():
    assert units(CLOSED, [0, 11]) == [(0, 0, 0, [0]), (8, 9, 1, [11])]


def test_every_frame_is_planned_once():
    planned = plan_units(CLOSED, np.arange(12))
    assert [u.ranks.tolist() for u in planned] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [u.row for u in planned] == [0, 4, 8]
    assert [u.size_bytes for u in planned] == [400, 400, 400]


def test_leading_frames_need_the_gop_before():
    assert decode_starts(OPEN, np.array([5, 7, 0])).tolist() == [0, 4, 0]
    assert units(OPEN, [5]) == [(0, 6, 0, [5])]
    assert units(OPEN, [7]) == [(4, 8, 0, [7])]
    assert units(OPEN, [4, 6, 9]) == [(0, 7, 0, [4, 6, 9])]


def test_no_frame_refers_across_a_discontinuity():
    broken = table(OPEN.pts, [0, 4], epoch=[0] * 4 + [1] * 6)
    assert decode_starts(broken, np.array([5, 7])).tolist() == [4, 4]
    assert earlier_start(broken, 4, 1) == 4
    assert earlier_start(CLOSED, 8, 1) == 4
    assert earlier_start(CLOSED, 8, 9) == 0


def open_gops(count, length):
    """An index of open GOPs: each keyframe is followed by two frames shown before it."""
    pts = [0]
    for group in range(count):
        first = 1 + group * length
        pts += [*range(first, first + length - 3)] if group == 0 else []
        pts += [first + length - 1, first + length - 3, first + length - 2]
        pts += [*range(first + length, first + 2 * length - 3)] if group + 1 < count else []
    keyframes = [0] + [n for n in range(1, len(pts) - 1) if pts[n] > pts[n + 1]]
    return table(pts, keyframes)


def test_long_units_are_cut_for_several_workers():
    index = open_gops(20, 30)
    everything = np.arange(len(index.pts))
    assert len(plan_units(index, everything)) == 1  # leading frames chain all GOPs
    shared = plan_units(index, everything, 2)

    assert 6 <= len(shared) <= 16
    assert np.concatenate([unit.ranks for unit in shared]).tolist() == everything.tolist()
    assert [unit.row for unit in shared] == [unit.ranks[0] for unit in shared]
    assert all(unit.first in index.starts for unit in shared)
    assert all(unit.last >= index.order[unit.ranks].max() for unit in shared)
    total = sum(unit.size_bytes for unit in shared)
    assert index.size.sum() < total < 1.1 * index.size.sum()  # little is decoded twice
    assert max(unit.size_bytes for unit in shared) < 0.3 * total


def test_untimed_files_are_read_from_the_start():
    index = table(range(100), [0, 50], timed=False)
    assert units(index, [60]) == [(0, 99, 0, [60])]


def test_a_file_may_begin_without_keyframe():
    assert units(table([0, 1, 2, 3], [2]), [1, 3]) == [(0, 1, 0, [1]), (2, 3, 1, [3])]


class LateSeeks:
    """A container whose seeks land some seconds too late."""

    def __init__(self, container, late):
        self.container, self.late, self.seeks = container, late, 0

    def __getattr__(self, name):
        return getattr(self.container, name)

    def seek(self, offset, stream):
        self.seeks += 1
        self.container.seek(offset + round(self.late / stream.time_base), stream=stream)


@pytest.mark.parametrize("late", [0.0, 0.7, 5.0])
@pytest.mark.parametrize("kind", ["h264_bframes", "h264_mkv", "h264_ts_offset"])
def test_late_seeks_are_noticed(kind, late, clip, monkeypatch):
    monkeypatch.setattr("tokenprune.media.decode.demux.SEEK_GAP_BYTES", -1)  # always seek
    index = index_video(clip(kind).path)
    reader = PacketReader(index)
    spy = reader._container = LateSeeks(reader._container, late)
    for first in reversed(index.starts.tolist()):
        packets = list(reader.packets(first, first + 2))
        assert [number for number, _ in packets] == [first, first + 1, first + 2]
        assert [packet.pts for _, packet in packets] == index.pts[first : first + 3].tolist()
    assert spy.seeks > 0
    reader.close()
