"""Damage over a long stretch costs work in proportion to its length, wherever it lies."""

import numpy as np
import pytest

from tests.media.clips import Clip, encode, read_number, x264
from tests.media.decode.test_damage import blanked
from tokenprune.media import read_video, stream_video


@pytest.fixture(scope="module", params=["keyint=1", "keyint=4:min-keyint=4:bframes=2:scenecut=0"])
def long(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    return encode(path, numbers=range(240), options=x264(request.param))


def cut(clip: Clip, name: str, stretch: slice) -> tuple[Clip, int]:
    path, packets = blanked(clip, name, stretch)
    return Clip(path, clip.numbers), sum(packet.size for packet in packets)


@pytest.mark.parametrize("length", [60, 120, 236])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_damaged_start(length, workers, long):
    """The first intact frame stands for all before it; it is looked for once a worker."""
    clip, total = cut(long, f"start{length}_{workers}", slice(None, length))
    video = read_video(clip.path, frames=240, workers=workers)
    numbers = [read_number(frame) for frame in video.frames.numpy()]
    assert numbers == [max(number, length) for number in range(240)]
    assert video.substituted.tolist() == [number < length for number in range(240)]
    assert video.bytes_read < (8 + 8 * workers) * total


def test_work_grows_with_the_stretch(long):
    read = []
    for length in (60, 120, 240 - 4):
        clip, _ = cut(long, f"grows{length}", slice(None, length))
        wanted = list(range(length))
        video = read_video(clip.path, indices=wanted, workers=1)
        assert {read_number(frame) for frame in video.frames.numpy()} == {length}
        read.append(video.pictures_decoded + 1)
    assert read[2] < 6 * read[0] + 200


def test_streams_of_few_frames(long):
    clip, total = cut(long, "few", slice(None, 200))
    groups = list(stream_video(clip.path, frames=60, group=3, workers=2))
    numbers = [read_number(frame) for group in groups for frame in group.frames.numpy()]
    ranks = [rank for group in groups for rank in group.indices.tolist()]
    assert numbers == [max(rank, 200) for rank in ranks]
    assert groups[-1].bytes_read < 30 * total


@pytest.mark.parametrize("stretch", [slice(40, 200), slice(40, None)])
def test_a_stretch_after_intact_frames(stretch, long):
    clip, total = cut(long, f"later{stretch.stop}", stretch)
    video = read_video(clip.path, frames=240, workers=1)
    numbers = np.array([read_number(frame) for frame in video.frames.numpy()])
    last = 240 if stretch.stop is None else stretch.stop
    assert (numbers[40:last] == 39).all() and (numbers[last:] == np.arange(last, 240)).all()
    assert video.bytes_read < 24 * total


def test_two_stretches(long):
    """What stands for the first one does not stand for the second."""
    path, _ = blanked(long, "first_of_two", slice(None, 60))
    clip, _ = cut(Clip(path, long.numbers), "second_of_two", slice(100, 180))
    video = read_video(clip.path, frames=240, workers=1)
    numbers = [read_number(frame) for frame in video.frames.numpy()]
    expected = [60] * 60 + list(range(60, 100)) + [99] * 80 + list(range(180, 240))
    assert numbers == expected
