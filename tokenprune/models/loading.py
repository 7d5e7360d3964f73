"""Loading a model with its processor, and turning files and questions into its inputs."""

from __future__ import annotations

import base64
import inspect
import io
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.video_utils import VideoMetadata

from tokenprune.adapters._support import check_architecture
from tokenprune.adapters.base import Adapter, adapter_for, list_models
from tokenprune.core.layout import MODALITIES
from tokenprune.errors import (
    DecodeError,
    MediaError,
    MissingExtraError,
    NoVideoStreamError,
    TokenPruneError,
    UnsupportedModelError,
)
from tokenprune.media import SizeRule, Video, probe, read_audio, read_video
from tokenprune.media.index.container import check_file
from tokenprune.models import built_in_models

__all__ = [
    "LoadedModel",
    "Media",
    "auto_class",
    "check_question",
    "check_watchable",
    "frame_size",
    "load_model",
    "load_outline",
    "read_media",
]

DEFAULT_MODEL = "mini-video"
SAMPLING_RATE = 16000
SHORTEST_SOUND = SAMPLING_RATE // 10


@dataclass(frozen=True)
class Media:
    """What a file holds for a model: a video's frames and sound track, an image, or a sound.

    Attributes:
        frames: `[F, 3, H, W]` uint8; one frame for an image, none for a sound.
        video: The decoded video, if it is one.
        audio: `[T]` float32 mono at 16 kHz, if it is a sound, or the sound track of the video from
            the first frame on.
        sized: Whether the frames have the size to which the processor would bring them.
    """

    frames: Tensor
    video: Video | None = None
    audio: Tensor | None = None
    sized: bool = False


