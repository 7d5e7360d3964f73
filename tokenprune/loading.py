"""Loading a model with its processor, and turning files and questions into its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PreTrainedModel

from tokenprune.adapter import Adapter, adapter_for, list_models
from tokenprune.errors import MediaError, NoVideoStreamError, TokenPruneError, UnsupportedModelError
from tokenprune.media import SizeRule, Video, read_audio, read_video
from tokenprune.models import built_in_models

__all__ = ["LoadedModel", "Media", "frame_size", "load_model", "read_media"]

DEFAULT_MODEL = "mini-video"
SAMPLING_RATE = 16000


@dataclass(frozen=True)
class Media:
    """What a file holds for a model: a video's frames, an image, or a sound.

    Attributes:
        frames: `[F, 3, H, W]` uint8; one frame for an image, none for a sound.
        video: The decoded video, if it is one.
        audio: `[T]` float32 mono at 16 kHz, if it is a sound.
    """

    frames: Tensor
    video: Video | None = None
    audio: Tensor | None = None


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

    def encode(self, media: Media, question: str) -> dict[str, Any]:
        """Model inputs for a question about some media, batch 1, on the model's device.

        A family without video takes the frames as images.

        Raises:
            TokenPruneError: The question is empty, or the processor has no chat template.
        """
        if not question.strip():
            raise TokenPruneError("the question is empty; ask something, such as 'what happens ?'")
        arguments, parts = self._media_arguments(media)
        content = [*parts, {"type": "text", "text": question}]
        if not getattr(self.processor, "chat_template", None):
            raise UnsupportedModelError(
                f"the processor of {self.name} has no chat template, so no prompt can be written; "
                "use a checkpoint tuned for chat"
            )
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = self.processor(text=[text], return_tensors="pt", **arguments)
        return {
            name: value.to(self.model.device, self.model.dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value.to(self.model.device)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }

    def _media_arguments(self, media: Media) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """What the processor is called with, and the chat's parts."""
        if media.audio is not None:
            self._demand("audio")
            arguments = {"audio": [media.audio.numpy()], "sampling_rate": SAMPLING_RATE}
            return arguments, [{"type": "audio"}]
        if media.video is not None and getattr(self.processor, "video_processor", None) is not None:
            return {
                "videos": [media.frames],
                "video_metadata": [media.video.hf_metadata()],
                "do_sample_frames": False,
            }, [{"type": "video"}]
        self._demand("image")
        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in media.frames]
        return {"images": pictures}, [{"type": "image"}] * len(pictures)

    def _demand(self, modality: str) -> None:
        has = self.adapter.modalities
        if modality not in has:
            raise MediaError(
                f"{self.name} understands {' and '.join(has)}, but the file holds {modality}; "
                "choose another file or --model"
            )


def load_model(
    name: str | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> LoadedModel:
    """Load a model by its hub name, its folder, or the name of a built-in one.

    Args:
        name: For example "Qwen/Qwen2.5-VL-3B-Instruct"; None for the built-in mini video model.
        device: Where to put it; None for the accelerator, if there is one.
        dtype: None for the checkpoint's own (float32 for float16 checkpoints on a CPU).
        attention: Name of the attention implementation; None for the model's default.

    Raises:
        UnsupportedModelError: No adapter serves its type.
        TokenPruneError: It cannot be found or read.
    """
    name = name or DEFAULT_MODEL
    path = str(built_in_models().get(name, name))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        known = list_models()
        if config.model_type not in known:
            raise UnsupportedModelError(
                f"no adapter for model_type {config.model_type!r} of {name}; "
                f"known: {', '.join(known)}"
            )
        processor = transformers.AutoProcessor.from_pretrained(path)
        model = transformers.AutoModelForMultimodalLM.from_pretrained(
            path, dtype=dtype or "auto", attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        if isinstance(error, TokenPruneError):
            raise
        built_in = ", ".join(built_in_models()) or "none"
        raise TokenPruneError(
            f"cannot load model {name!r}: {str(error).splitlines()[0]}; give a hub name, a folder "
            f"with config.json and weights, or a built-in model ({built_in})"
        ) from error
    if dtype is None and device == "cpu" and model.dtype == torch.float16:
        model = model.float()
    return LoadedModel(model.to(device).eval(), processor, name)


def read_media(
    path: str | Path,
    loaded: LoadedModel,
    *,
    frames: int | None = None,
    fps: float | None = None,
) -> Media:
    """Read a file as the model can use it: frames of a video, an image, or a sound.

    Args:
        path: A local file.
        loaded: The model.
        frames: How many frames of a video, evenly spread; 64 if `fps` is not given either.
        fps: Frames per second of a video.

    Raises:
        MediaError: The file cannot be read, or holds nothing the model understands.
    """
    picture = _image(Path(path))
    if picture is not None:
        return Media(picture[None])
    hears = "audio" in loaded.adapter.modalities
    sees = set(loaded.adapter.modalities) - {"audio"}
    if not sees:
        return Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=_sound(path))
    try:
        video = read_video(path, frames=frames, fps=fps, size=frame_size(loaded.processor))
    except NoVideoStreamError:
        if not hears:
            raise
        return Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=_sound(path))
    return Media(video.frames, video=video)


def _sound(path: str | Path) -> Tensor:
    return read_audio(path, sampling_rate=SAMPLING_RATE)


def _image(path: Path) -> Tensor | None:
    """The picture in a file, `[3, H, W]` uint8; None if it is no image file."""
    try:
        with Image.open(path) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                return None
            rgb = picture.convert("RGB")
    except (UnidentifiedImageError, OSError):
        return None  # the media reader says what is wrong with the file
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()


def frame_size(processor: Any) -> SizeRule | None:
    """The size to which a processor would bring frames, so that the decoder does it at once.

    Returns:
        A rule from source height and width to the decoder's; None to decode at full size, if the
        processor takes images only or has a rule of its own.
    """
    processor = getattr(processor, "video_processor", None)
    size = dict(getattr(processor, "size", None) or {})
    size = {side: pixels for side, pixels in size.items() if pixels}
    if size.keys() == {"height", "width"}:
        exact = size["height"], size["width"]
        return lambda height, width: exact
    patch, merge = getattr(processor, "patch_size", None), getattr(processor, "merge_size", None)
    if size.keys() == {"shortest_edge", "longest_edge"} and patch and merge:
        least, most = size["shortest_edge"], size["longest_edge"]
        return lambda height, width: _fit(height, width, patch * merge, least, most)
    if size.keys() == {"shortest_edge"}:
        return lambda height, width: _shortest(height, width, size["shortest_edge"])
    return None


def _fit(height: int, width: int, multiple: int, least: int, most: int) -> tuple[int, int]:
    """The nearest size of sides that are multiples, with an area in pixels within bounds."""

    def sides(scale: float, rounded: Any) -> tuple[int, int]:
        return (
            max(multiple, rounded(height * scale / multiple) * multiple),
            max(multiple, rounded(width * scale / multiple) * multiple),
        )

    near = sides(1.0, round)
    if near[0] * near[1] > most:
        return sides(math.sqrt(most / (height * width)), math.floor)
    if near[0] * near[1] < least:
        return sides(math.sqrt(least / (height * width)), math.ceil)
    return near


def _shortest(height: int, width: int, edge: int) -> tuple[int, int]:
    scale = edge / min(height, width)
    return max(edge, int(height * scale)), max(edge, int(width * scale))
