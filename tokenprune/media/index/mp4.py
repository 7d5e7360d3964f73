"""The sample table of an MP4 file, which tells what demuxing all its packets would.

FFmpeg's index of the stream has the DTS, size and position of every packet, with edit lists
applied; only the composition offsets (PTS minus DTS, the `ctts` box) have to be read from the file.
What is found is compared with the first packets, and later with every packet that is decoded.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from tokenprune.errors import DecodeError
from tokenprune.media.index.index import Bools, Ints
from tokenprune.media.index.intra_refresh import HEAD_BYTES, is_intra_refresh

__all__ = ["SampleTable", "check_data_is_here", "sample_table"]

LARGEST_MOOV_BYTES = 1 << 28
LARGEST_COUNT = 1 << 24  # samples: three days of 60 frames a second
_ENTRY = attrgetter("timestamp", "pos", "size", "flags")
KEYFRAMES_CHECKED = 16  # for intra refresh; the others are when they are decoded


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The packets of a track, in decode order; PTS lack a constant offset.

    Attributes:
        dts: `[P]` decode timestamp in ticks.
        shift: `[P]` composition offset, from DTS to PTS, in ticks, up to a constant.
        duration: `[P]` in ticks.
        size: `[P]` bytes.
        keyframe: `[P]` bool.
        discard: `[P]` bool, True for packets that an edit list cuts: decoded, but not shown.
    """

    dts: Ints
    shift: Ints
    duration: Ints
    size: Ints
    keyframe: Bools
    discard: Bools


def sample_table(path: str, stream: Any) -> SampleTable | None:
    """The sample table of an open file's video stream; None where it does not tell everything.

    That is so for other containers, fragmented MP4, edit lists with more than one edit, files that
    are cut off, and tables with anything unusual in them.
    """
    entries = stream.index_entries
    if "mp4" not in stream.container.format.name or not len(entries):
        return None
    if stream.codec_context.name == "vp8":  # tells hidden frames in their data only
        return None
    try:
        moov = _moov(path)
        track = None if moov is None else _track(moov, stream.id)
        samples = None if track is None else _Samples(track)
    except (struct.error, ValueError, IndexError, KeyError, OSError):
        return None  # the scan will say what is wrong, if anything is
    if samples is None:
        return None
    values = chain.from_iterable(map(_ENTRY, entries))
    dts, position, size, flags = np.fromiter(values, np.int64).reshape(-1, 4).T
    if int((position + size).max()) > Path(path).stat().st_size:
        return None
    order = np.argsort(samples.position, kind="stable")
    found = np.searchsorted(samples.position, position, sorter=order)
    sample = order[np.minimum(found, len(order) - 1)]
    if (samples.position[sample] != position).any() or (samples.size[sample] != size).any():
        return None
    full = size > 0
    if np.bincount(sample[full]).max(initial=0) > 1:
        return None
    sample = sample[full]
    if _has_intra_refresh(path, stream, position[full & (flags & 1 > 0)]):
        return None
    return SampleTable(
        dts=dts[full],
        shift=samples.shift[sample],
        duration=samples.duration[sample],
        size=size[full],
        keyframe=(flags[full] & 1).astype(bool),
        discard=(flags[full] & 2).astype(bool),
    )


def check_data_is_here(container: Any, stream: Any) -> None:
    """Check that a track of a movie has its data in the file itself.

    Raises:
        DecodeError: it refers to another one.
    """
    if "mp4" not in container.format.name:
        return
    try:
        moov = _moov(container.name)
        track = None if moov is None else _track(moov, stream.id)
        elsewhere = track is not None and _is_elsewhere(track)
    except (struct.error, ValueError, IndexError, KeyError, OSError):
        return  # whoever reads it will say what is wrong, if anything is
    if elsewhere:
        raise DecodeError(
            f"cannot read {container.name!r}: its data lies in another file, to which it refers; "
            'give that one, or allow those in its folder with references="folder"'
        )


def _is_elsewhere(track: bytes) -> bool:
    try:
        references = _descend(track, b"mdia", b"minf", b"dinf", b"dref")[8:]  # flags, count
    except KeyError:
        return False
    return any(len(box) >= 4 and not box[3] & 1 for _, box in _boxes(references))


def _has_intra_refresh(path: str, stream: Any, keyframes: Ints) -> bool:
    """Whether keyframes at these positions are rounds of intra refresh; checks some of them."""
    count = min(KEYFRAMES_CHECKED, len(keyframes))
    some = keyframes[np.linspace(0, len(keyframes) - 1, count).astype(int)]
    with open(path, "rb") as file:
        for position in some.tolist():
            file.seek(position)
            if is_intra_refresh(stream, file.read(HEAD_BYTES)):
                return True
    return False


