"""Ways to read frames of a video, behind one call, for the decoder's bench.

A reader gets a path, presentation ranks in increasing order, and a size `(height, width)`; it gives
frames uint8 `[F, 3, H, W]` or `[F, H, W, 3]`. What it needs is imported by `load`, which is called
before any time is taken. Foreign libraries are told to scale while they decode if they can.
"""

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenprune.eval.bench.footage import read_number

Size = tuple[int, int]
Read = Callable[[str, Sequence[int], Size], Any]


@dataclass(frozen=True)
class Reader:
    """A way to read frames.

    Attributes:
        modules: what to import first.
        read: gives the frames; or, for a stream, their numbers `[F]`.
        held: frames that the caller holds at a time; None for all of them.
    """

    modules: tuple[str, ...]
    read: Read
    held: int | None = None

    def load(self) -> None:
        """Import what it needs.

        Raises:
            Exception: whatever a library raises that is missing or broken.
        """
        for name in self.modules:
            importlib.import_module(name)


def _ours(
    path: str,
    ranks: Sequence[int],
    size: Size,
    *,
    workers: int | None = None,
    worker_kind: Literal["thread", "process"] = "thread",
) -> Any:
    from tokenprune.media import read_video

    return read_video(
        path, indices=ranks, size=size, workers=workers, worker_kind=worker_kind
    ).frames


def _beside_python(path: str, ranks: Sequence[int], size: Size, *, read: Read) -> Any:
    """Read while this thread runs nothing but Python, as one that tokenises texts might."""
    with ThreadPoolExecutor(1) as pool:
        frames = pool.submit(read, path, ranks, size)
        count = 0
        while not frames.done():
            count += 1
        return frames.result()


GROUP = 16


def _stream(path: str, ranks: Sequence[int], size: Size) -> Any:
    """Reads group after group, and keeps none."""
    from tokenprune.media import stream_video

    numbers: list[int] = []
    for group in stream_video(path, indices=ranks, size=size, group=GROUP):
        numbers += [read_number(frame) for frame in group.frames.numpy()]
    return np.array(numbers)


def _pyav(path: str, ranks: Sequence[int], size: Size, *, threads: str) -> Any:
    """Decode every picture up to the last wanted one; scale those that are wanted."""
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    frames = np.empty((len(ranks), *size, 3), np.uint8)
    scale: Any = VideoReformatter()
    with av.open(path) as container:
        stream: Any = container.streams.video[0]
        stream.thread_type = threads
        at = 0
        for rank, picture in enumerate(container.decode(stream)):
            if rank == ranks[at]:
                small = scale.reformat(
                    picture,
                    width=size[1],
                    height=size[0],
                    format="rgb24",
                    interpolation=Interpolation.BILINEAR,
                    threads=1,
                )
                frames[at] = small.to_ndarray()
                at += 1
                if at == len(ranks):
                    break
    return frames


def _decord(path: str, ranks: Sequence[int], size: Size, *, threads: int) -> Any:
    decord: Any = importlib.import_module("decord")
    decord.bridge.set_bridge("torch")  # its own array would be a copy
    reader = decord.VideoReader(path, height=size[0], width=size[1], num_threads=threads)
    return reader.get_batch(list(ranks))


def _torchcodec(path: str, ranks: Sequence[int], size: Size, *, mode: str) -> Any:
    decoders: Any = importlib.import_module("torchcodec.decoders")
    transforms: Any = importlib.import_module("torchcodec.transforms")
    reader = decoders.VideoDecoder(
        path, seek_mode=mode, num_ffmpeg_threads=0, transforms=[transforms.Resize(size)]
    )
    return reader.get_frames_at(list(ranks)).data


def _two_torchcodecs(path: str, ranks: Sequence[int], size: Size) -> Any:
    """Half of the frames each, as a caller might do it who knows that one decoder is not enough."""
    import torch

    decoders: Any = importlib.import_module("torchcodec.decoders")
    transforms: Any = importlib.import_module("torchcodec.transforms")
    frames = torch.empty((len(ranks), 3, *size), dtype=torch.uint8)

    def read(first: int, last: int) -> None:
        reader = decoders.VideoDecoder(
            path,
            seek_mode="approximate",
            num_ffmpeg_threads=1,
            transforms=[transforms.Resize(size)],
        )
        frames[first:last] = reader.get_frames_at(list(ranks[first:last])).data

    middle = len(ranks) // 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, (0, middle), (middle, len(ranks))))
    return frames