_JOIN: dict[str, Any] = (
    {"audio_from_video_indices": [0], "load_audio_from_video": True}
    if hasattr(transformers.processing_utils, "OmniModalProcessorMixin")
    else {"use_audio_in_video": True}  # in older releases of transformers
)
"""What tells a processor that the sound is that of the video."""


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
            TokenPruneError: The question is empty or holds a placeholder, or the processor has no
                chat template.
        """
        return {
            name: self._place(value) if isinstance(value, Tensor) else value
            for name, value in self.process(media, question).items()
        }

    def _place(self, value: Tensor) -> Tensor:
        """Copy to the model's device; the host does not wait for an accelerator's copy."""
        device = self.model.device
        if device.type == "meta":  # the outline of a model: what it is given is looked at only
            return value
        if device.type == "cuda" and value.device.type == "cpu":
            # The allocator keeps pinned memory until the copy is done.
            value = value.pin_memory().to(device, non_blocking=True)
        dtype = self.model.dtype if value.is_floating_point() else value.dtype
        return value.to(device, dtype)

    def process(self, media: Media, question: str) -> dict[str, Any]:
        """What the processor makes of a question about some media, where the media are.

        Raises:
            TokenPruneError: As `encode`.
        """
        check_question(question)
        self._check_words(question)
        if media.audio is not None and not _takes_audio(self.processor):
            return self._tell(media.audio, question)
        arguments, parts = self._media_arguments(media)
        text = self.prompt(parts, question)
        inputs = dict(_process(self.processor, text=[text], **arguments))
        # The processor puts sound between frames, and the model must be told that it did.
        return inputs | ({"use_audio_in_video": True} if self._joins(media) else {})

    def _check_words(self, question: str) -> None:
        for kind in MODALITIES:
            token = getattr(self.processor, f"{kind}_token", None)
            if token and str(token) in question:
                raise TokenPruneError(
                    f"a question cannot hold {token!r}, which stands for {kind} tokens in a "
                    "prompt; ask in words"
                )

    def prompt(self, parts: list[dict[str, str]], question: str) -> str:
        """A question in the model's own words of a chat, with a placeholder for each part.

        Args:
            parts: Such as `{"type": "image"}`, in order.
            question: In words.

        Raises:
            UnsupportedModelError: The checkpoint has no chat template.
        """
        content = [*parts, {"type": "text", "text": question}]
        try:
            text = self._write(content)
        except TypeError:  # the template adds the content to a string
            text = str(content)
        if str(content) in text:  # it knows no parts: placeholders are words of the user
            tokens = [getattr(self.processor, f"{part['type']}_token") for part in parts]
            text = self._write("".join(tokens) + question)
        return text

    def _write(self, content: str | list[dict[str, str]]) -> str:
        """One turn of the user, by the chat template of the processor or of its tokenizer."""
        writers: list[Any] = [self.processor, getattr(self.processor, "tokenizer", None)]
        for writer in writers:
            if getattr(writer, "chat_template", None):
                text: str = writer.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
                return text
        raise UnsupportedModelError(
            f"the processor of {self.name} has no chat template, so no prompt can be written; "
            "use a checkpoint tuned for chat"
        )

    def _tell(self, audio: Tensor, question: str) -> dict[str, Any]:
        """Inputs by a processor that takes sound only as a file within the chat."""
        self._demand("audio")
        content = [
            {"type": "audio", "base64": _wave_file(_audible(audio))},
            {"type": "text", "text": question},
        ]
        return dict(self.processor.apply_chat_template([{"role": "user", "content": content}]))

    def _joins(self, media: Media) -> bool:
        """Whether the media are a video and its sound, which become one run of tokens."""
        both = media.video is not None and media.audio is not None
        return both and self.watches and self.adapter.sound_in_video

    def frame_seconds(self, video: Video | None) -> list[Tensor] | None:
        """When the frames of a video are shown, as `prune` takes it; None without a video."""
        if video is None:
            return None
        seconds = video.pts_seconds
        return [seconds] if "video" in self.adapter.modalities else list(torch.split(seconds, 1))

    @property
    def watches(self) -> bool:
        """Whether a video is one to the processor, not several images."""
        return bool(getattr(self.processor, "video_processor", None))

    def visible(self, media: Media) -> Tensor:
        """The frames without what the processor crops away, as an overlay needs them.

        Returns:
            `[F, 3, H, W]` uint8; the tiles of an image of which the model sees nothing else, see
            `columns`.
        """
        if self.columns(media) is not None:
            tiles: Tensor = self.processor.image_processor.tiles(media.frames[0])
            return tiles
        watched = media.video is not None and self.watches
        name = "video_processor" if watched else "image_processor"
        part: Any = getattr(self.processor, name, None)
        size, crop = getattr(part, "size", None), getattr(part, "crop_size", None)
        # A tiling processor shows the model all of an image, squeezed into a square.
        if not getattr(part, "do_center_crop", None) or hasattr(part, "image_grid_pinpoints"):
            return media.frames
        edge = size.get("shortest_edge") if size else None
        if not edge or not crop:
            return media.frames
        height, width = media.frames.shape[-2:]
        scale = min(height, width) / edge
        rows, columns = (
            min(height, round(crop["height"] * scale)),
            min(width, round(crop["width"] * scale)),
        )
        top, left = (height - rows) // 2, (width - columns) // 2
        return media.frames[..., top : top + rows, left : left + columns]

    def columns(self, media: Media) -> int | None:
        """How many tiles lie side by side, of an image that the model sees in tiles alone."""
        part: Any = getattr(self.processor, "image_processor", None)
        if media.video is not None or not len(media.frames) or not hasattr(part, "columns"):
            return None
        columns: int = part.columns(*media.frames.shape[-2:])
        return columns

    def _media_arguments(self, media: Media) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """What the processor is called with, and the chat's parts."""
        if media.audio is None:
            return self._seen(media)
        self._demand("audio")
        arguments, parts = self._seen(media) if len(media.frames) else ({}, [])
        arguments["sampling_rate"] = SAMPLING_RATE
        if self._joins(media):
            arguments |= {
                "audio": [_audible(media.audio).numpy()],
                "truncation": False,  # or the track would end with the processor's longest sound
            }
            return arguments | _JOIN, parts
        sounds = [one.numpy() for one in self._sounds(media.audio)]
        return arguments | {"audio": sounds}, [*parts, *[{"type": "audio"}] * len(sounds)]

    def _seen(self, media: Media) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """The same for what is seen of the media."""
        if media.video is not None and self.watches:
            metadata = media.video.metadata
            arguments = {
                "videos": [[_whole_patches(self.processor, media.frames)]],  # a list a text
                "video_metadata": [metadata],
                "do_sample_frames": False,
                "fps": metadata.sampled_fps,  # Qwen-Omni looks only here for the time of a frame
            }
            # Its rule, applied again, would not always give the same size.
            return arguments | ({"do_resize": False} if media.sized else {}), [{"type": "video"}]
        self._demand("image")
        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in media.frames]
        return {"images": pictures}, [{"type": "image"}] * len(pictures)

    def _sounds(self, audio: Tensor) -> list[Tensor]:
        """A sound in pieces that the processor takes whole: it would cut off what is beyond.

        Raises:
            MediaError: It is too long for a processor that takes one sound a prompt.
        """
        seconds = getattr(self.processor, "max_audio_len", None)
        if seconds is not None and len(audio) > seconds * SAMPLING_RATE:
            raise MediaError(
                f"the sound lasts {len(audio) / SAMPLING_RATE:.0f} seconds, and {self.name} hears "
                f"at most {seconds}; give a shorter file, or choose another --model"
            )
        pieces = list(torch.split(audio, self._longest_sound() or len(audio)))
        return [*pieces[:-1], _audible(pieces[-1])]

    def _longest_sound(self) -> int | None:
        """Samples beyond which the processor would cut a sound off; None if it does not."""
        own = getattr(self.processor, "audio_kwargs", None)  # settings of its class
        if own is None:  # where older releases of transformers have them
            kinds = getattr(self.processor, "valid_processor_kwargs", None)
            own = getattr(kinds, "_defaults", {}).get("audio_kwargs", {})
        if hasattr(self.processor, "max_audio_len") or not own.get("truncation", True):
            return None
        extractor = getattr(self.processor, "feature_extractor", None)
        return getattr(extractor, "n_samples", None)

    def _demand(self, modality: str) -> None:
        has = self.adapter.modalities
        if modality not in has:
            raise MediaError(
                f"{self.name} understands {' and '.join(has)}, but the file holds {modality}; "
                "choose another file or --model"
            )


