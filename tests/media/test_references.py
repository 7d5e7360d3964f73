"""Files that refer to others are refused; where they are allowed, they stay in their folder."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest

from tests.media.clips import encode, read_number, write_tone, x264
from tokenprune.errors import MediaError
from tokenprune.media import index_video, probe, read_audio, read_video, stream_video

HEAD = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n"
END = "#EXT-X-ENDLIST\n"
SECRET = "outside"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two segments in a folder, and a file beside it that nobody gave."""
    base = tmp_path_factory.mktemp("references")
    inside = base / "given" / "parts"
    inside.mkdir(parents=True)
    encode(
        inside / "whole.m3u8",
        numbers=range(48),
        options=x264("keyint=12:min-keyint=12:scenecut=0:bframes=2"),
        mux={
            "hls_time": "0.8",
            "hls_playlist_type": "vod",
            "hls_segment_filename": str(inside / "%d.ts"),
        },
        form="hls",
        sound=True,
    )
    encode(base / f"{SECRET}.ts", numbers=range(500, 524), options=x264("keyint=12"), sound=True)
    (inside / "link.ts").symlink_to(base / f"{SECRET}.ts")
    return base / "given"


def playlist(*names: str, end: str = END) -> str:
    return HEAD + "".join(f"#EXTINF:0.8,\n{name}\n" for name in names) + end


def script(*names: str) -> str:
    return "ffconcat version 1.0\n" + "".join(f"file '{name}'\n" for name in names)