class _Samples:
    """The samples `[S]` of a track, from the boxes of its sample table (`stbl`)."""

    def __init__(self, track: bytes) -> None:
        boxes = _descend(track, b"mdia", b"minf", b"stbl")
        edits = _first(track, b"edts")
        if edits is not None and _edit_count(_first(edits, b"elst") or b"") > 1:
            raise ValueError("several edits")
        self.size = _sizes(_need(boxes, b"stsz"))
        self.duration = _runs(_need(boxes, b"stts"), len(self.size))
        shifts = _first(boxes, b"ctts")
        zeros = np.zeros(len(self.size), np.int64)
        self.shift = zeros if shifts is None else _runs(shifts, len(self.size))
        self.position = self._positions(boxes)

    def _positions(self, boxes: bytes) -> Ints:
        wide = _first(boxes, b"co64")
        chunks = _words(wide, 8, ">u8") if wide else _words(_need(boxes, b"stco"), 8, ">u4")
        runs = _words(_need(boxes, b"stsc"), 8, ">u4").reshape(-1, 3)
        if (runs[:, 2] != 1).any():
            raise ValueError("several kinds of samples")
        lengths = np.diff(runs[:, 0], append=len(chunks) + 1)
        counts = np.repeat(runs[:, 1], lengths)
        if int(counts.sum()) != len(self.size):
            raise ValueError("chunks and samples differ in number")
        before = np.cumsum(self.size) - self.size
        starts = np.cumsum(counts) - counts
        filled = counts > 0
        in_chunk = before - np.repeat(before[starts[filled]], counts[filled])
        positions: Ints = np.repeat(chunks, counts) + in_chunk
        return positions


def _moov(path: str) -> bytes | None:
    """The content of the `moov` box; None if the file is fragmented (`moof`), or unusual."""
    found = None
    with open(path, "rb") as file:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            payload = length - 8
            if length == 1:
                payload = struct.unpack(">Q", file.read(8))[0] - 16
            if kind in (b"moof", b"sidx"):
                return None
            if length == 0:  # to the end of the file
                return found
            if kind == b"moov":
                if found is not None or payload > LARGEST_MOOV_BYTES:
                    return None
                found = file.read(payload)
            elif payload < 0:
                return None
            else:
                file.seek(payload, 1)
    return found


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if length < 8 or at + length > len(content):
            return
        yield kind, content[at + 8 : at + length]
        at += length


def _first(content: bytes, name: bytes) -> bytes | None:
    return next((box for kind, box in _boxes(content) if kind == name), None)


def _need(content: bytes, name: bytes) -> bytes:
    box = _first(content, name)
    if box is None:
        raise KeyError(name)
    return box


def _descend(content: bytes, *names: bytes) -> bytes:
    for name in names:
        content = _need(content, name)
    return content


def _track(moov: bytes, number: int) -> bytes | None:
    """The content of a track's `trak` box, by the track's number."""
    if _first(moov, b"mvex") is not None:
        return None
    for kind, box in _boxes(moov):
        if kind == b"trak":
            head = _need(box, b"tkhd")
            if struct.unpack_from(">I", head, 20 if head[0] else 12)[0] == number:
                return box
    return None


def _words(box: bytes, start: int, kind: str) -> Ints:
    """The numbers of a box, from byte `start` on."""
    return np.frombuffer(box, kind, offset=start).astype(np.int64)


def _edit_count(box: bytes) -> int:
    """The number of edits that show something: empty ones only delay the start."""
    step = 20 if box and box[0] else 12
    count = struct.unpack_from(">I", box, 4)[0]
    if len(box) < 8 + step * count:
        raise ValueError("an edit list shorter than it says")
    times = [box[8 + step * n :][: step - 4] for n in range(count)]
    if any(box[8 + step * n + step - 4 :][:4] != b"\0\1\0\0" for n in range(len(times))):
        raise ValueError("an edit changes the speed")
    half = (step - 4) // 2
    return sum(time[half:] != b"\xff" * half for time in times)


def _sizes(box: bytes) -> Ints:
    same, count = struct.unpack_from(">II", box, 4)
    if count > LARGEST_COUNT:
        raise ValueError("more samples than a table could tell of")
    return np.full(count, same, np.int64) if same else _words(box, 12, ">u4")[:count]


def _runs(box: bytes, samples: int) -> Ints:
    """`[S]` values that a box stores as pairs of a count and a value."""
    pairs = _words(box, 8, ">i4").reshape(-1, 2)
    if (pairs[:, 0] < 0).any() or int(pairs[:, 0].sum()) != samples:  # before memory is taken
        raise ValueError("times and samples differ in number")
    return np.repeat(pairs[:, 1], pairs[:, 0])