def check_question(question: str) -> None:
    """Check that something is asked.

    Raises:
        TokenPruneError: The question is empty.
    """
    if not question.strip():
        raise TokenPruneError(
            f"a question must have words, got {question!r}; ask something, such as 'what happens?'"
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
        MissingExtraError: It rests on a package that is not installed.
    """
    name = name or DEFAULT_MODEL
    path = _find(name)
    device = device or _default_device()
    with _reading(name):
        config = _served_config(transformers.AutoConfig.from_pretrained(path), name)
        processor = _served_processor(path, config)
        model, found = auto_class(config).from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attention,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise _cannot_load(name, f"its weights lack {len(missing)} tensors, such as {missing[0]}")
    if dtype is None and _default_dtype(model.dtype, device) != model.dtype:
        model = model.to(_default_dtype(model.dtype, device))
    return LoadedModel(model.to(device).eval(), processor, name)


def load_outline(name: str | None = None, *, device: str | None = None) -> LoadedModel:
    """Load a model without its weights: parameters have shapes, but no data.

    Args:
        name: As in `load_model`.
        device: Where the model would be put. Parameters have the dtype that they would have there,
            if the checkpoint's config names one; float32 if not.

    Raises:
        TokenPruneError: As `load_model`.
    """
    name = name or DEFAULT_MODEL
    path = _find(name)
    with _reading(name):
        config = _served_config(transformers.AutoConfig.from_pretrained(path), name)
        processor = _served_processor(path, config)
        dtype = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
        dtype = _default_dtype(dtype, device or _default_device())
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=dtype)
    return LoadedModel(model.eval(), processor, name)


def auto_class(config: Any) -> Any:
    """The auto class of transformers that makes a model of this config which generates."""
    # Some models that hear are not on the list of multimodal ones; lists have no public names.
    heard = type(config) in transformers.AutoModelForSeq2SeqLM._model_mapping
    found = transformers.AutoModelForSeq2SeqLM if heard else transformers.AutoModelForMultimodalLM
    if type(config) not in found._model_mapping and config.architectures:
        # Older releases of transformers list Qwen-Omni, but not its thinkers.
        found.register(type(config), getattr(transformers, config.architectures[0]))
    return found


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _default_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """The dtype of a model whose checkpoint has another: processors are slow in float16."""
    return torch.float32 if (stored, device) == (torch.float16, "cpu") else stored


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what goes wrong with the files of a model into one error."""
    try:
        yield
    except TokenPruneError:
        raise
    except ImportError as error:  # some towers and processors rest on packages of their own
        raise MissingExtraError(
            f"cannot load model {name!r}: {_first_line(error).rstrip(':')}; install that package"
        ) from error
    except Exception as error:  # broken files raise whatever their readers raise
        raise _cannot_load(name, _first_line(error)) from error


def _find(name: str) -> str:
    """The folder of a model, or its hub name; only names of the form owner/name go to the hub."""
    path = str(built_in_models().get(name, name))
    if Path(path).is_dir() or (name.count("/") == 1 and name[0].isalnum()):
        return path
    raise _cannot_load(name, "there is no such folder")


def _served_config(config: Any, name: str) -> Any:
    """The config that an adapter serves: the checkpoint's, or that of a part which is a model.

    Qwen-Omni checkpoints hold a model that understands, the thinker, and one that speaks.
    """
    known = list_models()
    parts = [getattr(config, part, None) for part in getattr(config, "sub_configs", ())]
    for one in (config, *parts):
        if getattr(one, "model_type", None) in known:
            check_architecture(one)
            return known[one.model_type].mend(one)
    check_architecture(config)
    raise UnsupportedModelError(
        f"no adapter for model_type {config.model_type!r} of {name}; known: {', '.join(known)}"
    )


def _served_processor(path: str, config: Any) -> Any:
    """The processor of a checkpoint whose config an adapter serves."""
    processor = transformers.AutoProcessor.from_pretrained(path)
    return list_models()[config.model_type].mend_processor(processor)


def _cannot_load(name: str, why: str) -> TokenPruneError:
    built_in = ", ".join(built_in_models()) or "none"
    return TokenPruneError(
        f"cannot load model {name!r}: {why}; give a hub name (owner/name), a folder with "
        f"config.json and weights, or a built-in model ({built_in})"
    )


def read_media(
    path: str | Path,
    loaded: LoadedModel,
    *,
    frames: int | None = None,
    fps: float | None = None,
    sound: bool = True,
    reader: Callable[..., Video] = read_video,
) -> Media:
    """Read a file as the model can use it: frames of a video, an image, or a sound.

    Args:
        path: A local file.
        loaded: The model.
        frames: How many frames of a video, evenly spread; 64 if `fps` is not given either.
        fps: Frames per second of a video.
        sound: Whether a model that both sees and hears is given a video's sound track as well.
        reader: What reads videos, with the arguments `frames`, `fps` and `size` of `read_video`.

    Raises:
        MediaError: The file cannot be read, or holds nothing the model understands.
    """
    check_file(path)
    picture = _image(Path(path))
    if picture is not None:
        return Media(picture[None])
    hears = "audio" in loaded.adapter.modalities
    sees = set(loaded.adapter.modalities) - {"audio"}
    if not sees:
        return Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=_sound(path))
    size = frame_size(loaded.processor)
    try:
        video = reader(path, frames=frames, fps=fps, size=size)
    except NoVideoStreamError:
        if not hears:
            raise
        return Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=_sound(path))
    track = None
    if hears and sound and video.info.has_audio:
        track = _sound(path, video.info.start_seconds)
    audio = track if track is not None and len(track) else None
    return Media(video.frames, video=video, audio=audio, sized=size is not None)