PARTS = ("parts/0.ts", "parts/1.ts")
MPD = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S">
<Period><AdaptationSet mimeType="video/mp4"><Representation id="0" bandwidth="1000">
<BaseURL>parts/0.ts</BaseURL></Representation></AdaptationSet></Period></MPD>
"""
SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nm=video 5000 RTP/AVP 96\r\n"
REFERRING = {
    "a.m3u8": (playlist(*PARTS), "an HLS playlist"),
    "a.mp4": (playlist(*PARTS), "an HLS playlist"),
    "bom.m3u8": ("\ufeff" + playlist(*PARTS), "an HLS playlist"),
    "main.m3u8": ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\na.m3u8\n", "an HLS playlist"),
    "a.ffconcat": (script(*PARTS), "an ffconcat script"),
    "a.txt": (script(*PARTS), "an ffconcat script"),
    "a.mpd": (MPD, "a DASH manifest"),
    "a.sdp": (SDP, r"a description of a network stream \(SDP\)"),
    "a.pls": ("[playlist]\nFile1=parts/0.ts\n", "a playlist"),
    "a.asx": ('<asx version="3"><entry><ref href="parts/0.ts"/></entry></asx>', "a playlist"),
    "a.ism": ('<SmoothStreamingMedia MajorVersion="2"/>', "a Smooth Streaming manifest"),
    "a.smil": ('<smil><body><video src="parts/0.ts"/></body></smil>', "a SMIL playlist"),
    "a.cpl": ('<?xml version="1.0"?><CompositionPlaylist/>', "an IMF playlist"),
    "a.idx": ("# VobSub index file, v7\n", "an index of subtitles in another file"),
    "a.mlv": ("MLVI" + "\0" * 200, "a recording that may go on in other files"),
    "a.rtsp": ("rtsp://127.0.0.1/x", "a playlist"),
}
FOLDER = {"a.m3u8", "a.mp4", "bom.m3u8", "main.m3u8", "a.ffconcat", "a.txt"}


@pytest.mark.parametrize("name", REFERRING)
@pytest.mark.parametrize("read", [read_video, probe, stream_video, read_audio, index_video])
def test_files_that_refer_to_others_are_refused(name, read, folder):
    content, what = REFERRING[name]
    (folder / name).write_text(content)
    wanted = rf"{name}'.* it is {what}.*, which refers to other files; give the media file itself"
    with pytest.raises(MediaError, match=wanted) as caught:
        read(folder / name)
    assert ('references="folder"' in str(caught.value)) is (name in FOLDER)


@pytest.mark.parametrize("name", sorted(REFERRING.keys() - FOLDER))
def test_what_cannot_be_held_to_a_folder_is_refused_with_it_too(name, folder):
    content, what = REFERRING[name]
    (folder / name).write_text(content)
    with pytest.raises(MediaError, match=f"it is {what}.*, which refers"):
        read_video(folder / name, references="folder")


def test_a_demuxer_that_refers_is_not_opened_by_a_name_either(folder):
    """What begins otherwise, but would be opened as a row of pictures, or as planes in files."""
    for name in ("%d.png", "a.Y"):
        (folder / name).write_bytes(bytes(6000))
        with pytest.raises(MediaError, match="cannot read .* as media"):
            read_video(folder / name)


def test_a_row_of_pictures_is_no_file(folder):
    for number in range(3):
        (folder / f"row{number}.bmp").write_bytes(b"BM" + bytes(100))
    with pytest.raises(MediaError, match="no such file"):
        read_video(folder / "row%d.bmp", references="folder")


# FFmpeg wants an HLS playlist to begin, and to be named, as one.
READ = ["a.ffconcat", "a.m3u8", "a.txt", "main.m3u8", "parts/whole.m3u8"]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("workers", [1, 3])
def test_references_in_the_folder_are_read(name, workers, folder):
    for one in sorted(FOLDER):
        (folder / one).write_text(REFERRING[one][0])
    video = read_video(folder / name, references="folder", frames=1000, workers=workers)
    assert [read_number(frame) for frame in video.frames.numpy()] == list(range(48))
    assert video.damaged == 0
    chosen = read_video(folder / name, references="folder", indices=[40, 3], workers=workers)
    assert [read_number(frame) for frame in chosen.frames.numpy()] == [40, 3]
    sound = read_audio(folder / name, references="folder")
    assert len(sound) == pytest.approx(1.6 * 16000, abs=3000)


def test_processes_read_references(folder):
    (folder / "a.m3u8").write_text(playlist(*PARTS))
    groups = stream_video(
        folder / "a.m3u8", references="folder", worker_kind="process", workers=2, frames=9
    )
    numbers = [read_number(frame) for group in groups for frame in group.frames.numpy()]
    assert numbers == [round(47 * step / 8) for step in range(9)]


def test_segments_whose_counters_start_anew_are_intact(folder):
    inside = folder / "anew"
    inside.mkdir()
    for number in range(2):
        encode(
            inside / f"{number}.ts",
            numbers=range(24 * number, 24 * number + 24),
            options=x264("keyint=12:bframes=2"),
            mux={"output_ts_offset": str(0.8 * number)},
            sound=True,
        )
    (folder / "anew.m3u8").write_text(playlist("anew/0.ts", "anew/1.ts"))
    video = read_video(folder / "anew.m3u8", references="folder", frames=1000)
    assert [read_number(frame) for frame in video.frames.numpy()] == list(range(48))
    assert video.damaged == 0


OUTSIDE = {
    "absolute": "{base}/outside.ts",
    "above": "../outside.ts",
    "around": "parts/../../outside.ts",
    "linked": "parts/link.ts",
    "scheme": "file:{base}/outside.ts",
    "missing": "parts/9.ts",
    "device": "/dev/zero",
}


@pytest.mark.parametrize("way", OUTSIDE)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("form", ["m3u8", "ffconcat"])
def test_files_outside_are_never_read(form, place, way, folder):
    name = OUTSIDE[way].format(base=folder.parent)
    names = [name, PARTS[1]] if place == 0 else [PARTS[0], name]
    path = folder / f"{way}{place}.{form}"
    path.write_text(playlist(*names) if form == "m3u8" else script(*names))
    with pytest.raises(
        MediaError, match=r"which (lies outside its folder|is not there); only|as m"
    ):
        read_video(path, references="folder", frames=1000)
    with pytest.raises(MediaError):
        read_audio(path, references="folder")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/a.ts", "https://a.b/c.ts", "tcp://127.0.0.1:9", "data:,x", "ftp://x"],
)
@pytest.mark.parametrize("form", ["m3u8", "ffconcat"])
def test_no_protocol_is_opened(form, url, folder):
    path = folder / f"p.{form}"
    path.write_text(playlist(PARTS[0], url) if form == "m3u8" else script(PARTS[0], url))
    with pytest.raises(MediaError):
        read_video(path, references="folder", frames=1000)


def test_keys_and_maps_outside_are_not_read(folder):
    for tag in ('#EXT-X-KEY:METHOD=AES-128,URI="../outside.ts"', '#EXT-X-MAP:URI="../outside.ts"'):
        path = folder / "key.m3u8"
        path.write_text(HEAD + tag + "\n#EXTINF:0.8,\nparts/0.ts\n" + END)
        with pytest.raises(MediaError):
            read_video(path, references="folder")


def test_a_script_that_names_another_is_refused(folder):
    (folder / "inner.ffconcat").write_text(script(*PARTS))
    (folder / "outer.ffconcat").write_text(script("inner.ffconcat"))
    with pytest.raises(MediaError, match="which is an ffconcat script itself; name media files"):
        read_video(folder / "outer.ffconcat", references="folder")
    (folder / "inner.m3u8").write_text(playlist("../outside.ts"))
    (folder / "outer.ffconcat").write_text(script("inner.m3u8"))
    with pytest.raises(MediaError, match="which is an HLS playlist itself"):
        read_video(folder / "outer.ffconcat", references="folder")


def test_live_playlists_are_refused(folder):
    """Or FFmpeg would wait for more, for ever."""
    (folder / "live.m3u8").write_text(playlist(*PARTS, end=""))
    (folder / "mainlive.m3u8").write_text("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nlive.m3u8\n")
    for name in ("live.m3u8", "mainlive.m3u8"):
        with pytest.raises(MediaError, match=r"live\.m3u8' is a playlist without an end"):
            read_video(folder / name, references="folder")


def test_other_values_fail(folder):
    with pytest.raises(MediaError, match="references must be \"folder\" or None, got 'all'"):
        read_video(folder / "parts" / "0.ts", references="all")
    with pytest.raises(MediaError, match='references must be "folder" or None, got True'):
        read_audio(folder / "parts" / "0.ts", references=True)


def test_plain_files_are_read_with_references_allowed(clip):
    for kind in ("h264_bframes", "h264_mkv", "h264_ts_offset"):
        video = read_video(clip(kind).path, references="folder", frames=5)
        assert np.array_equal(video.frames, read_video(clip(kind).path, frames=5).frames)


# -- movies whose data lies in another file


def alias(target: str, levels: tuple[int, int]) -> bytes:
    """A record of a QuickTime alias that leads to a file by a relative path."""
    path = ("/x/" + target).encode()
    path += bytes(len(path) % 2)
    record = bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16)
    record += struct.pack(">HH", *levels) + bytes(16) + struct.pack(">HH", 2, len(path)) + path
    return record + struct.pack(">HH", 0xFFFF, 0)


def referring_movie(path: Path, target: Path, kind: bytes, record: bytes) -> Path:
    """The header of a movie, whose data reference leads elsewhere."""
    content = target.read_bytes()
    start = content.index(b"moov") - 4
    moov = bytearray(content[start : start + int.from_bytes(content[start : start + 4], "big")])
    at = moov.index(b"dref") - 4
    old = int.from_bytes(moov[at : at + 4], "big")
    entry = struct.pack(">I4sI", 12 + len(record), kind, 0) + record
    new = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    moov[at : at + old] = new
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        size = 0 if name == b"moov" else moov.rindex(name, 0, at) - 4
        longer = int.from_bytes(moov[size : size + 4], "big") + len(new) - old
        moov[size : size + 4] = longer.to_bytes(4, "big")
    path.write_bytes(content[: int.from_bytes(content[:4], "big")] + moov)
    return path


@pytest.fixture
def movie(folder):
    return encode(folder / "data.mov", options=x264("keyint=12:bframes=2"), numbers=range(24)).path


def test_movies_with_data_elsewhere_are_refused(folder, movie):
    for kind, record in ((b"alis", alias("data.mov", (1, 1))), (b"url ", b"http://a.b/c.mov\0")):
        path = referring_movie(folder / "refers.mov", movie, kind, record)
        with pytest.raises(MediaError, match=r"refers\.mov': its data lies in another file, to wh"):
            read_video(path)


def test_movies_with_data_in_their_folder_are_read(folder, movie):
    path = referring_movie(folder / "refers.mov", movie, b"alis", alias("data.mov", (1, 1)))
    for workers in (1, 2):
        video = read_video(path, references="folder", frames=100, workers=workers)
        assert [read_number(frame) for frame in video.frames.numpy()] == list(range(24))


def test_movies_with_data_outside_are_refused_with_references_too(folder, movie):
    outside = folder.parent / "outside.mov"
    outside.write_bytes(movie.read_bytes())
    linked = folder / "linked.mov"
    if not linked.is_symlink():
        linked.symlink_to(outside)
    for name, levels in (("outside.mov", (2, 1)), ("linked.mov", (1, 1))):
        path = referring_movie(folder / "refers.mov", movie, b"alis", alias(name, levels))
        with pytest.raises(MediaError):
            read_video(path, references="folder")


def test_sound_with_data_elsewhere_is_refused(folder):
    target = folder / "data.m4a"
    with av.open(str(target), "w", format="mov") as container:
        write_tone(container, container.add_stream("aac", rate=48000, layout="stereo"), 0.5)
    path = referring_movie(folder / "refers.m4a", target, b"alis", alias("data.m4a", (1, 1)))
    with pytest.raises(MediaError, match="its data lies in another file"):
        read_audio(path)
    assert len(read_audio(path, references="folder")) == pytest.approx(8000, abs=600)
