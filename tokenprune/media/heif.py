"""HEIC pictures: the primary item of a file, put together from its tiles.

Phones store a photograph as a grid of HEVC pictures. The boxes say which items there are, where
their bytes lie, how tiles are laid, and how the whole is cropped, turned and mirrored (ISO/IEC
23008-12); the tiles are decoded by FFmpeg.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import av
from PIL import Image

from tokenprune.errors import DecodeError
from tokenprune.media.limits import check_pixels

__all__ = ["HeifPicture"]

CODECS = {"hvc1": ("hevc", "hvcC"), "av01": ("libdav1d", "av1C"), "avc1": ("h264", "avcC")}
PICTURES = {*CODECS, "grid", "iden", "iovl", "jpeg"}
MATRICES = {1: 1, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # of nclx: those that the scaler knows
ALPHA = ("urn:mpeg:hevc:2015:auxid:1", "urn:mpeg:mpegB:cicp:systems:auxiliary:alpha")
TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
MIRRORS = (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_LEFT_RIGHT)


@dataclass
class _Item:
    kind: str
    hidden: bool
    extents: list[tuple[int, int]] = field(default_factory=list)  # from where, bytes; 0: to the end
    within: bytes | None = None  # extents count from here: the file, or the box of small data
    properties: list[tuple[str, bytes]] = field(default_factory=list)

    def property(self, kind: str) -> bytes | None:
        return next((content for name, content in self.properties if name == kind), None)


class HeifPicture:
    """The picture of a HEIC file, with what `stills` asks of Pillow's pictures.

    Args:
        name: of the file, for messages.
        content: all of it.

    Raises:
        DecodeError: the boxes are damaged, or say what is not supported.
    """

    format = "HEIC"

    def __init__(self, name: str, content: bytes) -> None:
        self.filename = name
        self.info: dict[str, object] = {}
        self._content = content
        self._items: dict[int, _Item] = {}
        self._references: dict[tuple[str, int], list[int]] = {}
        try:
            meta = next(body for kind, body in _boxes(content) if kind == "meta")
            boxes = dict(_boxes(meta[4:]))
            self._read(boxes)
            self._primary = int.from_bytes(boxes["pitm"][4:], "big")
            self.size = self._size(self._primary)
        except (StopIteration, KeyError, IndexError, ValueError) as error:
            raise DecodeError(
                f"cannot read {name!r} as an image: its HEIC boxes are damaged; give an image that"
                " other programs open"
            ) from error

    @property
    def n_frames(self) -> int:
        """Pictures that are not hidden, and not parts, previews or masks of others."""
        aside = {one for kind in ("thmb", "auxl", "cdsc") for one in self._from(kind)}
        for (kind, _), targets in self._references.items():
            if kind == "dimg":
                aside.update(targets)
        shown = {
            number
            for number, item in self._items.items()
            if item.kind in PICTURES and not item.hidden and number not in aside
        }
        return len(shown | {self._primary})

    def decode(self) -> Image.Image:
        """The picture, upright; mode RGBA if it has an alpha.

        Raises:
            DecodeError: a tile is damaged, or of a kind that is not supported.
        """
        check_pixels(self.filename, *self._coded_size(self._primary))
        return self._shown(self._primary)

    # -- boxes

    def _from(self, kind: str) -> list[int]:
        return [number for name, number in self._references if name == kind]

    def _read(self, boxes: dict[str, bytes]) -> None:
        infos = boxes["iinf"]
        for _, body in _boxes(infos[4 + (2 if infos[0] == 0 else 4) :]):
            reader = _Reader(body, 4)
            number = reader.number(4 if body[0] == 3 else 2)
            reader.number(2)  # how it is encrypted
            kind = reader.content[reader.at : reader.at + 4].decode("latin-1")
            self._items[number] = _Item(kind, hidden=bool(body[3] & 1))
        self._read_places(boxes["iloc"], boxes.get("idat", b""))
        if references := boxes.get("iref"):
            wide = 4 if references[0] else 2
            for kind, body in _boxes(references[4:]):
                reader = _Reader(body)
                source = reader.number(wide)
                targets = [reader.number(wide) for _ in range(reader.number(2))]
                self._references[kind, source] = targets
        self._read_properties(dict(_boxes(boxes["iprp"]))["ipco"], boxes["iprp"])

    def _read_places(self, body: bytes, small: bytes) -> None:
        version, reader = body[0], _Reader(body, 4)
        sizes = reader.number(2)
        offsets, lengths, bases, indices = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        for _ in range(reader.number(4 if version == 2 else 2)):
            item = self._items.get(reader.number(4 if version == 2 else 2), _Item("", True))
            method = reader.number(2) & 15 if version else 0
            reader.number(2)  # which file
            base = reader.number(bases)
            item.within = (self._content, small)[method]
            for _ in range(reader.number(2)):
                reader.number(indices if version else 0)
                first = base + reader.number(offsets)
                item.extents.append((first, reader.number(lengths)))

    def _read_properties(self, container: bytes, body: bytes) -> None:
        properties = list(_boxes(container))
        for kind, part in _boxes(body):
            if kind != "ipma":
                continue
            wide, reader = 2 if part[3] & 1 else 1, _Reader(part, 4)
            for _ in range(reader.number(4)):
                item = self._items.get(reader.number(4 if part[0] else 2), _Item("", True))
                for _ in range(reader.number(1)):
                    index = reader.number(wide) & (0x7FFF if wide == 2 else 0x7F)
                    if index:
                        item.properties.append(properties[index - 1])

    def _bytes_of(self, number: int) -> bytes:
        item = self._items[number]
        within = item.within or b""
        return b"".join(
            within[first : first + count if count else None] for first, count in item.extents
        )

    # -- pictures

    def _coded_size(self, number: int) -> tuple[int, int]:
        """Width and height before the item is cropped and turned."""
        item = self._items[number]
        if item.kind == "grid":
            return self._grid(number)[2:]
        reader = _Reader(item.property("ispe") or b"", 4)
        return reader.number(4), reader.number(4)

    def _size(self, number: int) -> tuple[int, int]:
        size = self._coded_size(number)
        for kind, body in self._items[number].properties:
            if kind == "clap":
                left, top, right, bottom = _crop(body, size)
                size = right - left, bottom - top
            elif kind == "irot" and body[0] & 1:
                size = size[::-1]
        return size

    def _grid(self, number: int) -> tuple[int, int, int, int]:
        """Rows and columns of tiles, width and height of the whole."""
        reader = _Reader(self._bytes_of(number))
        reader.number(1)
        wide = 4 if reader.number(1) & 1 else 2
        rows, columns = reader.number(1) + 1, reader.number(1) + 1
        return rows, columns, reader.number(wide), reader.number(wide)

    def _shown(self, number: int) -> Image.Image:
        """An item as it is to be seen: with its alpha, cropped, turned and mirrored."""
        picture = self._coded(number)
        for mask in self._from("auxl"):
            role = self._items[mask].property("auxC") or b""
            if number in self._references["auxl", mask] and role[4:].startswith(
                tuple(urn.encode() for urn in ALPHA)
            ):
                picture = picture.convert("RGB")
                picture.putalpha(self._coded(mask).convert("L").resize(picture.size))
        for kind, body in self._items[number].properties:
            if kind == "clap":
                picture = picture.crop(_crop(body, picture.size))
            elif kind == "irot" and (turn := TURNS[body[0] & 3]) is not None:
                picture = picture.transpose(turn)
            elif kind == "imir":
                picture = picture.transpose(MIRRORS[body[0] & 1])
        return picture

    def _coded(self, number: int) -> Image.Image:
        kind = self._items[number].kind
        if kind == "iden":
            return self._shown(self._references["dimg", number][0])
        if kind != "grid":
            return self._decode(number)
        rows, columns, width, height = self._grid(number)
        tiles = self._references.get(("dimg", number), [])
        if len(tiles) != rows * columns:
            raise self._refused(f"it has {len(tiles)} tiles, not {rows} x {columns}")
        wide, high = self._coded_size(tiles[0])
        if wide * columns < width or high * rows < height:
            raise self._refused("its tiles do not cover it")
        check_pixels(self.filename, wide * columns, high * rows)
        whole = Image.new("RGB", (width, height))
        for place, tile in enumerate(tiles):
            if self._items[tile].kind not in CODECS or self._coded_size(tile) != (wide, high):
                raise self._refused("its tiles are not alike")
            row, column = divmod(place, columns)
            whole.paste(self._decode(tile), (column * wide, row * high))
        return whole

    def _decode(self, number: int) -> Image.Image:
        item = self._items[number]
        if item.kind not in CODECS:
            raise self._refused(f"items of kind {item.kind!r} are not supported")
        check_pixels(self.filename, *self._coded_size(number))
        codec, configuration = CODECS[item.kind]
        try:
            context: Any = av.CodecContext.create(codec, "r")
            context.extradata = item.property(configuration)
            context.thread_type = "NONE"
            frames = [
                frame
                for packet in (av.Packet(self._bytes_of(number)), None)
                for frame in context.decode(packet)
            ]
        except (av.error.FFmpegError, ValueError) as error:
            raise self._refused(f"a tile cannot be decoded ({error})") from error
        if not frames:
            raise self._refused("a tile cannot be decoded")
        frame = frames[0]
        colour = item.property("colr") or b""
        if colour[:4] == b"nclx" and len(colour) >= 11:  # it counts more than the coded data
            frame.colorspace = MATRICES.get(int.from_bytes(colour[8:10], "big"), frame.colorspace)
            frame.color_range = 2 if colour[10] & 0x80 else 1
        picture: Image.Image = frame.to_image()
        return picture.crop((0, 0, *self._coded_size(number)))

    def _refused(self, reason: str) -> DecodeError:
        return DecodeError(
            f"cannot read {self.filename!r} as an image: {reason}; give it as JPEG or PNG"
        )


class _Reader:
    """Reads big-endian numbers, one after the other."""

    def __init__(self, content: bytes, at: int = 0) -> None:
        self.content, self.at = content, at

    def number(self, width: int) -> int:
        if self.at + width > len(self.content):
            raise ValueError("a box ends early")
        self.at += width
        return int.from_bytes(self.content[self.at - width : self.at], "big")


def _boxes(content: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at + 8 <= len(content):
        size, begin = int.from_bytes(content[at : at + 4], "big"), at + 8
        if size == 1:
            size, begin = int.from_bytes(content[at + 8 : at + 16], "big"), at + 16
        elif size == 0:
            size = len(content) - at
        if size < begin - at:
            raise ValueError("a box is shorter than its head")
        yield content[at + 4 : at + 8].decode("latin-1"), content[begin : at + size]
        at += size


def _crop(body: bytes, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a clean aperture: its size, and its centre from the middle."""
    reader = _Reader(body)
    terms = [reader.number(4) for _ in range(8)]
    signed = [
        one - (1 << 32) if place in (4, 6) and one >> 31 else one for place, one in enumerate(terms)
    ]
    width, height, across, down = (signed[at] / max(1, signed[at + 1]) for at in (0, 2, 4, 6))
    left = round((size[0] - width) / 2 + across)
    top = round((size[1] - height) / 2 + down)
    box = (left, top, left + round(width), top + round(height))
    if not (0 <= left < box[2] <= size[0] and 0 <= top < box[3] <= size[1]):
        return (0, 0, *size)
    return box
