"""Families whose towers take pictures of any size, besides those of `qwen`."""

from __future__ import annotations

from typing import Any

import transformers

from tests.checkpoints.base import HALF, Maker, chat, tokenizer
from tests.checkpoints.qwen import CHECKPOINTS as OF_QWEN
from tokenprune.testing.tiny import IMAGE, VIDEO, VISION_END, VISION_START
from tokenprune.testing.tiny.grids import VIDEO_END, VIDEO_START

_LIMITS = {"shortest_edge": 4 * 28 * 28, "longest_edge": 24 * 28 * 28}
"""Pixels of an image."""
_VIDEO_LIMITS = {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
"""Pixels of all frames of a clip."""


def _glm4v() -> Any:
    marks = {
        IMAGE: "<|image|>",
        VIDEO: "<|video|>",
        VISION_START: "<|begin_of_image|>",
        VISION_END: "<|end_of_image|>",
        VIDEO_START: "<|begin_of_video|>",
        VIDEO_END: "<|end_of_video|>",
    }
    return transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(size=_LIMITS),
        video_processor=transformers.Glm4vVideoProcessor(size=_VIDEO_LIMITS),
        tokenizer=tokenizer(marks),
        chat_template=chat(
            image="<|begin_of_image|><|image|><|end_of_image|>",
            video="<|begin_of_video|><|video|><|end_of_video|>",
        ),
    )


def _video_llama_3() -> Any:
    # Images are not merged, so that they have four times as many tokens.
    return transformers.VideoLlama3Processor(
        image_processor=transformers.VideoLlama3ImageProcessor(size=_LIMITS, **HALF),
        video_processor=transformers.VideoLlama3VideoProcessor(size=_VIDEO_LIMITS, **HALF),
        tokenizer=tokenizer({IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}),
        chat_template=chat(image="<|image_pad|>", video="<|video_pad|>"),
    )


CHECKPOINTS: dict[str, Maker] = {
    "glm4v": _glm4v,
    "qwen3_vl_moe": OF_QWEN["qwen3_vl"],
    "video_llama_3": _video_llama_3,
}