def check_watchable(path: str | Path, loaded: LoadedModel, *, sound: bool = True) -> None:
    """Check that nothing of a file is lost if its frames are watched in groups.

    Args:
        path: A local file.
        loaded: The model.
        sound: Whether the model is to be given the sound track as well.

    Raises:
        MediaError: It is no video, or has a sound track that the model would hear.
    """
    check_file(path)
    if _image(Path(path)) is not None:
        raise MediaError(f"{str(path)!r} is an image: it has no groups of frames; leave out group")
    if "audio" in loaded.adapter.modalities and sound and probe(path).has_audio:
        raise MediaError(
            f"{loaded.name} would hear the sound track of {str(path)!r}, but frames that come in "
            "groups are only watched; leave out the sound, or group"
        )


def _sound(path: str | Path, start_seconds: float | None = None) -> Tensor:
    return read_audio(path, sampling_rate=SAMPLING_RATE, start_seconds=start_seconds)


def _audible(sound: Tensor) -> Tensor:
    """A sound with silence after it if it is too short to make a token."""
    return torch.nn.functional.pad(sound, (0, max(0, SHORTEST_SOUND - len(sound))))


def _takes_audio(processor: Any) -> bool:
    """Whether sound may be given beside a text that has its placeholders."""
    return "audio" in inspect.signature(type(processor).__call__).parameters


