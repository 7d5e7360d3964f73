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
ENTRIES_CHECKED = 64  # of FFmpeg's, and as many of its keyframes
KEYFRAMES_CHECKED = 16  # for intra refresh; the others are when they are decoded


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The packets of a track, in decode order; PTS lack a constant offset.

    Attributes:
        dts: `[P]` decode timestamp in ticks.
        shift: `[P]` composition offset, from DTS to PTS, in ticks, up to a constant.
        duration: `[P]` in ticks.
        size: `[P]` bytes.
        position: `[P]` where it begins in the file.
        keyframe: `[P]` bool.
        discard: `[P]` bool, True for packets that an edit list cuts: decoded, but not shown.
    """

    dts: Ints
    shift: Ints
    duration: Ints
    size: Ints
    position: Ints
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
        moov = _moov(path) or b""
        track = _track(moov, stream.id)
        samples = None if track is None else _Samples(track, _timescale(moov, b"mvhd"))
    except (struct.error, ValueError, IndexError, KeyError, OSError):
        return None  # the scan will say what is wrong, if anything is
    if samples is None:
        return None
    size = Path(path).stat().st_size
    table = _plain_table(samples, entries)
    table = _table(samples, entries) if table is None else table
    if table is None or int((table.position + table.size).max(initial=0)) > size:
        return None
    if _has_intra_refresh(path, stream, table.position[table.keyframe]):
        return None
    return table


def _plain_table(samples: "_Samples", entries: Any) -> SampleTable | None:
    """The table as it is in the file, if some of FFmpeg's entries agree; None if they do not.

    To look at all of FFmpeg's entries takes longer than all else. They differ from the samples
    where an edit list cuts some, and by a constant offset of the times.
    """
    count = len(samples.size)
    if len(entries) != count or samples.edited or not samples.size.all():
        return None
    keyframes = np.flatnonzero(samples.keyframe)
    places = [np.linspace(0, count - 1, ENTRIES_CHECKED).astype(int)]
    places.append(keyframes[np.linspace(0, len(keyframes) - 1, ENTRIES_CHECKED).astype(int)])
    looked_at = np.unique(np.concatenate(places))
    seen = np.array([_ENTRY(entries[int(at)]) for at in looked_at], np.int64)  # [L, 4]
    offset = seen[0, 0] - samples.dts[looked_at[0]]
    expected = np.stack(
        [
            samples.dts[looked_at] + offset,
            samples.position[looked_at],
            samples.size[looked_at],
            samples.keyframe[looked_at],
        ],
        axis=1,
    )
    if not np.array_equal(seen, expected):
        return None
    return SampleTable(
        dts=samples.dts + offset,
        shift=samples.shift,
        duration=samples.duration,
        size=samples.size,
        position=samples.position,
        keyframe=samples.keyframe,
        discard=np.zeros(count, bool),
    )


def _table(samples: "_Samples", entries: Any) -> SampleTable | None:
    """The table as FFmpeg has it, with edit lists applied; None if samples do not explain it."""
    values = chain.from_iterable(map(_ENTRY, entries))
    dts, position, size, flags = np.fromiter(values, np.int64).reshape(-1, 4).T
    order = np.argsort(samples.position, kind="stable")
    found = np.searchsorted(samples.position, position, sorter=order)
    sample = order[np.minimum(found, len(order) - 1)]
    if (samples.position[sample] != position).any() or (samples.size[sample] != size).any():
        return None
    full = size > 0
    if np.bincount(sample[full]).max(initial=0) > 1:
        return None
    sample = sample[full]
    return SampleTable(
        dts=dts[full],
        shift=samples.shift[sample],
        duration=samples.duration[sample],
        size=size[full],
        position=position[full],
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

    def __init__(self, track: bytes, timescale: int) -> None:
        scales = timescale, _timescale(_descend(track, b"mdia"), b"mdhd")
        boxes = _descend(track, b"mdia", b"minf", b"stbl")
        edits = _first(track, b"edts")
        shown = [] if edits is None else _edits(_first(edits, b"elst") or b"")
        if len(shown) > 1:
            raise ValueError("several edits")
        self.size = _sizes(_need(boxes, b"stsz"))
        self.duration = _runs(_need(boxes, b"stts"), len(self.size))
        shifts = _first(boxes, b"ctts")
        zeros = np.zeros(len(self.size), np.int64)
        self.shift = zeros if shifts is None else _runs(shifts, len(self.size))
        self.position = self._positions(boxes)
        self.dts = np.cumsum(self.duration) - self.duration
        self.keyframe = self._keyframes(boxes)
        self.edited = any(self._cuts(*edit, scales) for edit in shown)

    def _keyframes(self, boxes: bytes) -> Bools:
        listed = _first(boxes, b"stss")
        if listed is None:
            return np.ones(len(self.size), bool)
        keyframe = np.zeros(len(self.size), bool)
        keyframe[_words(listed, 8, ">u4") - 1] = True  # or an IndexError
        return keyframe

    def _cuts(self, duration: int, begin: int, scales: tuple[int, int]) -> bool:
        """Whether an edit may leave out samples: those shown before its begin, or from its end."""
        shown = self.dts + self.shift
        end = begin + duration * scales[1] // max(1, scales[0])
        return begin > int(shown.min()) or end <= int(shown.max())

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


def _timescale(boxes: bytes, name: bytes) -> int:
    """Ticks per second, of a movie's or a track's header."""
    head = _need(boxes, name)
    scale: int = struct.unpack_from(">I", head, 20 if head[0] else 12)[0]
    return scale


def _edits(box: bytes) -> list[tuple[int, int]]:
    """Duration and begin of the edits that show something: empty ones only delay the start."""
    layout = struct.Struct(">QqI" if box and box[0] else ">IiI")
    count = struct.unpack_from(">I", box, 4)[0]
    if len(box) < 8 + layout.size * count:
        raise ValueError("an edit list shorter than it says")
    edits = [layout.unpack_from(box, 8 + layout.size * number) for number in range(count)]
    if any(speed != 1 << 16 for _, _, speed in edits):
        raise ValueError("an edit changes the speed")
    return [(duration, begin) for duration, begin, _ in edits if begin != -1]


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
