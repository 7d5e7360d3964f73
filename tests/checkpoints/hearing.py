"""Families that hear, at the lengths of their real windows."""

from __future__ import annotations

import base64
import copy
import json
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file

from tests.checkpoints.base import HALF, Maker, Saver, chat, ear, tokenizer
from tokenprune.testing.tiny import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
)

# As some are released: they know no parts, and the user writes the placeholders.
WORDS = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
JOINED_WORDS = WORDS.replace("{{ message['content'] }}", "{{ '' + message['content'] }}")


def _audioflamingo3() -> Any:
    return transformers.AudioFlamingo3Processor(
        feature_extractor=ear(30),
        tokenizer=tokenizer({AUDIO: "<sound>"}),
        chat_template=chat(audio="<sound>"),
    )


def _granite_speech() -> Any:
    return transformers.GraniteSpeechProcessor(
        audio_processor=transformers.GraniteSpeechFeatureExtractor(),
        tokenizer=tokenizer({AUDIO: "<|audio|>"}),
        chat_template=WORDS,
    )


def _phi4_multimodal() -> Any:
    names = {IMAGE: "<|endoftext10|>", AUDIO: "<|endoftext11|>"}
    words = tokenizer(names, image_token=names[IMAGE], audio_token=names[AUDIO])
    words.chat_template = JOINED_WORDS  # the processor of this family keeps none
    return transformers.Phi4MultimodalProcessor(
        image_processor=transformers.Phi4MultimodalImageProcessor(dynamic_hd=4),
        audio_processor=transformers.Phi4MultimodalFeatureExtractor(feature_size=16),
        tokenizer=words,
    )


def _qwen3_omni_moe() -> Any:
    names = {
        IMAGE: "<|image_pad|>",
        VIDEO: "<|video_pad|>",
        AUDIO: "<|audio_pad|>",
        VISION_START: "<|vision_start|>",
        VISION_END: "<|vision_end|>",
        AUDIO_START: "<|audio_start|>",
        AUDIO_END: "<|audio_end|>",
    }
    sizes = {"shortest_edge": 4 * 28 * 28, "longest_edge": 24 * 28 * 28}
    pictures = {"size": sizes, "patch_size": 14, "merge_size": 2, **HALF}
    return transformers.Qwen3OmniMoeProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**pictures),
        video_processor=transformers.Qwen2VLVideoProcessor(**pictures),
        feature_extractor=ear(30),
        tokenizer=tokenizer(
            names,
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            audio_token="<|audio_pad|>",
            vision_bos_token="<|vision_start|>",
            vision_eos_token="<|vision_end|>",
            audio_bos_token="<|audio_start|>",
            audio_eos_token="<|audio_end|>",
        ),
        chat_template=chat(
            image="<|vision_start|><|image_pad|><|vision_end|>",
            video="<|vision_start|><|video_pad|><|vision_end|>",
            audio="<|audio_start|><|audio_pad|><|audio_end|>",
        ),
    )


TEKKEN_SPECIAL = 40
"""Special tokens of the tokenizer below; those of its bytes follow."""


def _voxtral() -> Any:
    """Its tokenizer is one of mistral-common, and writes the prompt: 24 stands for sound."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    config = {
        "pattern": "[\\s\\S]",
        "num_vocab_tokens": 256,
        "default_vocab_size": TEKKEN_SPECIAL + 256,
        "default_num_special_tokens": TEKKEN_SPECIAL,
        "version": "v7",
    }
    vocabulary = [
        {"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode(), "token_str": None}
        for n in range(256)
    ]
    sounds = {
        "sampling_rate": 16_000,
        "frame_rate": 12.5,
        "audio_encoding_config": {"num_mel_bins": 16, "hop_length": 160, "window_size": 400},
        "chunk_length_s": 30.0,
    }
    names = {one["rank"]: one["token_str"] for one in Tekkenizer.DEPRECATED_SPECIAL_TOKENS}
    names |= {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}
    special = [
        {"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
        for rank in range(TEKKEN_SPECIAL)
    ]
    tekken = {"config": config, "vocab": vocabulary, "special_tokens": special, "audio": sounds}
    path = Path(tempfile.mkdtemp()) / "tekken.json"
    path.write_text(json.dumps(tekken))
    words = transformers.MistralCommonBackend(path)
    return transformers.VoxtralProcessor(feature_extractor=ear(30), tokenizer=words)


def _resized(change: Callable[[Any], None]) -> Saver:
    """Save a model of other sizes, which its processor is bound to."""

    def save(model: Any, folder: Path) -> None:
        config = copy.deepcopy(model.config)
        change(config)
        other = type(model)(config).eval()
        other.generation_config = model.generation_config
        other.save_pretrained(folder)

    return save


def _windows_of_30_seconds(config: Any) -> None:
    config.audio_config.max_source_positions = 1500


def _two_by_80_mels(config: Any) -> None:
    config.encoder_config.input_dim = 160  # the extractor forgets any other number when saved


def _tiles_of_448(config: Any) -> None:
    config.vision_config.image_size = config.vision_config.crop_size = 448


def _voxtral_sizes(config: Any) -> None:
    _windows_of_30_seconds(config)
    config.audio_token_id = 24
    config.text_config.vocab_size = TEKKEN_SPECIAL + 256


def _save_voxtral(model: Any, folder: Path) -> None:
    model.generation_config.suppress_tokens = list(range(TEKKEN_SPECIAL))
    _resized(_voxtral_sizes)(model, folder)


def _save_qwen3_omni(thinker: Any, folder: Path) -> None:
    """Save a thinker the way it is released: as a part of a model that also speaks."""
    omni = transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe
    thinker.save_pretrained(folder)
    omni.Qwen3OmniMoeConfig(thinker_config=thinker.config.to_dict()).save_pretrained(folder)
    weights = {f"thinker.{key}": one.contiguous() for key, one in thinker.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CHECKPOINTS: dict[str, Maker] = {
    "audioflamingo3": _audioflamingo3,
    "granite_speech": _granite_speech,
    "phi4_multimodal": _phi4_multimodal,
    "qwen3_omni_moe": _qwen3_omni_moe,
}
SAVERS: dict[str, Saver] = {
    "audioflamingo3": _resized(_windows_of_30_seconds),
    "granite_speech": _resized(_two_by_80_mels),
    "phi4_multimodal": _resized(_tiles_of_448),
    "qwen3_omni_moe": _save_qwen3_omni,
    "voxtral": _save_voxtral,
}
if find_spec("mistral_common") is not None:
    CHECKPOINTS["voxtral"] = _voxtral
