"""Reading video and sound: exact frames, decoded in parallel, only where they are wanted."""

from tokenprune.media.index.index import PacketIndex, VideoInfo, index_video, probe
from tokenprune.media.message import read_message
from tokenprune.media.reader import VideoReader, read_video, stream_video
from tokenprune.media.sampling import SizeRule
from tokenprune.media.size import PixelLimits, ShortestEdge, VolumeLimits
from tokenprune.media.sound.audio import read_audio
from tokenprune.media.sound.features import log_mel, resample
from tokenprune.media.transformers import register_with_transformers
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
