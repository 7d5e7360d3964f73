"""Reading video and audio: exact frames, decoded in parallel, and little else decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune._lazy import lazy_names

if TYPE_CHECKING:
    from tokenprune.media.given import FrameList
    from tokenprune.media.index.index import PacketIndex, VideoInfo
    from tokenprune.media.index.source import Rendering
    from tokenprune.media.index.streams import StreamInfo
    from tokenprune.media.limits import Limits, use_limits
    from tokenprune.media.message import read_message
    from tokenprune.media.opening import index_video, probe
    from tokenprune.media.read import read_video, stream_video
    from tokenprune.media.reader import VideoReader
    from tokenprune.media.sampling import SizeRule
    from tokenprune.media.size import PixelLimits, ShortestEdge, VolumeLimits
    from tokenprune.media.sound.audio import read_audio
    from tokenprune.media.sound.features import log_mel, resample
    from tokenprune.media.stills import read_picture
    from tokenprune.media.transformers import register_with_transformers
    from tokenprune.media.video import Clip, Timings, Video

__all__ = [
    "Clip",
    "FrameList",
    "Limits",
    "PacketIndex",
    "PixelLimits",
    "Rendering",
    "ShortestEdge",
    "SizeRule",
    "StreamInfo",
    "Timings",
    "Video",
    "VideoInfo",
    "VideoReader",
    "VolumeLimits",
    "index_video",
    "log_mel",
    "probe",
    "read_audio",
    "read_message",
    "read_picture",
    "read_video",
    "register_with_transformers",
    "resample",
    "stream_video",
    "use_limits",
]

_MODULES = {
    "Clip": "video",
    "FrameList": "given",
    "Limits": "limits",
    "PacketIndex": "index.index",
    "PixelLimits": "size",
    "Rendering": "index.source",
    "ShortestEdge": "size",
    "SizeRule": "sampling",
    "StreamInfo": "index.streams",
    "Timings": "video",
    "Video": "video",
    "VideoInfo": "index.index",
    "VideoReader": "reader",
    "VolumeLimits": "size",
    "index_video": "opening",
    "log_mel": "sound.features",
    "probe": "opening",
    "read_audio": "sound.audio",
    "read_message": "message",
    "read_picture": "stills",
    "read_video": "read",
    "register_with_transformers": "transformers",
    "resample": "sound.features",
    "stream_video": "read",
    "use_limits": "limits",
}
"""Where each name comes from when it is first used: checks of arguments need no torch, no PyAV."""

if not TYPE_CHECKING:  # type checkers shall know the names above, and no others
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
