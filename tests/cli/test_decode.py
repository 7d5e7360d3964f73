"""`tokenprune decode`: frames as files, an array, or numbers about them."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from tests.media.clips import encode, read_number, x264


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("decode") / "a.mp4", options=x264("keyint=24")).path


def test_frames_as_an_array(command, video, tmp_path):
    out = tmp_path / "frames.npy"
    ran = command("decode", video, "--frames", 20, "--out", out, "--json")

    assert ran.code == 0 and ran.err == ""
    found, frames = json.loads(ran.out), np.load(out)
    assert frames.shape == (20, 3, 112, 192) and frames.dtype == np.uint8
    assert [read_number(frame) for frame in frames] == found["indices"]
    assert found["indices"] == [round(k * 71 / 19) for k in range(20)]
    assert found["pts_seconds"] == pytest.approx([rank / 30 for rank in found["indices"]], abs=1e-3)
    assert (found["frames"], found["damaged"], found["out"]) == (20, 0, str(out))
    assert 20 <= found["pictures_decoded"] <= 72 and found["bytes_read"] > 0
    assert list(tmp_path.iterdir()) == [out]


def test_frames_as_pictures(command, video, tmp_path):
    out = tmp_path / "new" / "frames"
    ran = command("decode", video, "--fps", 5, "--start", 1, "--size", "56x98", "--out", out)

    assert ran.code == 0 and "frames    7 of 56x98, 1.000 to 2.200 s" in ran.out
    assert sorted(path.name for path in out.iterdir()) == [
        f"{rank:08d}.png" for rank in range(30, 72, 6)
    ]
    with Image.open(out / "00000036.png") as picture:
        assert picture.size == (98, 56)
        assert read_number(np.asarray(picture).transpose(2, 0, 1)) == 36


def test_only_decoding(command, video):
    ran = command("decode", video, "--frames", 2, "--end", 1)
    assert ran.code == 0 and ran.out.startswith("frames    2 of 112x192, 0.000 to 0.967 s\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", 0], "frames must be a whole number of at least 1, got 0"),
        (["--frames", 2, "--fps", 3], "give --frames or --fps, got both (2 and 3.0)"),
        (["--size", "big"], "size must be height x width, such as 224x384, got 'big'"),
        (["--workers", 0], "workers must be at least 1, got 0"),
        (["--out", "/proc/no/such"], "cannot write to '/proc/no/such'"),
        (["--out", "/proc/no/such.npy"], "cannot write to '/proc/no/such.npy'"),
    ],
)
def test_wrong_requests_fail(command, video, arguments, message):
    ran = command("decode", video, *arguments)
    assert ran.code == 2 and ran.out == ""
    assert message in ran.err and ran.err.count("\n") == 1


def test_damaged_frames_are_named(command, tmp_path):
    source = encode(tmp_path / "a.mp4", options=x264("keyint=1"))
    content = bytearray(source.path.read_bytes())
    with av.open(str(source.path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[10:13]:
        content[packet.pos + 4 : packet.pos + packet.size] = bytes(packet.size - 4)
    source.path.write_bytes(content)

    ran = command("decode", source.path, "--frames", 36, "--json")
    found = json.loads(ran.out)
    assert found["damaged_indices"] == [rank for rank in found["indices"] if rank in (10, 11, 12)]
    assert found["damaged"] == len(found["damaged_indices"]) > 0
    assert "damaged   1, frames 12" in command("decode", source.path, "--frames", 7).out


def test_failure_leaves_no_file(command, video, tmp_path):
    content = bytearray(video.read_bytes())
    start = content.index(b"mdat") + 4
    end = content.rindex(b"moov") - 4
    content[start:end] = bytes(end - start)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)
    ran = command("decode", damaged, "--out", tmp_path / "frames.npy")
    assert ran.code == 2 and "damaged.mp4" in ran.err
    assert list(tmp_path.iterdir()) == [damaged]
