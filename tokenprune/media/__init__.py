"""Reading video and sound: exact frames, decoded in parallel, only where they are wanted."""

from tokenprune.media.audio import read_audio
from tokenprune.media.features import log_mel, resample
from tokenprune.media.index import PacketIndex, VideoInfo, index_video, probe
from tokenprune.media.loader import register_with_transformers
from tokenprune.media.message import read_message
from tokenprune.media.reader import VideoReader, read_video, stream_video
from tokenprune.media.sample import SizeRule
from tokenprune.media.size import PixelLimits, ShortestEdge, VolumeLimits
from tokenprune.media.video import Timings, Video

__all__ = [
    "PacketIndex",
    "PixelLimits",
    "ShortestEdge",
    "SizeRule",
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
    "read_video",
    "register_with_transformers",
    "resample",
    "stream_video",
]
