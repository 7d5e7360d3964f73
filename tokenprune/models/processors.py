"""What processors take: frames of their size, whole temporal patches, audio of their length."""

from __future__ import annotations

import base64
import inspect
import io
import wave
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.layout import MODALITIES
from tokenprune.errors import MediaError, first_line
from tokenprune.media import SizeRule

__all__ = [
    "SAMPLING_RATE",
    "audio_from_video",
    "call_processor",
    "crop",
    "frame_size",
    "pad_audio",
    "placeholder_tokens",
    "split_audio",
    "takes_audio",
    "takes_video",
    "wave_file",
    "whole_patches",
]

SAMPLING_RATE = 16000
SHORTEST_AUDIO = SAMPLING_RATE // 10


def call_processor(processor: Any, **inputs: Any) -> Any:
    """Call a processor for tensors.

    Raises:
        MediaError: It refuses the media.
    """
    inputs["return_tensors"] = "pt"
    takes = inspect.signature(processor.__call__).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
        # Older ones know nothing of a clip's metadata.
        inputs = {name: value for name, value in inputs.items() if name in takes}
    try:
        return processor(**inputs)
    except ValueError as error:
        raise MediaError(
            f"the model's processor refuses the file: {first_line(error)}; give another file, or "
            "choose another --model"
        ) from error


def placeholder_tokens(processor: Any) -> dict[str, str]:
    """The placeholder of each modality, as it stands in a prompt."""
    tokens = {name: getattr(processor, f"{name}_token", None) for name in MODALITIES}
    return {name: str(token) for name, token in tokens.items() if token}


# -- videos and images


def takes_video(processor: Any) -> bool:
    """Whether it takes videos; if not, their frames are given as images."""
    return bool(getattr(processor, "video_processor", None))


def frame_size(processor: Any) -> SizeRule | None:
    """The size to which a processor resizes frames, so that the decoder does it at once.

    The processor itself is asked, with frames that have a shape but no data: the rules differ
    between families, and between versions of transformers.

    Returns:
        A rule for `read_video`; None to decode at full size, if the processor takes images only.
    """
    pictures = getattr(processor, "video_processor", None)
    if pictures is None:
        return None

    def rule(height: int, width: int, frames: int) -> tuple[int, int]:
        blank = torch.empty(frames, 3, height, width, dtype=torch.uint8, device="meta")
        made = _process_blank(processor, whole_patches(processor, blank))
        if "video_grid_thw" in made:
            _, rows, columns = made["video_grid_thw"][0].tolist()
            return rows * pictures.patch_size, columns * pictures.patch_size
        pixels = made["pixel_values_videos" if "pixel_values_videos" in made else "pixel_values"]
        return int(pixels.shape[-2]), int(pixels.shape[-1])

    return rule


def _process_blank(processor: Any, frames: Tensor) -> Any:
    """What a processor makes of frames without data."""
    from transformers.video_utils import VideoMetadata  # heavy

    metadata = VideoMetadata(
        total_num_frames=len(frames), fps=1.0, frames_indices=list(range(len(frames)))
    )
    arguments = {"videos": [[frames]], "video_metadata": [metadata], "do_sample_frames": False}
    if getattr(processor.video_processor, "do_center_crop", None):
        # What is cropped away must be decoded, or the crop would find the picture too small.
        arguments["do_center_crop"] = False
    if getattr(processor.video_processor, "use_token_compression", None):
        # Which tokens are left out depends on pixels; the size of frames does not.
        arguments["use_token_compression"] = False
    try:
        return call_processor(processor, text=[processor.video_token], **arguments)
    except (RuntimeError, TypeError):  # some read pixels to count the placeholders
        return call_processor(processor.video_processor, **arguments)


def whole_patches(processor: Any, frames: Tensor) -> Tensor:
    """Repeat the last frame until frames fill temporal patches, as processors do themselves.

    Some do it only after they have computed a size from the number of frames, or refuse to
    compute one for a single frame.

    Args:
        processor: One that takes videos.
        frames: `[F, 3, H, W]`.
    """
    missing = -len(frames) % (getattr(processor.video_processor, "temporal_patch_size", None) or 1)
    return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames


def crop(frames: Tensor, pictures: Any) -> Tensor:
    """Crop frames of full size to what is left of them after a processor's center crop.

    Args:
        frames: `[F, 3, H, W]`.
        pictures: An image processor, a video processor, or None.
    """
    size, cropped = getattr(pictures, "size", None), getattr(pictures, "crop_size", None)
    # A tiling processor shows the model all of an image, squeezed into a square.
    if not getattr(pictures, "do_center_crop", None) or hasattr(pictures, "image_grid_pinpoints"):
        return frames
    edge = size.get("shortest_edge") if size else None
    if not edge or not cropped:
        return frames
    height, width = frames.shape[-2:]
    scale = min(height, width) / edge
    rows = min(height, round(cropped["height"] * scale))
    columns = min(width, round(cropped["width"] * scale))
    top, left = (height - rows) // 2, (width - columns) // 2
    return frames[..., top : top + rows, left : left + columns]


# -- audio


def takes_audio(processor: Any) -> bool:
    """Whether audio may be given beside a text that has its placeholders."""
    return "audio" in inspect.signature(type(processor).__call__).parameters


def audio_from_video() -> dict[str, Any]:
    """The arguments that tell a processor that the audio is the sound track of the video."""
    from transformers import processing_utils  # heavy

    if hasattr(processing_utils, "OmniModalProcessorMixin"):
        return {"audio_from_video_indices": [0], "load_audio_from_video": True}
    return {"use_audio_in_video": True}  # in older releases of transformers


def pad_audio(audio: Tensor) -> Tensor:
    """Pad audio `[T]` with silence if it is too short for a single token."""
    return torch.nn.functional.pad(audio, (0, max(0, SHORTEST_AUDIO - len(audio))))


def split_audio(processor: Any, audio: Tensor, *, name: str) -> list[Tensor]:
    """Split audio `[T]` into the longest parts that the processor takes without truncation.

    Args:
        processor: Of the model.
        audio: At `SAMPLING_RATE`.
        name: Of the model, for the error.

    Raises:
        MediaError: It is too long for a processor that takes one audio a prompt.
    """
    seconds = getattr(processor, "max_audio_len", None)
    if seconds is not None and len(audio) > seconds * SAMPLING_RATE:
        raise MediaError(
            f"the sound lasts {len(audio) / SAMPLING_RATE:.0f} seconds, and {name} takes at most "
            f"{seconds}; give a shorter file, or choose another --model"
        )
    *whole, last = torch.split(audio, _longest_audio(processor) or len(audio))
    return [*whole, pad_audio(last)]


def _longest_audio(processor: Any) -> int | None:
    """Samples beyond which the processor truncates; None if it does not."""
    settings = getattr(processor, "audio_kwargs", None)  # of its class
    if settings is None:  # where older releases of transformers have them
        kinds = getattr(processor, "valid_processor_kwargs", None)
        settings = getattr(kinds, "_defaults", {}).get("audio_kwargs", {})
    if hasattr(processor, "max_audio_len") or not settings.get("truncation", True):
        return None
    extractor = getattr(processor, "feature_extractor", None)
    return getattr(extractor, "n_samples", None)


def wave_file(audio: Tensor) -> str:
    """Audio `[T]` as a WAV file of 16 bits a sample, in base64."""
    samples = (audio.clamp(-1, 1) * 32767).round().to(torch.int16)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(samples.numpy().astype("<i2").tobytes())
    return base64.b64encode(buffer.getvalue()).decode()
