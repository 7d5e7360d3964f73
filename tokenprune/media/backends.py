"""decord and torchcodec as decoders in the place of our own.

They decode only files in which they are known to number frames and to seek right; of others they
may give wrong frames without an error, so those are refused. What they deliver is compared with the
packet index, frame by frame: number, size and PTS.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.errors import DecodeError, MediaError, MissingExtraError, first_line
from tokenprune.media.decode.plan import has_open_gops
from tokenprune.media.decode.pool import DecodedGroup
from tokenprune.media.index.index import Ints, PacketIndex

__all__ = [
    "LIBRARIES",
    "Backend",
    "DecordDecoder",
    "LibraryDecoder",
    "TorchcodecDecoder",
    "check_backend",
]

Backend = Literal["pyav", "decord", "torchcodec"]
TIME_SLACK_SECONDS = 2e-3  # Matroska rounds times to milliseconds, and decord to floats
FRAMES_AT_ONCE = 16  # at full size, before they are scaled


def check_backend(backend: str) -> None:
    """Check the name of a backend, and that its library can be loaded.

    Raises:
        MediaError: there is no such backend.
        MissingExtraError: its library is not installed, or does not load.
    """
    if backend not in get_args(Backend):
        known = ", ".join(f'"{name}"' for name in get_args(Backend))
        raise MediaError(f"backend must be one of {known}, got {backend!r}")
    if backend != "pyav":
        LIBRARIES[backend].load()


class LibraryDecoder:
    """Decodes frames by rank with another library, in the caller's thread, group by group.

    Args:
        index: the packet index of the file.
        ranks: `[F]` presentation ranks, strictly increasing.
        size: height and width of the frames.
        bounds: `[G + 1]` rows at which groups begin, and F.
        workers: threads inside the library.

    Attributes:
        pictures_decoded: 0, since these libraries do not report it.
        bytes_read: 0, for the same reason.

    Raises:
        DecodeError: the library would not give this file's true frames.
    """

    name: str
    codecs: frozenset[str]  # that are known to come out right
    pictures_decoded = 0
    bytes_read = 0

    def __init__(
        self, index: PacketIndex, ranks: Ints, size: tuple[int, int], *, bounds: Ints, workers: int
    ) -> None:
        self._index, self._ranks, self._size, self._bounds = index, ranks, size, bounds
        if reason := self._why_not():
            self._refuse(reason)
        try:
            self._open(index.info.path, workers)
        except Exception as error:
            self._refuse(first_line(error), error)
        if self._count() != index.info.frame_count:
            self._refuse(f"it counts {self._count()} frames, not {index.info.frame_count}")

    def __enter__(self) -> "LibraryDecoder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def groups(self) -> Iterator[DecodedGroup]:
        """The groups, in order.

        Raises:
            DecodeError: the library fails, or gives frames of other times or of another size.
        """
        for first, last in zip(self._bounds[:-1].tolist(), self._bounds[1:].tolist(), strict=True):
            begin = time.perf_counter()
            frames = torch.empty((last - first, 3, *self._size), dtype=torch.uint8)
            for at in range(first, last, FRAMES_AT_ONCE):
                ranks = self._ranks[at : min(at + FRAMES_AT_ONCE, last)]
                frames[at - first : at - first + len(ranks)] = self._read(ranks)
            intact = torch.zeros(last - first, dtype=torch.bool)
            yield DecodedGroup(frames, first, intact, time.perf_counter() - begin)

    @classmethod
    @abstractmethod
    def load(cls) -> Any:
        """Import the library.

        Raises:
            MissingExtraError: it is not installed, or does not load.
        """

    @abstractmethod
    def _open(self, path: str, threads: int) -> None:
        """Open the file."""

    @abstractmethod
    def _close(self) -> None:
        """Free what the library holds."""

    @abstractmethod
    def _count(self) -> int:
        """The number of frames that the library sees in the file."""

    @abstractmethod
    def _fetch(self, ranks: list[int]) -> tuple[Tensor, NDArray[np.float64]]:
        """Frames uint8 `[F, 3, H, W]` of the source's size, and their times `[F]` in seconds."""

    def _why_not(self) -> str | None:
        """Why this file's frames cannot be trusted to come out right; None if they can."""
        index, info = self._index, self._index.info
        if not ("mp4" in info.container or "matroska" in info.container):
            return "only MP4 and Matroska files are known to come out right"
        if info.codec not in self.codecs:
            return f"{info.codec} is not known to come out right"
        if not index.seekable or index.error or len(index.order) < len(index.pts):
            return "the file is damaged, edited, or has times that do not tell frames apart"
        if not index.keyframe[0] or has_open_gops(index):
            return "frames shown before their keyframe are not known to come out right"
        if sum(one.kind == "video" for one in info.streams) > 1:
            return "of several video streams it might take another"
        if index.deinterlaces:
            return "its frames are interlaced, and would stay so"
        if info.hdr and index.source.rendering.tone_map:
            return "its high dynamic range would not be tone-mapped"
        if info.mirrored:
            return "its frames are stored mirrored, which it does not mend"
        return None

    def _read(self, ranks: Ints) -> Tensor:
        info = self._index.info
        try:
            frames, seconds = self._fetch(ranks.tolist())
        except Exception as failure:
            self._refuse(first_line(failure), failure)
        upright = info.stored_height, info.stored_width
        upright = upright[::-1] if info.rotation in (90, 270) else upright
        if tuple(frames.shape) != (len(ranks), 3, *upright):
            self._refuse(f"it gives frames {list(frames.shape)}")
        error = np.abs(seconds - info.start_seconds - self._index.seconds[ranks])
        if not error.max() <= TIME_SLACK_SECONDS:
            self._refuse(f"it gives frame {ranks[error.argmax()]} at another time")
        return _scaled(frames, self._size)

    def _refuse(self, reason: str, cause: BaseException | None = None) -> None:
        path = self._index.info.path
        raise DecodeError(
            f'{self.name} cannot be used for {path!r}: {reason}; use backend="pyav"'
        ) from cause


