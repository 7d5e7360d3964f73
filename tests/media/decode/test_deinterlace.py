"""Interlaced frames are deinterlaced, each with its true neighbours, however few are asked for."""

import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.media.clips import HEIGHT, WIDTH, decode_sequentially, encode, read_number, x264
from tokenprune.media import Rendering, VideoReader, index_video, probe, read_video, stream_video
from tokenprune.media.decode import deinterlace

FORMS = {
    "a.mp4": x264("tff=1:keyint=12:bframes=3:b-pyramid=2"),
    "a.mkv": x264("bff=1:keyint=12:bframes=2"),
    "open.mp4": x264("tff=1:open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"),
}


def write(path: Path, options=None, *, count: int = 40, **settings):
    """A bar that runs to the right, each frame woven of two moments."""
    return encode(path, numbers=range(count), options=options or FORMS[path.name], **settings)


@pytest.fixture(scope="module", params=[*FORMS, "mpeg2"])
def woven(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("woven")
    if request.param == "mpeg2":
        options = {"g": "10", "b": "4M", "flags": "+ildct+ilme", "top": "1"}
        return encode(folder / "a.mpg", "mpeg2video", bframes=2, options=options).path
    return write(folder / request.param).path


def test_frames_are_those_of_a_plain_deinterlacer(woven):
    assert probe(woven).interlaced
    truth = decode_sequentially(woven, deinterlace=True)
    assert not np.array_equal(truth, decode_sequentially(woven))
    video = read_video(woven, frames=1000, workers=1)
    assert np.array_equal(video.frames.numpy(), truth)
    assert video.indices.tolist() == list(range(len(truth))) and video.damaged == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_any_frames_alone_are_the_same(woven, workers):
    truth = decode_sequentially(woven, deinterlace=True)
    last = len(truth) - 1
    for ranks in ([0], [1], [11], [12], [13], [last], [3, 17, 18, 30], [last, 5, 5, 0]):
        video = read_video(woven, indices=ranks, workers=workers)
        assert np.array_equal(video.frames.numpy(), truth[ranks]), ranks
    groups = list(stream_video(woven, frames=9, group=2, workers=workers))
    ranks = [rank for group in groups for rank in group.indices.tolist()]
    assert np.array_equal(torch.cat([group.frames for group in groups]).numpy(), truth[ranks])


def test_processes_give_the_same(woven):
    truth = decode_sequentially(woven, deinterlace=True)
    video = read_video(woven, indices=[2, 20], worker_kind="process", workers=2)
    assert np.array_equal(video.frames.numpy(), truth[[2, 20]])


def test_frames_as_they_are_stored(woven):
    video = read_video(woven, frames=1000, rendering=Rendering(deinterlace=False))
    assert np.array_equal(video.frames.numpy(), decode_sequentially(woven))
    assert video.info.interlaced


def test_few_frames_still_cost_little(tmp_path):
    path = write(tmp_path / "a.mp4").path
    assert read_video(path, indices=[13], workers=1).pictures_decoded <= 20


def combing(frame) -> float:
    """How much lines differ from those beside them, and agree with the lines after those."""
    picture = frame[1, 16:].numpy().astype(float)
    beside = np.abs(picture[1:-1] - (picture[:-2] + picture[2:]) / 2).mean()
    return beside / (np.abs(picture[2:] - picture[:-2]).mean() + 1)


def test_combs_go_away(tmp_path):
    """Odd lines show a square that has moved on."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=x264("tff=1:qp=5"))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(20):
            lines = np.full((2, HEIGHT, WIDTH), 40, np.uint8)
            for field in range(2):
                left = 4 * (2 * number + field)
                lines[field, 40:80, left : left + 24] = 220
            lines[0, 1::2] = lines[1, 1::2]
            picture = np.repeat(lines[0][..., None], 3, 2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    plain = read_video(path, indices=[9], rendering=Rendering(deinterlace=False)).frames[0]
    mended = read_video(path, indices=[9]).frames[0]
    assert combing(plain) > 4 * combing(mended)


def test_a_file_that_turns_interlaced_later(tmp_path):
    """Its first frame tells nothing."""
    parts = [
        encode(tmp_path / "a.ts", numbers=range(60), options=x264("keyint=12:bframes=0")).path,
        encode(tmp_path / "b.ts", numbers=range(60, 84), options=x264("tff=1:keyint=12")).path,
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    truth = np.concatenate([decode_sequentially(part, deinterlace=True) for part in parts])
    assert not index_video(path).info.interlaced
    reader = VideoReader(path, workers=2)
    groups = list(reader.stream(frames=1000, group=10))
    assert reader.info.interlaced
    frames = torch.cat([group.frames for group in groups]).numpy()
    assert [read_number(frame) for frame in frames] == list(range(84))
    assert np.array_equal(frames, truth)
    assert np.array_equal(read_video(path, indices=[60]).frames[0].numpy(), truth[60])


def test_damaged_frames_are_replaced_by_deinterlaced_ones(tmp_path):
    path = write(tmp_path / "a.mkv", FORMS["a.mkv"]).path
    truth = decode_sequentially(path, deinterlace=True)
    index = index_video(path)
    packet = int(index.order[17])
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        position = [one.pos for one in container.demux(video=0) if one.size][packet]
        size = int(index.size[packet])
    content[position + 20 : position + size] = bytes(size - 20)
    path.write_bytes(content)
    video = read_video(path, frames=40)
    assert video.damaged
    for rank in np.flatnonzero(video.substituted.numpy()).tolist():
        error = np.abs(video.frames.numpy()[rank].astype(int) - truth).mean((1, 2, 3))
        assert error.min() < 3  # some deinterlaced frame


def test_a_build_without_filters_says_so_once(woven, monkeypatch):
    monkeypatch.setattr(deinterlace, "filters_available", {"scale"})
    deinterlace.check_filter.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"no filter to deinterlace \(bwdif, yadif\)"):
            video = read_video(woven, indices=[5], workers=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_video(woven, indices=[6], workers=1)
    finally:
        deinterlace.check_filter.cache_clear()
    assert np.array_equal(video.frames[0].numpy(), decode_sequentially(woven)[5])