def _opencv(path: str, ranks: Sequence[int], size: Size, *, seek: bool) -> Any:
    cv2: Any = importlib.import_module("cv2")
    frames = np.empty((len(ranks), *size, 3), np.uint8)
    capture = cv2.VideoCapture(path)
    at = 0
    for place, rank in enumerate(ranks):
        if seek:
            capture.set(cv2.CAP_PROP_POS_FRAMES, rank)
        else:
            while at < rank:
                capture.grab()
                at += 1
        good, picture = capture.read()
        at += 1
        if good:
            small = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)
            cv2.cvtColor(small, cv2.COLOR_BGR2RGB, dst=frames[place])
    capture.release()
    return frames


def _transformers(path: str, ranks: Sequence[int], size: Size, *, backend: str) -> Any:
    """Its loader gives full frames; a processor scales them."""
    import torch
    from torchvision.transforms.v2.functional import resize
    from transformers.video_utils import load_video

    wanted = np.asarray(ranks)
    frames, _ = load_video(path, backend=backend, sample_indices_fn=lambda metadata, **_: wanted)
    whole = torch.as_tensor(frames)
    whole = whole.permute(0, 3, 1, 2) if whole.shape[-1] == 3 else whole
    scaled = torch.empty((len(ranks), 3, *size), dtype=torch.uint8)
    for at in range(0, len(ranks), 16):
        scaled[at : at + 16] = resize(whole[at : at + 16], list(size), antialias=True)
    return scaled


OURS, STREAM = "tokenprune", "tokenprune streamed"
BUSY_THREADS = "tokenprune threads beside a busy interpreter"
BUSY_PROCESSES = "tokenprune processes beside a busy interpreter"
_MEDIA = ("tokenprune.media.read", "av", "torch")
_TRANSFORMERS = ("transformers.video_utils", "torchvision.transforms.v2.functional", "av", "torch")

READERS: dict[str, Reader] = {
    OURS: Reader(_MEDIA, _ours),
    "tokenprune 1 worker": Reader(_MEDIA, partial(_ours, workers=1)),
    STREAM: Reader(_MEDIA, _stream, held=2 * GROUP),
    BUSY_THREADS: Reader(_MEDIA, partial(_beside_python, read=_ours)),
    BUSY_PROCESSES: Reader(
        _MEDIA, partial(_beside_python, read=partial(_ours, worker_kind="process"))
    ),
    "PyAV 1 thread": Reader(("av",), partial(_pyav, threads="NONE")),
    "PyAV AUTO": Reader(("av",), partial(_pyav, threads="AUTO")),
    "decord 0 threads": Reader(("decord", "torch"), partial(_decord, threads=0)),
    "decord 1 thread": Reader(("decord", "torch"), partial(_decord, threads=1)),
    "decord 2 threads": Reader(("decord", "torch"), partial(_decord, threads=2)),
    "torchcodec exact": Reader(
        ("torchcodec.decoders", "torchcodec.transforms"), partial(_torchcodec, mode="exact")
    ),
    "torchcodec approximate": Reader(
        ("torchcodec.decoders", "torchcodec.transforms"), partial(_torchcodec, mode="approximate")
    ),
    "torchcodec 2 decoders": Reader(
        ("torchcodec.decoders", "torchcodec.transforms"), _two_torchcodecs
    ),
    "OpenCV": Reader(("cv2",), partial(_opencv, seek=False)),
    "OpenCV seek": Reader(("cv2",), partial(_opencv, seek=True)),
    "transformers pyav": Reader(_TRANSFORMERS, partial(_transformers, backend="pyav")),
    "transformers torchcodec": Reader(
        (*_TRANSFORMERS, "torchcodec.decoders"), partial(_transformers, backend="torchcodec")
    ),
}


def numbers_on(frames: Any) -> NDArray[np.int64]:
    """The numbers `[F]` on frames of either layout; of a stream they are given already."""
    array = np.asarray(frames)
    if array.ndim == 1:
        return array.astype(np.int64)
    if array.shape[-1] == 3:
        array = array.transpose(0, 3, 1, 2)
    return np.array([read_number(frame) for frame in array], np.int64)
