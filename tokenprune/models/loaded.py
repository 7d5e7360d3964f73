"""`LoadedModel`: a model with its processor, which turns media and a question into inputs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from tokenprune.adapters.base import Adapter, adapter_for
from tokenprune.errors import MediaError
from tokenprune.media import Clip, Video
from tokenprune.models.media import Media
from tokenprune.models.processors import (
    SAMPLING_RATE,
    audio_from_video,
    call_processor,
    crop,
    pad_audio,
    placeholder_tokens,
    split_audio,
    takes_audio,
    takes_video,
    wave_file,
    whole_patches,
)
from tokenprune.models.prompts import check_question, write_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoadedModel"]

EVEN_STEPS = 1.5  # from frame to frame: how far off one rate may be


@dataclass(frozen=True)
class LoadedModel:
    """A model, its processor, and the name it was loaded by."""

    model: PreTrainedModel
    processor: Any
    name: str

    @property
    def adapter(self) -> Adapter:
        """The adapter of the model's family."""
        return adapter_for(self.model)

    @property
    def takes_video(self) -> bool:
        """Whether the processor takes videos; if not, frames are given as images."""
        return takes_video(self.processor)

    # -- inputs

    def encode(self, media: Media, question: str) -> dict[str, Any]:
        """Make model inputs for a question about some media, batch 1, on the model's device.

        Raises:
            TokenPruneError: The question is empty or holds a placeholder, or the processor has no
                chat template.
        """
        return {
            name: self.place(value) if isinstance(value, Tensor) else value
            for name, value in self.process(media, question).items()
        }

    def place(self, value: Tensor) -> Tensor:
        """Copy to the model's device and dtype; the CPU does not wait for the copy to end."""
        device = self.model.device
        if device.type == "meta":  # a model without weights: its inputs are counted only
            return value
        if device.type == "cuda" and value.device.type == "cpu":
            # The allocator keeps pinned memory until the copy is done.
            value = value.pin_memory().to(device, non_blocking=True)
        dtype = self.model.dtype if value.is_floating_point() else value.dtype
        return value.to(device, dtype)

    def process(self, media: Media, question: str) -> dict[str, Any]:
        """Call the processor with a question about some media, on the device of the media.

        Raises:
            TokenPruneError: As `encode`.
        """
        check_question(question, placeholder_tokens(self.processor))
        if media.audio is not None and not takes_audio(self.processor):
            return self._process_chat(media.audio, question)
        arguments, parts = self._media_arguments(media)
        text = self.prompt(parts, question)
        inputs = dict(call_processor(self.processor, text=[text], **arguments))
        # The processor puts audio between frames, and the model needs to know that it did.
        return inputs | ({"use_audio_in_video": True} if self._interleaves(media) else {})

    def prompt(self, parts: list[dict[str, str]], question: str) -> str:
        """Write a question by the chat template, with a placeholder for each part.

        Args:
            parts: Such as `{"type": "image"}`, in order.
            question: In words.

        Raises:
            UnsupportedModelError: The checkpoint has no chat template.
        """
        return write_prompt(self.processor, parts, question, name=self.name)

    def _process_chat(self, audio: Tensor, question: str) -> dict[str, Any]:
        """Inputs by a processor that takes audio only as a file within the chat."""
        self._check_modality("audio")
        content = [
            {"type": "audio", "base64": wave_file(pad_audio(audio))},
            {"type": "text", "text": question},
        ]
        return dict(self.processor.apply_chat_template([{"role": "user", "content": content}]))

    def _media_arguments(self, media: Media) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """What the processor is called with, and the chat's parts."""
        if media.audio is None:
            return self._frame_arguments(media)
        self._check_modality("audio")
        arguments, parts = self._frame_arguments(media) if len(media.frames) else ({}, [])
        arguments["sampling_rate"] = SAMPLING_RATE
        if self._interleaves(media):
            arguments |= {
                "audio": [pad_audio(media.audio).numpy()],
                "truncation": False,  # or the track would end with the processor's longest audio
            }
            return arguments | audio_from_video(), parts
        audio = [one.numpy() for one in split_audio(self.processor, media.audio, name=self.name)]
        return arguments | {"audio": audio}, [*parts, *[{"type": "audio"}] * len(audio)]

    def _frame_arguments(self, media: Media) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """The same for the frames alone."""
        if media.video is not None and self.takes_video:
            self._check_pace(media.video)
            metadata = media.video.metadata
            arguments = {
                "videos": [[whole_patches(self.processor, media.frames)]],  # a list a text
                "video_metadata": [metadata],
                "do_sample_frames": False,
                "fps": metadata.sampled_fps,  # Qwen-Omni looks only here for the time of a frame
            }
            # Its rule, applied again, would not always give the same size.
            return arguments | ({"do_resize": False} if media.sized else {}), [{"type": "video"}]
        self._check_modality("image")
        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in media.frames]
        return {"images": pictures}, [{"type": "image"}] * len(pictures)

    def _check_pace(self, video: Clip) -> None:
        """Warn where one rate is all that the model learns of frames that do not come evenly."""
        if self.adapter.seconds_name is None or not isinstance(video, Video):
            return
        step, error = video.pace
        if error > EVEN_STEPS * step:
            warnings.warn(
                f"{self.name} is told one rate for all frames, but those of {video.info.path!r} do "
                f"not come evenly: what it takes for their times is off by up to {error:.0f} "
                "seconds; a model that reads times as words is told each",
                stacklevel=2,
            )

    def _interleaves(self, media: Media) -> bool:
        """Whether the media are a video and its sound track, whose tokens are interleaved."""
        both = media.video is not None and media.audio is not None
        return both and self.takes_video and self.adapter.audio_in_video

    def _check_modality(self, modality: str) -> None:
        has = self.adapter.modalities
        if modality not in has:
            raise MediaError(
                f"{self.name} understands {' and '.join(has)}, but the file holds {modality}; "
                "choose another file or --model"
            )

    # -- what the model sees

    def frame_seconds(self, video: Clip | None) -> list[Tensor] | None:
        """When the frames of a clip are shown, as `prune` takes it; None without a clip."""
        if video is None:
            return None
        seconds = video.pts_seconds
        return [seconds] if "video" in self.adapter.modalities else list(torch.split(seconds, 1))

    def frames_by_clip(self, media: Media) -> list[Tensor] | None:
        """The pictures of each clip or image, as `prune` takes them; None for sound alone."""
        if not len(media.frames):
            return None
        clip = media.video is not None and "video" in self.adapter.modalities
        return [media.frames] if clip else list(torch.split(media.frames, 1))

    def visible(self, media: Media) -> Tensor:
        """Cut off what the processor crops away, as an overlay needs the frames.

        Returns:
            `[F, 3, H, W]` uint8; the tiles of an image of which the model sees nothing else, see
            `columns`.
        """
        if self.columns(media) is not None:
            tiles: Tensor = self.processor.image_processor.tiles(media.frames[0])
            return tiles
        video = media.video is not None and self.takes_video
        name = "video_processor" if video else "image_processor"
        return crop(media.frames, getattr(self.processor, name, None))

    def columns(self, media: Media) -> int | None:
        """Tiles side by side, of an image that the model sees in tiles alone; None otherwise."""
        part: Any = getattr(self.processor, "image_processor", None)
        if media.video is not None or not len(media.frames) or not hasattr(part, "columns"):
            return None
        columns: int = part.columns(*media.frames.shape[-2:])
        return columns
