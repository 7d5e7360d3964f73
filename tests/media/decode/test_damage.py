"""Bad files: a clear error that names the file, or intact frames and a count of the others."""

import re

import av
import numpy as np
import pytest
import torch

from tests.media import clips
from tests.media.clips import KINDS
from tokenprune.errors import DecodeError, MediaError, NoVideoStreamError
from tokenprune.media import index_video, probe, read_video, stream_video
from tokenprune.media.decode.demux import PacketReader
from tokenprune.media.decode.frames import PacketDecoder
from tokenprune.media.index.h264 import slice_count


def spoil(clip, name, change):
    """A changed copy of a clip's file."""
    path = clip.path.with_name(f"{name}{clip.path.suffix}")
    content = bytearray(clip.path.read_bytes())
    path.write_bytes(bytes(change(content)))
    return path


def blanked(clip, name, which):
    """A copy of a clip's file, some packets blanked but for their heads; and all its packets."""
    with av.open(str(clip.path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]

    def change(content):
        for packet in packets[which]:
            content[packet.pos + 4 : packet.pos + packet.size] = bytes(packet.size - 4)
        return content

    return spoil(clip, name, change), packets


def wound(clip, name):
    """A copy of a clip's file with two large packets in its middle blanked."""
    with av.open(str(clip.path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        middle = packets[len(packets) // 3 : len(packets) * 2 // 3]
        worst = sorted(middle, key=lambda packet: packet.size)[-2:]
        places = [(bytes(packet), packet.pos, packet.size) for packet in worst]

    def change(content):
        for data, position, size in places:
            found = content.find(data)  # a transport stream cuts packets up
            start = position if found < 0 else found + 4
            content[start : start + size - 4] = bytes(size - 4)
        return content

    return spoil(clip, name, change)


@pytest.mark.parametrize("reader", [read_video, probe, index_video, stream_video])
def test_what_is_no_video_fails(reader, tmp_path):
    cases = {
        "missing.mp4": (None, "no such file"),
        "empty.mp4": (b"", "is empty"),
        "words.mp4": (b"just some words\n" * 50, "cannot read"),
        "words.txt": (b"just some words\n" * 50, "cannot read|text file"),
        "noise.mp4": (np.random.default_rng(0).bytes(5000), "cannot read|no video|no frames"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(MediaError, match=message) as caught:
            reader(path)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="is not a file"):
        reader(tmp_path)


def test_sound_without_video_fails(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        track = container.add_stream("aac", rate=48000, layout="stereo")
        clips.write_tone(container, track, 0.5)
    with pytest.raises(NoVideoStreamError, match=r"song\.m4a.*only sound"):
        read_video(path)


def test_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "cover.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        track = container.add_stream("aac", rate=48000, layout="stereo")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        image = np.zeros((64, 64, 3), np.uint8)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        clips.write_tone(container, track, 0.5)
    with pytest.raises(NoVideoStreamError, match=r"cover\.m4a.*only a cover picture"):
        read_video(path)


def test_mp4_cut_before_its_table_fails(clip):
    path = spoil(clip("h264_bframes"), "cut", lambda content: content[: len(content) * 6 // 10])
    with pytest.raises(DecodeError, match=r"cannot read .*cut\.mp4"):
        read_video(path)


@pytest.mark.parametrize("kind", ["h264_mkv", "vp9", "h264_ts_offset", "h264_fragmented"])
def test_cut_file_gives_its_leading_part(kind, clip, truth):
    path = spoil(clip(kind), "cut", lambda content: content[: len(content) * 6 // 10])
    video = read_video(path, frames=1000, workers=2)

    assert 20 < len(video) < 72
    check(video, clip(kind).numbers, truth(kind))


H264 = ["h264_bframes", "h264_mkv", "h264_ts_offset", "h264_fragmented", "h264_one_keyframe"]


@pytest.mark.parametrize("kind", [*H264, "hevc", "av1", "mpeg4"])
def test_damage_is_counted_and_filled_from_before(kind, clip, truth):
    path = wound(clip(kind), "wounded")
    video = read_video(path, frames=1000, workers=2)

    check(video, clip(kind).numbers, truth(kind))
    assert 0 < video.damaged < len(video)
    again = read_video(path, frames=1000, workers=1)
    assert np.array_equal(video.frames.numpy(), again.frames.numpy())
    assert np.array_equal(video.substituted.numpy(), again.substituted.numpy())


def test_frame_threads_report_all_damage(tmp_path):
    """A file with one keyframe is decoded by frame threads, one of which may hand out a frame that
    another has not yet found to be cut off: this is seen once in eight to sixty."""
    options = clips.x264("keyint=infinite:scenecut=0:bframes=3:qp=15")  # large frames
    whole = clips.encode(tmp_path / "one.ts", options=options)
    with av.open(str(whole.path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    by_place = sorted(range(len(packets)), key=lambda number: packets[number].pts)
    early = [n for n in range(30, 60) if by_place.index(n) < n]  # not the last to be shown

    seen = 0
    for last in early:
        path = tmp_path / "cut.ts"
        path.write_bytes(whole.path.read_bytes()[: packets[last + 1].pos - 188])
        alone = read_video(path, frames=1000, workers=1)
        check(alone, whole.numbers, clips.decode_sequentially(whole.path))
        seen += alone.damaged
        for _ in range(2):
            video = read_video(path, frames=1000, workers=2)
            assert np.array_equal(video.substituted.numpy(), alone.substituted.numpy())
            assert np.array_equal(video.frames.numpy(), alone.frames.numpy())
    assert seen > 4


def test_frame_threads_are_used_where_they_report_damage(clip, tmp_path):
    """A frame may lack a slice without an error; an open GOP may start with errors."""
    sliced = clips.encode(tmp_path / "sliced.mp4", options=clips.x264("slices=4:bframes=0"))
    kinds = {"h264_one_keyframe": 2, "hevc_open_gop_mkv": 2, "h264_open_gop": 1, "mpeg4": 1}
    paths = {clip(kind).path: threads for kind, threads in kinds.items()} | {sliced.path: 1}
    for path, threads in paths.items():
        decoder = PacketDecoder(index_video(path), 2)
        assert decoder._context.thread_count == threads
        decoder.close()
    with av.open(str(sliced.path)) as container:
        stream = container.streams.video[0]
        extradata = stream.codec_context.extradata
        assert {slice_count(bytes(p), extradata) for p in container.demux(stream) if p.size} == {4}


@pytest.mark.parametrize("kind", KINDS)
def test_frame_threads_report_no_damage_that_is_not_there(kind, clip):
    """Else all would be decoded a second time."""
    path = clip(kind).path
    last = index_video(path).info.frame_count - 1
    wanted = [last // 2, last] if last else [0]
    alone, beside = (read_video(path, indices=wanted, workers=workers) for workers in (1, 4))
    assert torch.equal(alone.frames, beside.frames)
    assert beside.pictures_decoded <= alone.pictures_decoded * 1.2 + 2


def check(video, numbers, whole):
    """Each frame is the one of its time, or, if it is counted as a substitute, an earlier one.

    All those are, pixel for pixel, what the undamaged file gives, `whole`.
    """
    for frame in video.frames.numpy():
        assert (frame == whole[numbers.index(clips.read_number(frame))]).all()
    seen = [clips.read_number(frame) for frame in video.frames.numpy()]
    due = [numbers[round(seconds * 30)] for seconds in video.pts_seconds.tolist()]
    substituted = video.substituted.tolist()
    assert [number for number, bad in zip(seen, substituted, strict=True) if not bad] == [
        number for number, bad in zip(due, substituted, strict=True) if not bad
    ]
    for number, expected, bad in zip(seen, due, substituted, strict=True):
        assert not bad or -1 < number <= expected
    assert video.damaged == sum(substituted)


def test_substitute_is_the_frame_before(clip):
    path, _ = blanked(clip("h264_all_intra"), "hole", slice(30, 31))

    video = read_video(path, indices=[28, 29, 30, 31], workers=1)

    assert [clips.read_number(frame) for frame in video.frames.numpy()] == [28, 29, 29, 31]
    assert video.substituted.tolist() == [False, False, True, False]
    assert video.damaged == 1
    assert "damaged=1" in repr(video)


def test_damaged_first_frame_takes_the_next(clip):
    path, _ = blanked(clip("h264_all_intra"), "beheaded", slice(1))

    video = read_video(path, indices=[0, 5], workers=1)

    assert clips.read_number(video.frames[0].numpy()) == 1
    assert video.substituted.tolist() == [True, False]


@pytest.mark.parametrize(("first", "last"), [(30, 50), (0, 20)])
def test_a_long_stretch_of_damage_is_filled(first, last, clip, truth):
    """From before it, however far; or, at the start, from behind it."""
    path, _ = blanked(clip("h264_all_intra"), f"stretch_{first}", slice(first, last))

    for wanted in (list(range(72)), [first + 10], [first, last, last - 1]):
        for workers in (1, 3):
            video = read_video(path, indices=wanted, workers=workers)
            stand_in = first - 1 if first else last
            due = [stand_in if first <= rank < last else rank for rank in wanted]
            assert np.array_equal(video.frames.numpy(), truth("h264_all_intra")[due])
            assert video.substituted.tolist() == [first <= rank < last for rank in wanted]


def test_a_long_stretch_is_searched_once(clip):
    """Not from each of its frames on, all the way back."""
    path, packets = blanked(clip("h264_all_intra"), "nearly_all", slice(2, None))

    video = read_video(path, indices=range(72), workers=1)

    assert [clips.read_number(frame) for frame in video.frames.numpy()] == [0, *[1] * 71]
    assert video.bytes_read < 12 * sum(packet.size for packet in packets)


def test_a_damaged_start_is_searched_once(clip, truth):
    path, packets = blanked(clip("h264_all_intra"), "late", slice(None, 60))

    video = read_video(path, indices=range(72), workers=1)

    due = [max(rank, 60) for rank in range(72)]
    assert np.array_equal(video.frames.numpy(), truth("h264_all_intra")[due])
    assert video.damaged == 60
    assert video.bytes_read < 60 * sum(packet.size for packet in packets)


def test_frames_behind_a_damaged_start_are_not_lost(clip, truth):
    """A stream whose first keyframe is damaged, in one unit that is longer than the window."""
    path, _ = blanked(clip("h264_open_gop"), "start", slice(1))

    for workers in (1, 2):
        groups = list(stream_video(path, frames=72, group=2, workers=workers))
        frames = np.concatenate([group.frames.numpy() for group in groups])
        bad = np.concatenate([group.substituted.numpy() for group in groups])
        assert bad[0] and not bad[24:].any() and len(frames) == 72
        assert np.array_equal(frames[~bad], truth("h264_open_gop")[~bad])


def test_a_later_intact_frame_is_better_than_a_damaged_one(clip, truth):
    source = clip("h264_all_intra").path
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[:10]:  # half of each: players show the other half
        half = packet.size // 2
        content[packet.pos + half : packet.pos + packet.size] = bytes(packet.size - half)
    path = source.with_name("halves.mp4")
    path.write_bytes(content)

    video = read_video(path, indices=[0, 5, 30])

    assert np.array_equal(video.frames.numpy(), truth("h264_all_intra")[[10, 10, 30]])
    assert video.substituted.tolist() == [True, True, False]


def test_a_damaged_start_hides_no_rotation(clip, monkeypatch):
    """The first frame that can be decoded tells the rotation, wherever it comes."""
    path, _ = blanked(clip("h264_rotated"), "beheaded_turned", slice(None, 24))
    monkeypatch.setattr("tokenprune.media.index.scan.MOST_CHECKED", 10)

    video = read_video(path, indices=[3, 40])

    assert video.info.rotation == 270 and video.frames.shape[2:] == (112, 192)
    assert clips.read_number(video.frames[1].numpy()) == 40
    assert video.substituted.tolist() == [True, False]


def test_packets_passed_over_are_reported(clip):
    """So that reading can be ended, and is not taken for hanging."""
    index, seen = index_video(clip("h264_ts_joined").path), []
    reader = PacketReader(index, lambda: seen.append(1))
    (number, _) = next(reader.packets(60, 60))
    assert number == 60 and len(seen) > 60
    reader.close()


def test_nothing_decodable_fails(clip):
    def wipe(content):
        start = content.index(b"mdat") + 4
        end = content.rindex(b"moov") - 4 if content.rindex(b"moov") > start else len(content)
        content[start:end] = bytes(end - start)
        return content

    path = spoil(clip("h264_no_bframes"), "wiped", wipe)
    with pytest.raises(
        DecodeError, match=r"wiped\.mp4.* is damaged: nothing is left to stand for frame 0"
    ):
        read_video(path, frames=4)


def test_file_that_changes_while_read_fails(clip, tmp_path, monkeypatch):
    path = tmp_path / "swapped.mp4"
    path.write_bytes(clip("h264_no_bframes").path.read_bytes())
    index = index_video(path, scan=True)
    path.write_bytes(clip("h264_bframes").path.read_bytes())
    monkeypatch.setattr("tokenprune.media.reader.index_video", lambda path, **_: index)

    with pytest.raises(DecodeError, match=re.escape("swapped.mp4' changed since it was opened")):
        read_video(path, frames=8)
