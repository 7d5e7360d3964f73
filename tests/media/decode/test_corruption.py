"""Files damaged by chance: a clear error or an intact video, never a hang, seldom a wrong frame."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.media import clips
from tests.media.clips import KINDS, Clip, read_number
from tests.media.corpus import CORPUS
from tokenprune.errors import MediaError
from tokenprune.media import read_video, stream_video
from tokenprune.media.index.container import packets_of

pytestmark = pytest.mark.timeout(120)  # a reader that waits for ever fails

Damage = Callable[[bytearray, np.random.Generator], bytearray]

MOST = 0.3  # a good part of so short a file may be its tables
FEW, MANY = range(2), range(2, 30)  # seeds in `make test`, and the others of `make test-all`
SEEDS = [*FEW, *(pytest.param(seed, marks=pytest.mark.full) for seed in MANY)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Clip]:
    """Gives the clip of a kind, from either list."""
    known: dict[str, Clip] = {}

    def make(kind: str) -> Clip:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = KINDS[kind](folder) if kind in KINDS else CORPUS[kind](folder, 72)
        return known[kind]

    return make


def flip_bits(content: bytearray, random: np.random.Generator) -> bytearray:
    for place in random.integers(0, len(content), 12).tolist():
        content[place] ^= 1 << int(random.integers(8))
    return content


def overwrite(content: bytearray, random: np.random.Generator) -> bytearray:
    start = int(random.integers(0, len(content) - 400))
    content[start : start + 400] = random.bytes(400)
    return content


def blank(content: bytearray, random: np.random.Generator) -> bytearray:
    """One piece in twenty of 64 bytes is zero."""
    for start in range(0, len(content) - 64, 64):
        if random.random() < 0.05:
            content[start : start + 64] = bytes(64)
    return content


def cut(content: bytearray, random: np.random.Generator) -> bytearray:
    return content[: int(random.integers(1, len(content)))]


def leave_out(content: bytearray, random: np.random.Generator) -> bytearray:
    """Ten pieces of the size of a transport stream's packets are missing."""
    for _ in range(10):
        start = int(random.integers(0, len(content) // 188)) * 188
        del content[start : start + 188]
    return content


def repeat(content: bytearray, random: np.random.Generator) -> bytearray:
    start, length = random.integers(0, len(content), 2).tolist()
    return content[: start + length] + content[start:]


DAMAGES: list[Damage] = [flip_bits, overwrite, blank, cut, leave_out, repeat]
WHERE = [
    "h264_bframes",
    "h264_fragmented",
    "h264_mkv",
    "h264_ts_offset",
    "h264_avi",
    "h264_raw",
    "hevc",
    "vp9",
    "av1",
    "mpeg4_avi",
    "mpeg2_ps",
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", WHERE)
def test_anything_may_be_damaged(kind, damage, seed, made, tmp_path):
    """Damage may hit a file's tables and times, too, so only this is certain."""
    clip = made(kind)
    path = tmp_path / f"{damage.__name__}{clip.path.suffix}"
    path.write_bytes(damage(bytearray(clip.path.read_bytes()), np.random.default_rng(seed)))
    try:
        video = read_video(path, frames=40, size=(56, 96), workers=2)
    except MediaError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return
    assert video.frames.shape == (len(video), 3, 56, 96) and 1 <= len(video) <= 40
    assert (video.pts_seconds.diff() >= 0).all() and (video.indices.diff() > 0).all()
    assert video.indices[-1] < video.info.frame_count
    again = read_video(path, frames=40, size=(56, 96), workers=1)
    assert np.array_equal(again.indices.numpy(), video.indices.numpy())
    groups = list(stream_video(path, frames=40, size=(56, 96), group=16))
    assert sum(map(len, groups)) == len(video)


@pytest.mark.parametrize("kind", WHERE)
def test_most_damaged_files_give_frames(kind, made, tmp_path):
    """A reader that refused them all would be easy to write."""
    clip, opened, tried = made(kind), 0, 0
    for damage in (flip_bits, overwrite, blank, leave_out, repeat):
        for seed in range(4):
            path = tmp_path / f"{damage.__name__}{seed}{clip.path.suffix}"
            content = bytearray(clip.path.read_bytes())
            path.write_bytes(damage(content, np.random.default_rng(seed)))
            tried += 1
            try:
                opened += len(read_video(path, frames=8, size=(56, 96))) > 0
            except MediaError:
                continue
    assert opened >= MOST * tried


def flip_in_packets(clip: Clip, path: Path, seed: int) -> None:
    """A copy of a file with three bits flipped in its packets; its tables stay whole."""
    content = bytearray(clip.path.read_bytes())
    random = np.random.default_rng(seed)
    with av.open(str(clip.path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for _ in range(3):
        data = packets[int(random.integers(len(packets) // 4, len(packets)))]
        start = clip.path.read_bytes().find(data)
        assert start > 0
        content[start + int(random.integers(min(8, len(data) - 1), len(data)))] ^= 1 << int(
            random.integers(8)
        )
    path.write_bytes(bytes(content))


def wrong_and_counted(kind: str, made: Callable[[str], Clip], folder: Path) -> tuple[int, int, int]:
    """Of all frames of ten damaged copies: wrong ones not counted, counted ones, and all."""
    clip, wrong, counted, total = made(kind), 0, 0, 0
    for seed in range(10):
        path = folder / f"{seed}{clip.path.suffix}"
        flip_in_packets(clip, path, seed)
        video = read_video(path, frames=10_000, workers=1)
        bad = video.substituted.tolist()
        seen = [read_number(frame) for frame in video.frames.numpy()]
        latest = next(number for number, is_bad in zip(seen, bad, strict=True) if not is_bad)
        for number, due, is_bad in zip(seen, clip.numbers, bad, strict=True):
            latest = latest if is_bad else number
            wrong += not is_bad and number != due
            assert number == latest  # the frame, or the nearest earlier one that is intact
        counted += sum(bad)
        total += len(bad)
    return wrong, counted, total


@pytest.mark.parametrize("kind", ["hevc_hashed", "hevc_hashed_open_gop"])
def test_hash_sei_reveals_all_damage(kind, made, tmp_path):
    wrong, counted, total = wrong_and_counted(kind, made, tmp_path)
    assert wrong == 0 and 0 < counted < total


@pytest.mark.parametrize("kind", ["h264_bframes", "h264_one_keyframe", "mpeg4", "mpeg4_avi"])
def test_damage_seldom_goes_unnoticed(kind, made, tmp_path):
    """A flipped bit may make another valid frame, and no decoder can know."""
    wrong, counted, total = wrong_and_counted(kind, made, tmp_path)
    assert wrong <= 0.01 * total and 0 < counted < total


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://a.b/c.ts\n", "cannot"),
        ("script.mp4", b"ffconcat version 1.0\nfile '/etc/hostname'\n", "cannot|no video"),
        ("page.mp4", b"<!DOCTYPE html><html><body>404</body></html>" * 20, "is an HTML page"),
        ("data.mp4", b'{"error": "not found"}' * 40, "cannot"),
        ("zip.mp4", b"PK\x03\x04" + bytes(500), "is a ZIP archive"),
        ("zeros.mp4", bytes(100_000), "cannot"),
        ("zeros.ts", b"\x47\x1f\xff\x10" * 1 + bytes(184) * 50, "cannot|no video"),
        ("box.mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2\0\0\0\x08mdat", "cannot|no video"),
        ("huge.mp4", b"\xff\xff\xff\xffmoov" + bytes(64), "cannot|no video"),
        ("words.srt", b"1\n00:00:00,000 --> 00:00:01,000\nhello\n", "no video"),
    ],
)
def test_other_files_are_refused(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MediaError, match=message) as caught:
        read_video(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["mkv", "mp4", "avi", "nut", "ts"])
def test_a_file_without_a_frame_is_refused(form, tmp_path):
    path = tmp_path / f"none.{form}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height = 64, 48
        container.start_encoding()
    with pytest.raises(MediaError, match=r"none\.\w+' (has|as|is empty)"):
        read_video(path)


def test_streams_that_appear_midway_are_passed_over(tmp_path):
    """A transport stream goes on with more tracks than its first part has."""
    options = clips.x264("keyint=12:bframes=2")
    first = clips.encode(tmp_path / "a.ts", numbers=range(30), options=options)
    content = first.path.read_bytes()
    for number in range(1, 5):
        renamed = {"mpegts_start_pid": str(256 + 16 * number), "output_ts_offset": str(number)}
        part = clips.encode(
            tmp_path / f"{number}.ts", numbers=range(30), options=options, mux=renamed
        )
        content += part.path.read_bytes()
    path = tmp_path / "grown.ts"
    path.write_bytes(content)

    video = read_video(path, frames=1000)

    assert [read_number(frame) for frame in video.frames.numpy()][:30] == list(range(30))
    assert video.substituted.sum() == 0


def test_the_end_of_a_file_that_grew_streams():
    """PyAV then looks for streams that it does not know, once all packets are out."""

    class Packet:
        size = 5

    class Grown:
        def demux(self, stream):
            yield from (Packet(), Packet())
            raise IndexError("list index out of range")

    assert len(list(packets_of(Grown(), None))) == 2


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "WEBP"])
def test_a_still_picture_is_a_video_of_one_frame(form, tmp_path):
    """Also under another name, since content counts."""
    path = tmp_path / "still.mp4"
    Image.fromarray(clips.draw(77)).save(path, form)
    video = read_video(path)
    assert [read_number(frame) for frame in video.frames.numpy()] == [77]


@pytest.mark.parametrize("tenths", range(3, 10))
def test_a_file_cut_within_its_packets_gives_those_before_the_cut(tenths, made, tmp_path):
    """Its table, at the front, promises more. Frames are identified by PTS: a reference is coded
    before the B-frames that are shown before it, so some may be missing between those that come.
    """
    clip = made("h264_table_first")
    content = clip.path.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: len(content) * tenths // 10])

    video = read_video(path, frames=1000)

    seen = [read_number(frame) for frame in video.frames.numpy()]
    due = [round(seconds * 30) for seconds in video.pts_seconds.tolist()]
    told = list(zip(seen, due, video.substituted.tolist(), strict=True))
    assert all(number == expected for number, expected, bad in told if not bad)
    assert all(0 <= number < expected for number, expected, bad in told if bad)
    assert video.damaged <= 1 and 72 * (tenths - 2) / 10 < len(video) < 72  # only what is cut off
