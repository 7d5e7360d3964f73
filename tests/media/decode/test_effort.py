"""When decoding really ran, as a stream reports it."""

from __future__ import annotations

import itertools
import time

import pytest

from tokenprune.media import read_video, stream_video


def length(spans):
    return sum(end - begin for begin, end in spans)


def check(group, began, now):
    spans = group.timings.effort
    assert spans == tuple(sorted(spans)) and spans
    assert all(began <= begin < end <= now for begin, end in spans)


@pytest.mark.parametrize("worker_kind", ["thread", "process"])
@pytest.mark.parametrize("kind", ["h264_all_intra", "h264_one_keyframe", "h264_bframes"])
def test_a_group_reports_when_it_was_decoded(kind, worker_kind, clip):
    began = time.perf_counter()
    groups = []
    for group in stream_video(
        clip(kind).path, group=8, frames=40, workers=1, worker_kind=worker_kind
    ):
        check(group, began, time.perf_counter())
        groups.append(group)
    one_after_the_other = [span for group in groups for span in group.timings.effort]

    # A single worker does one thing at a time, in order.
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(one_after_the_other))
    assert 0 < length(one_after_the_other) <= time.perf_counter() - began


def test_groups_are_decoded_while_the_caller_is_busy(clip):
    stream = stream_video(clip("h264_all_intra").path, group=4, frames=40, workers=2)
    next(stream)
    begin = time.perf_counter()
    time.sleep(0.5)
    end = time.perf_counter()
    ahead = [next(stream) for _ in range(3)]
    behind = [next(stream) for _ in range(2)]

    # As many as the window lets in were ready, and no more: the workers waited for the caller.
    for group in ahead:
        assert group.timings.effort[-1][1] < end
        assert group.timings.decode_seconds < 0.1
    for group in behind:
        assert group.timings.effort[-1][1] > end
        # Time spent waiting is no work.
        assert length(group.timings.effort) < (end - begin) / 2
    stream.close()


def test_a_whole_read_reports_it_too(clip):
    began = time.perf_counter()
    video = read_video(clip("h264_bframes").path, indices=[40, 3, 3], workers=2)

    check(video, began, time.perf_counter())
    assert length(video.timings.effort) <= 2 * video.timings.decode_seconds
