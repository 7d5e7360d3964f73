"""Long videos for the decoder's bench, each frame of which carries its number.

A minute is drawn and encoded: six scenes with hard cuts, slow pans, film grain. Longer files are
that minute repeated by stream copy, so their numbers begin anew every minute.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

RATE = 30
MINUTE = 60 * RATE  # frames
SCENES = 6
BITS = 20  # of a number; with white, black, parity, black: 24 cells along the top edge
CELLS = BITS + 4
BAR = 14  # the code is read in the row of this fraction of the height, half of the code's own

Plane = NDArray[np.uint8]


@dataclass(frozen=True)
class Footage:
    """A file to be made.

    Attributes:
        name: without the ending.
        height: pixels of a column.
        width: pixels of a row.
        keyframes: frames from keyframe to keyframe at most.
        kbits: per second.
        minutes: how often the minute is repeated.
    """

    name: str
    height: int
    width: int
    keyframes: int
    kbits: int
    minutes: int

    @property
    def minute(self) -> str:
        """The name of the minute of which it is made."""
        return f"minute-{self.height}p-g{self.keyframes}"


def make(footage: Footage, folder: Path, preset: str = "medium") -> Path:
    """The file, made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{footage.name}.mp4"
    if path.exists():
        return path
    minute = folder / f"{footage.minute}.mp4"
    if not minute.exists():
        _encode(footage, minute, preset)
    if path != minute:
        _repeat(minute, path, footage.minutes)
    return path


def read_number(picture: NDArray[np.uint8]) -> int:
    """The number on a picture `[3, H, W]`; -1 if it cannot be read."""
    _, height, width = picture.shape
    columns = ((np.arange(CELLS) + 0.5) * width / CELLS).astype(int)
    cells = picture[1, height // BAR, columns].astype(int)
    if cells[0] - cells[1] < 60:
        return -1
    bits = cells > (cells[0] + cells[1]) / 2
    number = sum(1 << bit for bit in range(BITS) if bits[1 + bit + 1])
    is_whole = sum(bits[2 : 2 + BITS]) % 2 == bits[2 + BITS] and not bits[-1]
    return number if is_whole else -1


def _encode(footage: Footage, path: Path, preset: str) -> None:
    part = path.with_suffix(".part")
    options = {"preset": preset, "x264-params": f"keyint={footage.keyframes}:bframes=3:threads=1"}
    with av.open(str(part), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options=options)
        stream.height, stream.width, stream.pix_fmt = footage.height, footage.width, "yuv420p"
        stream.bit_rate = footage.kbits * 1000
        pictures = _Pictures(footage.height, footage.width)
        for number in tqdm(range(MINUTE), desc=path.stem, unit="frame"):
            frame = av.VideoFrame.from_ndarray(pictures.draw(number), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    part.replace(path)


def _repeat(source: Path, path: Path, times: int) -> None:
    part = path.with_suffix(".part")
    with av.open(str(source)) as old, av.open(str(part), "w", format="mp4") as new:
        track = old.streams.video[0]
        length = round(MINUTE / RATE / Fraction(track.time_base or 1))
        stream: Any = new.add_stream_from_template(track)
        for minute in range(times):
            old.seek(0)
            for packet in old.demux(track):
                if packet.dts is None or packet.pts is None:  # the mark of the end
                    continue
                packet.pts += minute * length
                packet.dts += minute * length
                packet.stream = stream
                new.mux(packet)
    part.replace(path)


class _Pictures:
    """Draws pictures `[H * 3 / 2, W]`, in planes as the encoder takes them."""

    def __init__(self, height: int, width: int) -> None:
        self._height, self._width = height, width
        random = np.random.default_rng(0)
        self._scenes = [_texture(height * 5 // 4, width * 5 // 4, random) for _ in range(SCENES)]
        self._tints = random.integers(90, 166, (SCENES, 2))
        grain = random.normal(0, 4, (height * 2, width * 2))
        self._grain = grain.round().astype(np.int16)

    def draw(self, number: int) -> Plane:
        height, width = self._height, self._width
        random = np.random.default_rng(number)
        scene, age = divmod(number, MINUTE // SCENES)
        progress = age / (MINUTE // SCENES)
        top, left = int(progress * height / 5), int(progress * width / 5)
        luma = self._scenes[scene][top : top + height, left : left + width].astype(np.int16)
        side = height // 5
        x = int(progress * 3 % 1 * (width - side))
        luma[height // 2 : height // 2 + side, x : x + side] = 235 - 30 * scene
        down, right = random.integers(0, (height, width)).tolist()
        luma += self._grain[down : down + height, right : right + width]
        self._stamp(luma, number)
        picture = np.empty((height * 3 // 2, width), np.uint8)
        picture[:height] = luma.clip(16, 235)
        chroma = picture[height:].reshape(2, -1)
        chroma[:] = self._tints[scene][:, None]
        return picture

    def _stamp(self, luma: NDArray[np.int16], number: int) -> None:
        bits = [number >> bit & 1 for bit in range(BITS)]
        edges = (np.arange(CELLS + 1) * self._width / CELLS).round().astype(int)
        for cell, bit in enumerate([1, 0, *bits, sum(bits) % 2, 0]):
            luma[: self._height * 2 // BAR, edges[cell] : edges[cell + 1]] = 235 if bit else 16


def _texture(height: int, width: int, random: np.random.Generator) -> Plane:
    """Clouds with detail at all scales."""
    total = np.zeros((height, width), np.float32)
    for step in (256, 64, 16, 4):
        small = random.normal(0, 1, (height // step + 2, width // step + 2)).astype(np.float32)
        grown = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(grown) * step**0.5
    return np.asarray((126 + total * 2.2).clip(20, 230), np.uint8)
