"""HEIC files as phones write them: pictures in tiles, with turns, masks and other pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Heic"]

Pixels = NDArray[np.uint8]


@dataclass
class Heic:
    """Items and their properties, in the order in which they are added."""

    items: list[tuple[bytes, bytes, bool]] = field(default_factory=list)  # kind, data, hidden
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)
    belong: list[tuple[int, int]] = field(default_factory=list)
    references: list[tuple[bytes, int, list[int]]] = field(default_factory=list)

    def coded(self, pixels: Pixels, *, hidden: bool = False) -> int:
        """Add a coded picture `[H, W, 3]`."""
        data, configuration = _hevc(pixels)
        number = self._add(b"hvc1", data, hidden)
        self.property(number, b"hvcC", configuration)
        self.property(number, b"ispe", _size(pixels.shape[1], pixels.shape[0]))
        return number

    def grid(self, pixels: Pixels, rows: int, columns: int, tile: int) -> int:
        """Add a picture in square tiles; the last ones may reach beyond it."""
        height, width = pixels.shape[:2]
        whole = np.zeros((rows * tile, columns * tile, 3), np.uint8)
        whole[:height, :width] = pixels
        parts = [
            self.coded(
                whole[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile].copy(), hidden=True
            )
            for r in range(rows)
            for c in range(columns)
        ]
        sizes = width.to_bytes(2, "big") + height.to_bytes(2, "big")
        number = self._add(b"grid", bytes([0, 0, rows - 1, columns - 1]) + sizes, False)
        self.property(number, b"ispe", _size(width, height))
        self.references.append((b"dimg", number, parts))
        return number

    def _add(self, kind: bytes, data: bytes, hidden: bool) -> int:
        self.items.append((kind, data, hidden))
        return len(self.items)

    def property(self, number: int, kind: bytes, content: bytes) -> None:
        self.properties.append((kind, content))
        self.belong.append((number, len(self.properties)))

    def save(self, path: Path, primary: int, brand: bytes = b"heic") -> Path:
        """Write the file; coded data lie in `mdat`, what a grid says in `idat`."""
        head = _box(b"ftyp", brand, bytes(4), b"mif1", b"heic", b"hevc")
        meta = self._meta(primary, 0)
        path.write_bytes(
            head + self._meta(primary, len(head) + len(meta) + 8) + _box(b"mdat", *self._data(b""))
        )
        return path

    def _data(self, grid: bytes) -> list[bytes]:
        return [data for kind, data, _ in self.items if (kind == b"grid") == bool(grid)]

    def _meta(self, primary: int, media: int) -> bytes:
        infos = [
            _full(b"infe", 2, hidden, _two(n), _two(0), kind, b"\0")
            for n, (kind, _, hidden) in enumerate(self.items, 1)
        ]
        places, at = [], {True: 0, False: media}
        for number, (kind, data, _) in enumerate(self.items, 1):
            small = kind == b"grid"
            extent = _two(1) + at[small].to_bytes(4, "big") + len(data).to_bytes(4, "big")
            places.append(_two(number) + _two(int(small)) + _two(0) + extent)
            at[small] += len(data)
        refs = [
            _box(kind, _two(source), _two(len(targets)), *map(_two, targets))
            for kind, source, targets in self.references
        ]
        entries = [_two(number) + bytes([1, index]) for number, index in self.belong]
        ipma = _full(b"ipma", 0, 0, len(entries).to_bytes(4, "big"), *entries)
        ipco = _box(b"ipco", *(_box(kind, content) for kind, content in self.properties))
        return _full(
            b"meta",
            0,
            0,
            _full(b"hdlr", 0, 0, bytes(4), b"pict", bytes(13)),
            _full(b"pitm", 0, 0, _two(primary)),
            _full(b"iinf", 0, 0, _two(len(infos)), *infos),
            _full(b"iref", 0, 0, *refs),
            _box(b"iprp", ipco, ipma),
            _box(b"idat", *self._data(b"grid")),
            _full(b"iloc", 1, 0, b"\x44\0", _two(len(places)), *places),
        )


def _two(number: int) -> bytes:
    return number.to_bytes(2, "big")


def _size(width: int, height: int) -> bytes:
    return bytes(4) + width.to_bytes(4, "big") + height.to_bytes(4, "big")


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return (len(content) + 8).to_bytes(4, "big") + kind + content


def _full(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return _box(kind, bytes([version]) + int(flags).to_bytes(3, "big"), *parts)


def _hevc(pixels: Pixels) -> tuple[bytes, bytes]:
    """One intra frame, and its configuration (hvcC), both as the MP4 muxer writes them."""
    import io

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx265", rate=1)
        stream.width, stream.height = pixels.shape[1], pixels.shape[0]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.options = {"x265-params": "log-level=none:lossless=1:keyint=1"}
        frame = av.VideoFrame.from_image(Image.fromarray(pixels))
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as made:
        video = made.streams.video[0]
        packet = next(packet for packet in made.demux(video) if packet.size)
        return bytes(packet), bytes(video.codec_context.extradata)
