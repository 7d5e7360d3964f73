"""The streams of a file, and which of them is taken where none is asked for."""

from dataclasses import dataclass
from typing import Any, Literal

from tokenprune.errors import DecodeError, MediaError, NoVideoStreamError

__all__ = ["StreamInfo", "audio_stream", "list_streams", "video_stream"]


@dataclass(frozen=True)
class StreamInfo:
    """A video or audio stream of a file.

    Attributes:
        kind: "video", "audio", or "cover", an attached picture.
        number: among the file's streams of video, covers included, or of audio.
        codec: name of its decoder; None if there is none.
        default: whether the file marks it as the one to play.
        language: as the file tells it, mostly in three letters; None if it does not.
        title: as the file tells it; None if it does not.
        width: of a video's frame as coded; 0 for audio.
        height: of a video's frame as coded; 0 for audio.
        channels: of audio; 0 for a video.
        sampling_rate: of audio, per second; 0 for a video.
    """

    kind: Literal["video", "audio", "cover"]
    number: int
    codec: str | None
    default: bool
    language: str | None
    title: str | None
    width: int = 0
    height: int = 0
    channels: int = 0
    sampling_rate: int = 0

    def __str__(self) -> str:
        what = [f"{self.kind} {self.number}", self.codec or "no decoder"]
        if self.kind == "audio":
            what.append(f"{self.channels} channels")
        else:
            what.append(f"{self.height}x{self.width}")
        named = [name for name in (self.language, self.title) if name]
        return " ".join([*what, *named, *(["(default)"] if self.default else [])])


def list_streams(container: Any) -> tuple[StreamInfo, ...]:
    """The video and audio streams of an open file."""
    videos, tracks = container.streams.video, container.streams.audio
    return tuple(
        _describe(stream, number)
        for streams in (videos, tracks)
        for number, stream in enumerate(streams)
    )


def video_stream(container: Any, number: int | None = None) -> Any:
    """The video stream of that number, or the one that players take.

    Attached covers are never taken. Of the streams that can be decoded, those that the file marks
    as default come first; among them the largest, and then the first.

    Raises:
        NoVideoStreamError: there is none.
        MediaError: there is no such stream, or it is a cover.
        DecodeError: FFmpeg has no decoder for it.
    """
    name, videos = container.name, container.streams.video
    frames = [one for one in videos if not _is_cover(one)]
    if not frames:
        what = "only a cover picture" if videos else "none"
        what = "only sound" if not videos and container.streams.audio else what
        raise NoVideoStreamError(f"{name!r} has no video stream ({what}); give a video file")
    if number is None:
        decoded = [one for one in frames if one.codec_context is not None]
        stream = max(decoded, key=_video_rank, default=frames[0])
    else:
        stream = _numbered(container, videos, number, "stream")
        if _is_cover(stream):
            raise MediaError(f"stream {number} of {name!r} is a cover picture; choose another")
    if stream.codec_context is None:
        raise DecodeError(f"{name!r}: no decoder for its video stream; convert it, to H.264 say")
    # Else a frame whose hash SEI does not fit is concealed and not reported.
    if stream.codec_context.name == "hevc":
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    return stream


def audio_stream(container: Any, number: int | None = None, language: str | None = None) -> Any:
    """The audio track of that number or language, or the one that players take.

    Of the tracks that can be decoded (and are of that language), those that the file marks as
    default come first; among them the one of most channels, and then the first.

    Raises:
        MediaError: there is no such track.
        DecodeError: FFmpeg has no decoder for it.
    """
    name, tracks = container.name, list(container.streams.audio)
    if not tracks:
        raise MediaError(f"{name!r} has no sound track; give a file with sound")
    if number is not None:
        stream = _numbered(container, tracks, number, "track")
    else:
        fitting = [one for one in tracks if language is None or _speaks(one, language)]
        if not fitting:
            known = ", ".join(sorted({one.language or "unknown" for one in tracks}))
            raise MediaError(f"language must be one of those of {name!r} ({known}), got {language}")
        decoded = [one for one in fitting if one.codec_context is not None]
        stream = max(decoded, key=_audio_rank, default=fitting[0])
    if stream.codec_context is None:
        raise DecodeError(f"{name!r}: no decoder for its sound track {tracks.index(stream)}")
    return stream


def _numbered(container: Any, streams: Any, number: int, what: str) -> Any:
    if not 0 <= number < len(streams):
        raise MediaError(
            f"{what} must be from 0 to {len(streams) - 1} in {container.name!r}, got {number}"
        )
    return streams[number]


def _is_cover(stream: Any) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails))


def _is_default(stream: Any) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.default)


def _video_rank(stream: Any) -> tuple[bool, int]:
    context = stream.codec_context
    return _is_default(stream), context.width * context.height


def _audio_rank(stream: Any) -> tuple[bool, int]:
    return _is_default(stream), stream.codec_context.channels


def _speaks(stream: Any, language: str) -> bool:
    return (stream.language or "").lower() == language.lower()


def _describe(stream: Any, number: int) -> StreamInfo:
    context = stream.codec_context
    is_audio = stream.type == "audio"
    sized = context is not None and not is_audio
    heard = context is not None and is_audio
    return StreamInfo(
        kind="audio" if is_audio else "cover" if _is_cover(stream) else "video",
        number=number,
        codec=None if context is None else context.name,
        default=_is_default(stream),
        language=_told(stream.language),
        title=_told(stream.metadata.get("title")),
        width=context.width if sized else 0,
        height=context.height if sized else 0,
        channels=context.channels if heard else 0,
        sampling_rate=context.sample_rate if heard else 0,
    )


def _told(text: str | None) -> str | None:
    return None if text in (None, "", "und") else text
