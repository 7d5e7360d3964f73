"""Sources as people name them: one normaliser for all who read."""

from __future__ import annotations

import base64
import gc
import io
import os
import socket
from pathlib import Path
from urllib.parse import quote

import pytest

from tokenprune.errors import DecodeError, MediaError
from tokenprune.media import VideoReader, read_video
from tokenprune.media.local import LocalFile, check_source, local_file


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a b%20#é?.txt"
    path.write_bytes(b"content")
    return path


def content(source: object, **settings: object) -> bytes:
    with local_file(source, **settings) as found:
        return Path(found).read_bytes()


def test_paths_and_uris(path, monkeypatch):
    uri = path.as_uri()
    host = socket.gethostname()
    for source in (
        path,
        str(path),
        uri,
        Path(uri),  # as a command line gives it
        uri.replace("file://", "file:"),
        uri.replace("file://", "FILE://localhost"),
        uri.replace("file://", f"file://{host}"),
        f"file://{path}",  # as some write it
    ):
        assert content(source) == b"content", source
    monkeypatch.chdir(path.parent)
    assert content(f"file://{path.name}") == content(f"file://{quote(path.name)}") == b"content"
    odd = path.parent / "file:"
    odd.mkdir()
    (odd / "x").write_bytes(b"odd")
    assert content("file:/x") == content(Path("file:/x")) == b"odd"  # there is such a file


def test_contents():
    encoded = base64.b64encode(b"\xfb\xff\xfe?").decode()
    for source in (
        b"\xfb\xff\xfe?",
        bytearray(b"\xfb\xff\xfe?"),
        memoryview(b"\xfb\xff\xfe?"),
        io.BytesIO(b"\xfb\xff\xfe?"),
        f"data:video/mp4;base64,{encoded}",
        f"DATA:;base64,{quote(encoded)}",
        f"data:image;base64,{encoded[:3]}\n{encoded[3:]}",
        "data:video/mp4;base64,-__-Pw",
        "data:,%FB%FF%FE?",
    ):
        assert content(source) == b"\xfb\xff\xfe?", source


def test_an_open_file_can_be_read_again():
    file = io.BytesIO(b"head content")
    file.seek(5)
    assert content(file) == content(file) == b"content"
    read, write = os.pipe()
    os.write(write, b"piped")
    os.close(write)
    with open(read, "rb") as pipe:
        assert content(pipe) == b"piped"


def test_what_was_written_is_removed():
    with local_file(b"content") as found:
        assert os.path.exists(found)
    gc.collect()
    assert not os.path.exists(found)


def test_readers_take_contents(clip, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = clip("h264_bframes").path
    plain = read_video(path, frames=3).frames
    for source in (path.as_uri(), path.read_bytes(), io.BytesIO(path.read_bytes())):
        reader = VideoReader(source)
        assert (reader.read(frames=3).frames == plain).all()
        assert (reader.read(frames=3, size=(112, 192)).frames == plain).all()
    del reader
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_errors_name_what_was_given():
    with pytest.raises(DecodeError, match="^cannot read what was given as bytes as media"):
        VideoReader(b"no video")
    with pytest.raises(
        DecodeError, match="^what the data: URI holds is an HTML page, and no media"
    ):
        VideoReader("data:text/html,<html>")
    with pytest.raises(DecodeError, match="^what was given as an open file is empty"):
        VideoReader(io.BytesIO())


def test_urls_are_fetched_by_whoever_is_told_to(path):
    for source in ("https://example.org/a b.mp4", "s3://bucket/a", Path("http://example.org/x")):
        with pytest.raises(MediaError, match=r"only local files are read, got '(http|s3).*fetch="):
            content(source)
    asked = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return b"fetched"

    assert content("https://example.org/a", fetch=fetch) == b"fetched"
    assert content(Path("http://example.org/x"), fetch=fetch) == b"fetched"
    assert asked == ["https://example.org/a", "http://example.org/x"]
    assert content("https://example.org/a", fetch=lambda url: path) == b"content"
    with pytest.raises(
        MediaError, match="fetch must give bytes, an open file or a path, got 'http"
    ):
        content("https://example.org/a", fetch=lambda url: url)
    with pytest.raises(DecodeError, match="what 'https://example.org/a' gave is an HTML page"):
        with local_file("https://example.org/a", lambda url: b"<html>") as found:
            check_source(found)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x" * 300, "no such file: 'xxx.*'; give the path of a local media file"),
        (Path("y" * 5000), "no such file: 'yyy"),
        ("data:" + "x" * 300, "a data: URI needs a comma before its data, got 'data:xxx"),
        ("data:video/mp4;base64,!!", "a data: URI holds no base64"),
        ("file://elsewhere/x", "'file://elsewhere/x' is a file of 'elsewhere'; copy it here"),
        ("a\0b", "no such file"),
        (5, "a source must be a path, a file: or data: URI, bytes, or .*, got 5"),
        (None, "a source must be a path"),
        (io.StringIO("text"), "must give bytes: open it with mode 'rb'"),
    ],
)
def test_what_names_no_file_is_refused(source, message):
    with pytest.raises(MediaError, match=message):
        LocalFile(source)


def test_sources_are_checked_before_anything_is_loaded(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>")
    with pytest.raises(DecodeError, match="a.jpg' is an HTML page"):
        check_source(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DecodeError, match="is empty"):
        check_source((tmp_path / "a.jpg").as_uri())
    with pytest.raises(MediaError, match="no such file"):
        check_source(tmp_path / "b.jpg")