def _wave_file(sound: Tensor) -> str:
    """A sound as a WAV file of 16 bits a sample, in base64."""
    samples = (sound.clamp(-1, 1) * 32767).round().to(torch.int16)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(samples.numpy().astype("<i2").tobytes())
    return base64.b64encode(buffer.getvalue()).decode()


def _image(path: Path) -> Tensor | None:
    """The picture in a file, `[3, H, W]` uint8; None if it is no image file."""
    try:
        picture = Image.open(path)
    except (UnidentifiedImageError, OSError):
        return None  # the media reader says what is wrong with the file
    with picture:
        if getattr(picture, "n_frames", 1) > 1 or picture.format == "MPEG":
            return None
        try:
            rgb = ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DecodeError(
                f"cannot read {str(path)!r} as an image: {_first_line(error)}; give an image that "
                "other programs open"
            ) from error
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()


def frame_size(processor: Any) -> SizeRule | None:
    """The size to which a processor would bring frames, so that the decoder does it at once.

    The processor itself is asked, with frames that have a shape but no data: the rules differ
    between families, and between versions of transformers.

    Returns:
        A rule for `read_video`; None to decode at full size, if the processor takes images only.
    """
    pictures = getattr(processor, "video_processor", None)
    if pictures is None:
        return None

    def rule(height: int, width: int, frames: int) -> tuple[int, int]:
        shape = torch.empty(frames, 3, height, width, dtype=torch.uint8, device="meta")
        made = _process_shape(processor, _whole_patches(processor, shape))
        if "video_grid_thw" in made:
            _, rows, columns = made["video_grid_thw"][0].tolist()
            return rows * pictures.patch_size, columns * pictures.patch_size
        pixels = made["pixel_values_videos" if "pixel_values_videos" in made else "pixel_values"]
        return int(pixels.shape[-2]), int(pixels.shape[-1])

    return rule


def _process_shape(processor: Any, frames: Tensor) -> Any:
    """What a processor makes of frames without data."""
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
        return _process(processor, text=[processor.video_token], **arguments)
    except (RuntimeError, TypeError):  # some read pixels to count the placeholders
        return _process(processor.video_processor, **arguments)


def _whole_patches(processor: Any, frames: Tensor) -> Tensor:
    """Frames that fill temporal patches: the last one is repeated, as processors do themselves.

    Some do it only after they have computed a size from the number of frames, or refuse to
    compute one for a single frame.
    """
    missing = -len(frames) % (getattr(processor.video_processor, "temporal_patch_size", None) or 1)
    return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames


def _process(processor: Any, **inputs: Any) -> Any:
    """Call a processor.

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
            f"the model's processor refuses the file: {_first_line(error)}; give another file, or "
            "choose another --model"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".;") if lines else type(error).__name__
