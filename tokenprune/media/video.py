"""`Clip`: frames with their times; `Video`: those of a file, and what is known of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.errors import MediaError
from tokenprune.media.decode.effort import WorkSpan
from tokenprune.media.index.index import VideoInfo

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

__all__ = ["Clip", "Timings", "Video"]


@dataclass(frozen=True)
class Timings:
    """How long indexing and decoding took.

    Attributes:
        index_seconds: building the packet index.
        decode_seconds: decoding and resizing; in a stream, the time waited for the group.
        effort: when workers decoded and resized it: `time.perf_counter` where each span of work
            began and ended. Those of several workers overlap. Empty with another backend.
    """

    index_seconds: float
    decode_seconds: float
    effort: tuple[WorkSpan, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Clip(ABC):
    """Frames of one source, with their times and indices in it; they need not come from a file.

    Attributes:
        frames: uint8 RGB `[F, 3, H, W]`, upright.
        pts_seconds: float64 `[F]` PTS of each, counted from the source's first frame.
        indices: int64 `[F]` presentation rank of each: 0 is the first frame of the source.
    """

    frames: Tensor
    pts_seconds: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        if self.frames.dim() != 4 or self.frames.shape[1] != 3:
            raise MediaError(f"frames must be [F, 3, H, W], got {list(self.frames.shape)}")
        for name in ("pts_seconds", "indices"):
            self._check_one_each(name)

    def _check_one_each(self, name: str) -> None:
        shape = list(getattr(self, name).shape)
        if shape != [len(self.frames)]:
            raise MediaError(f"{name} must be [{len(self.frames)}], got {shape}")

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(frames={list(self.frames.shape)})"

    @property
    @abstractmethod
    def source_fps(self) -> float:
        """Frames per second of the source, those included that are not among `frames`."""

    @property
    def clock_fps(self) -> float:
        """The rate by which `even_indices` count."""
        return self.source_fps

    @property
    def even_indices(self) -> Tensor:
        """`[F]` the time of each, counted at the clock's rate: the ranks, if frames come evenly."""
        return (self.pts_seconds * self.clock_fps).round().long()

    @property
    def metadata(self) -> "VideoMetadata":
        """The metadata for transformers' processors; use it with `do_sample_frames=False`.

        Processors take a frame's time to be its index by the rate; so `frames_indices` are
        `even_indices`, and `fps` is the rate of the clock. The sampled rate, which is all that some
        take, is the average.
        """
        from transformers.video_utils import VideoMetadata

        indices = self.even_indices.tolist()
        count = 1 + max(indices)
        return VideoMetadata(
            total_num_frames=count,
            fps=self.clock_fps,
            width=self.frames.shape[3],
            height=self.frames.shape[2],
            duration=count / self.clock_fps,
            video_backend="tokenprune",
            frames_indices=indices,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Video(Clip):
    """Frames of a video file, or one group of them.

    Attributes:
        info: the whole video.
        substituted: bool `[F]`, True where a damaged frame is replaced by the nearest earlier one
            that is intact; or, if there is none, by the next, or else by what could be decoded. In
            files without PTS (raw streams, H.264 in AVI) all that come after the first damage are
            marked, and given as they come, since none is identified by its time.
        pictures_decoded: frames that came out of the decoders so far, those not asked for included;
            in a stream also some of the groups to come. 0 from other backends: they do not report
            it.
        timings: how long it took.
        bytes_read: bytes of the video's packets that were read so far.
    """

    info: VideoInfo
    substituted: Tensor
    pictures_decoded: int
    timings: Timings
    bytes_read: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_one_each("substituted")

    def __repr__(self) -> str:
        return (
            f"Video({self.info.path!r}, frames={list(self.frames.shape)},"
            f" damaged={self.damaged}, pictures_decoded={self.pictures_decoded})"
        )

    @property
    def damaged(self) -> int:
        """How many frames are substitutes."""
        return int(self.substituted.sum())

    @property
    def source_fps(self) -> float:
        """Frames per second of the file, on average."""
        return self.info.average_fps

    @property
    def clock_fps(self) -> float:
        """The rate by which times of the file's frames are whole numbers, see `VideoInfo`."""
        return self.info.clock[0]

    @property
    def pace(self) -> tuple[float, float]:
        """Seconds from frame to frame as one rate tells them, and by how much it is off at most.

        Of frames that are spread evenly it is off by no more than one such step, since the last one
        counts as if it were followed by another.
        """
        rate, length = self.info.clock
        step = length / rate / len(self)
        told = self.pts_seconds[0] + step * torch.arange(len(self), dtype=torch.float64)
        return step, float((self.pts_seconds - told).abs().max())

    @property
    def metadata(self) -> "VideoMetadata":
        """As of any clip; the number of frames and the duration are those of the file."""
        metadata = super().metadata
        # By an average rate the last frame can seem to lie behind the end.
        metadata.total_num_frames = max(self.info.clock[1], metadata.total_num_frames)
        metadata.duration = self.info.duration_seconds
        return metadata
