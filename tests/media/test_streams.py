"""Which stream of a file is read: the one marked as default, then the largest; or the one named."""

import json
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from tests.media.clips import draw, read_number
from tokenprune.cli.app import app
from tokenprune.errors import DecodeError, MediaError
from tokenprune.media import VideoReader, probe, read_audio, read_video, stream_video
from tokenprune.media.index.streams import audio_stream, video_stream

DEFAULT = av.stream.Disposition.default
COVER = av.stream.Disposition.attached_pic
NONE = av.stream.Disposition(0)


def write(path: Path, *scales: int, marks=(), cover: bool = False) -> Path:
    """Streams whose frames are numbered from 100 times their place on, each of another scale."""
    with av.open(str(path), "w") as container:
        streams = []
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 640, 480, "yuvj420p"
            picture.disposition = COVER
        for place, scale in enumerate(scales):
            stream = container.add_stream("libx264", rate=10, options={"preset": "veryfast"})
            stream.height, stream.width = (side * scale for side in draw(0).shape[:2])
            stream.pix_fmt = "yuv420p"
            stream.disposition = marks[place] if marks else NONE
            streams.append(stream)
        if cover:
            image = av.VideoFrame.from_ndarray(np.zeros((480, 640, 3), np.uint8), format="rgb24")
            container.mux(picture.encode(image))
        for place, (stream, scale) in enumerate(zip(streams, scales, strict=True)):
            for number in range(12):
                array = draw(100 * place + number).repeat(scale, 0).repeat(scale, 1)
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def numbers(video) -> list[int]:
    return [read_number(frame) for frame in video.frames.numpy()]


@pytest.mark.parametrize(
    ("name", "marks", "scales", "taken"),
    [
        ("a.mkv", (NONE, NONE, NONE), (1, 2, 1), 1),  # the largest
        ("a.mkv", (NONE, NONE, DEFAULT), (1, 2, 1), 2),  # the one marked
        ("a.mov", (NONE, NONE, DEFAULT), (1, 2, 1), 2),  # the one marked
        ("a.mkv", (DEFAULT, DEFAULT, NONE), (1, 2, 3), 1),  # the largest of those marked
        ("a.mov", (DEFAULT, DEFAULT, NONE), (1, 2, 3), 1),  # the largest of those marked
        ("a.mkv", (DEFAULT, DEFAULT, DEFAULT), (1, 1, 1), 0),  # the first
        ("a.mov", (DEFAULT, DEFAULT, DEFAULT), (1, 1, 1), 0),  # the first
    ],
)
def test_the_main_stream_is_taken(name, marks, scales, taken, tmp_path):
    path = write(tmp_path / name, *scales, marks=marks)
    video = read_video(path, frames=3, workers=2)
    assert video.info.stream == taken
    assert numbers(video) == [100 * taken + number for number in (0, 6, 11)]
    assert video.frames.shape[2] == 112 * scales[taken]


@pytest.mark.parametrize("worker_kind", ["thread", "process"])
def test_a_stream_by_its_number(worker_kind, tmp_path):
    path = write(tmp_path / "a.mkv", 1, 2, 1)
    for stream in range(3):
        wanted = [100 * stream + number for number in range(12)]
        assert numbers(read_video(path, stream=stream, worker_kind=worker_kind)) == wanted
        groups = list(stream_video(path, stream=stream, group=5))
        assert [number for group in groups for number in numbers(group)] == wanted
        assert groups[0].info.stream == stream


def test_a_cover_is_never_taken(tmp_path):
    path = write(tmp_path / "a.mp4", 1, 1, cover=True)
    reader = VideoReader(path)
    kinds = [one.kind for one in reader.info.streams]
    assert sorted(kinds) == ["cover", "video", "video"] and reader.info.stream == kinds.index(
        "video"
    )
    with pytest.raises(MediaError, match=r"stream \d of .*a\.mp4' is a cover picture; choose"):
        VideoReader(path, stream=kinds.index("cover"))


@pytest.mark.parametrize("stream", [-1, 2])
def test_a_stream_that_is_not_there_fails(stream, tmp_path):
    path = write(tmp_path / "a.mkv", 1, 1)
    with pytest.raises(MediaError, match=rf"stream must be from 0 to 1 in .*, got {stream}"):
        VideoReader(path, stream=stream)