class DecordDecoder(LibraryDecoder):
    """Decodes with decord."""

    name = "decord"
    codecs = frozenset({"h264", "hevc", "mpeg4", "vp9"})

    @classmethod
    def load(cls) -> Any:
        return _loaded("decord", lambda: __import__("decord"))

    def _open(self, path: str, threads: int) -> None:
        self._reader = self.load().VideoReader(path, num_threads=threads)

    def _close(self) -> None:
        del self._reader

    def _count(self) -> int:
        return len(self._reader)

    def _fetch(self, ranks: list[int]) -> tuple[Tensor, NDArray[np.float64]]:
        frames = torch.from_numpy(self._reader.get_batch(ranks).asnumpy())
        seconds = np.asarray(self._reader.get_frame_timestamp(ranks), np.float64)[:, 0]
        return frames.permute(0, 3, 1, 2), seconds


class TorchcodecDecoder(LibraryDecoder):
    """Decodes with torchcodec, which scans the file first (`seek_mode="exact"`)."""

    name = "torchcodec"
    codecs = frozenset({"av1", "h264", "hevc", "mpeg4", "vp8", "vp9"})

    @classmethod
    def load(cls) -> Any:
        return _loaded("torchcodec", lambda: __import__("torchcodec.decoders").decoders)

    def _open(self, path: str, threads: int) -> None:
        self._reader = self.load().VideoDecoder(path, num_ffmpeg_threads=threads)

    def _close(self) -> None:
        del self._reader

    def _count(self) -> int:
        return len(self._reader)

    def _fetch(self, ranks: list[int]) -> tuple[Tensor, NDArray[np.float64]]:
        batch = self._reader.get_frames_at(ranks)
        return batch.data, batch.pts_seconds.numpy()


LIBRARIES: dict[str, type[LibraryDecoder]] = {
    decoder.name: decoder for decoder in (DecordDecoder, TorchcodecDecoder)
}


def _loaded(extra: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever a broken library raises when it is loaded
        raise MissingExtraError(
            f'backend="{extra}" needs {extra}: pip install "tokenprune-mm[{extra}]"'
            f" ({first_line(error)})"
        ) from error


def _scaled(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale as our own decoder does: bilinear, antialiased."""
    if frames.shape[2:] == size:
        return frames
    from torchvision.transforms.v2.functional import resize

    scaled: Tensor = resize(frames, list(size), antialias=True)
    return scaled
