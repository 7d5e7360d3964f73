"""The Qwen families."""

from __future__ import annotations

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

QWEN = {
    IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
    VISION_START: "<|vision_start|>",
    VISION_END: "<|vision_end|>",
}


def _qwen_pictures(**settings: Any) -> dict[str, Any]:
    limits = {"shortest_edge": 4 * 28 * 28, "longest_edge": 24 * 28 * 28}
    return {"size": limits, "patch_size": 14, "merge_size": 2, **settings}


def _qwen_chat(**sounds: str) -> str:
    return chat(
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        **sounds,
    )


def _qwen2_vl() -> Any:
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_qwen_pictures()),
        video_processor=transformers.Qwen2VLVideoProcessor(**_qwen_pictures()),
        tokenizer=tokenizer(QWEN),
        chat_template=_qwen_chat(),
    )


def _qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_qwen_pictures()),
        video_processor=transformers.Qwen2VLVideoProcessor(**_qwen_pictures()),
        tokenizer=tokenizer(QWEN),
        chat_template=_qwen_chat(),
    )


def _qwen3_vl() -> Any:
    # The limits of its video processor are for all frames together.
    limits = {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_qwen_pictures(**HALF)),
        video_processor=transformers.Qwen3VLVideoProcessor(**_qwen_pictures(size=limits)),
        tokenizer=tokenizer(QWEN),
        chat_template=chat(
            image="<|vision_start|><|image_pad|><|vision_end|>", video="<|video_pad|>"
        ),
    )


def _qwen2_audio() -> Any:
    marks = {AUDIO: "<|AUDIO|>", AUDIO_START: "<|audio_bos|>", AUDIO_END: "<|audio_eos|>"}
    return transformers.Qwen2AudioProcessor(
        feature_extractor=ear(1),  # all that the tiny tower has positions for
        tokenizer=tokenizer(marks),
        chat_template=chat(audio="<|audio_bos|><|AUDIO|><|audio_eos|>"),
    )


def _qwen2_5_omni() -> Any:
    marks = {
        IMAGE: "<|IMAGE|>",
        VIDEO: "<|VIDEO|>",
        AUDIO: "<|AUDIO|>",
        VISION_START: "<|vision_bos|>",
        VISION_END: "<|vision_eos|>",
        AUDIO_START: "<|audio_bos|>",
        AUDIO_END: "<|audio_eos|>",
    }
    return transformers.Qwen2_5OmniProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_qwen_pictures()),
        video_processor=transformers.Qwen2VLVideoProcessor(**_qwen_pictures()),
        feature_extractor=ear(30),
        tokenizer=tokenizer(
            marks,
            image_token="<|IMAGE|>",
            video_token="<|VIDEO|>",
            audio_token="<|AUDIO|>",
            vision_bos_token="<|vision_bos|>",
            vision_eos_token="<|vision_eos|>",
            audio_bos_token="<|audio_bos|>",
            audio_eos_token="<|audio_eos|>",
        ),
        chat_template=chat(
            image="<|vision_bos|><|IMAGE|><|vision_eos|>",
            video="<|vision_bos|><|VIDEO|><|vision_eos|>",
            audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
        ),
    )


def _save_omni(thinker: Any, folder: Path) -> None:
    """Save a thinker the way it is released: as a part of a model that also speaks."""
    omni = transformers.models.qwen2_5_omni.configuration_qwen2_5_omni
    thinker.config.seconds_per_chunk = 2  # as its processor takes for granted
    thinker.save_pretrained(folder)
    omni.Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict()).save_pretrained(folder)
    weights = {f"thinker.{key}": one.contiguous() for key, one in thinker.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CHECKPOINTS: dict[str, Maker] = {
    "qwen2_5_omni": _qwen2_5_omni,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_audio": _qwen2_audio,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
}
SAVERS: dict[str, Saver] = {"qwen2_5_omni": _save_omni}