@pytest.mark.parametrize("stream", [True, 1.0, "1"])
def test_a_stream_that_is_no_number_fails(stream, clip):
    with pytest.raises(MediaError, match="stream must be .*number.*, got"):
        VideoReader(clip("h264_bframes").path, stream=stream)


def test_streams_that_cannot_be_decoded_are_passed_over():
    def stream(context):
        return SimpleNamespace(codec_context=context, disposition=NONE, language=None)

    context = SimpleNamespace(name="h264", width=8, height=8, channels=2)
    dark, good = stream(None), stream(context)
    streams = SimpleNamespace(video=[dark, good], audio=[dark, good])
    container = SimpleNamespace(name="x", streams=streams)
    assert video_stream(container) is good and audio_stream(container) is good
    with pytest.raises(DecodeError, match="'x': no decoder for its video stream; convert it"):
        video_stream(container, 0)
    with pytest.raises(DecodeError, match="'x': no decoder for its sound track 0"):
        audio_stream(container, 0)


def test_decode_lists_streams_and_takes_one(tmp_path):
    path = write(tmp_path / "a.mkv", 1, 2)
    run = CliRunner().invoke(app, ["decode", str(path), "--frames", "2", "--json"])
    found = json.loads(run.stdout)
    assert found["stream"] == 1 and found["height"] == 224
    told = [(one["kind"], one["number"], one["height"], one["codec"]) for one in found["streams"]]
    assert told == [("video", 0, 112, "h264"), ("video", 1, 224, "h264")]
    assert found["displayed"] == found["stored"] == [224, 384]
    run = CliRunner().invoke(app, ["decode", str(path), "--frames", "2", "--stream", "0"])
    assert "2 of 112x192" in run.stdout
    assert "stream    video 0 h264 112x192; video 1 h264 224x384" in run.stdout


# -- sound


def write_sound(path: Path, *tracks: tuple[str, str, float, av.stream.Disposition]) -> Path:
    """Tracks of a layout, a language, a pitch and a mark each."""
    with av.open(str(path), "w") as container:
        streams = []
        for layout, language, _, mark in tracks:
            stream = container.add_stream("aac", rate=48000, layout=layout)
            stream.metadata["language"], stream.disposition = language, mark
            streams.append(stream)
        for stream, (layout, _, hertz, _) in zip(streams, tracks, strict=True):
            wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(48000) / 48000).astype(np.float32)
            for start in range(0, 48000, 1024):
                part = np.tile(wave[start : start + 1024], (1 if layout == "mono" else 2, 1))
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                frame.sample_rate, frame.pts = 48000, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def pitch(samples) -> float:
    spectrum = np.abs(np.fft.rfft(samples.numpy()))
    return spectrum.argmax() * 16000 / len(samples)


def test_the_main_track_is_heard(tmp_path):
    path = write_sound(
        tmp_path / "a.mkv",
        ("mono", "eng", 300.0, NONE),
        ("stereo", "deu", 600.0, NONE),
        ("stereo", "fra", 900.0, NONE),
    )
    assert pitch(read_audio(path)) == pytest.approx(600, abs=2)  # of most channels, the first
    assert pitch(read_audio(path, track=0)) == pytest.approx(300, abs=2)
    assert pitch(read_audio(path, language="FRA")) == pytest.approx(900, abs=2)
    marked = write_sound(
        tmp_path / "b.mkv", ("stereo", "eng", 300.0, NONE), ("mono", "deu", 600.0, DEFAULT)
    )
    assert pitch(read_audio(marked)) == pytest.approx(600, abs=2)


def test_tracks_are_listed_and_wrong_ones_refused(tmp_path):
    path = tmp_path / "a.mkv"
    write_sound(path, ("mono", "eng", 300.0, DEFAULT), ("stereo", "deu", 600.0, NONE))
    with pytest.raises(MediaError, match=r"language must be one of those of .*\(deu, eng\), got x"):
        read_audio(path, language="x")
    with pytest.raises(MediaError, match="give track or language, got both"):
        read_audio(path, track=0, language="eng")
    with pytest.raises(MediaError, match="track must be from 0 to 1 in .*, got 2"):
        read_audio(path, track=2)


def test_a_video_lists_its_sound(clip):
    streams = probe(clip("h264_sound").path).streams
    assert [str(one) for one in streams] == [
        "video 0 h264 112x192 (default)",
        "audio 0 aac 2 channels (default)",
    ]
