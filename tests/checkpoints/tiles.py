"""Families that cut images into square views, each with markers around it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers

from tests.checkpoints.base import HALF, Maker, Saver, chat, square, tokenizer
from tokenprune.testing.tiny import IMAGE, VIDEO, VISION_END, VISION_START
from tokenprune.testing.tiny.tiles import AROUND, GLOBAL, place

_END_OF_UTTERANCE = 149
_TILED = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
"""At most two by two tiles."""


def _marks() -> dict[int, str]:
    places = {place(y, x): f"<row_{y + 1}_col_{x + 1}>" for y in range(2) for x in range(2)}
    return {
        **places,
        AROUND: "<fake_token_around_image>",
        GLOBAL: "<global-img>",
        IMAGE: "<image>",
        VIDEO: "<video>",
        _END_OF_UTTERANCE: "<end_of_utterance>",
    }


def _idefics3() -> Any:
    return transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(**_TILED, **HALF),
        tokenizer=tokenizer(_marks()),
        image_seq_len=4,
        chat_template=chat(image="<image>"),
    )


def _smolvlm() -> Any:
    return transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(**_TILED, **HALF),
        video_processor=transformers.SmolVLMVideoProcessor(**_TILED, **HALF),
        tokenizer=tokenizer(_marks()),
        image_seq_len=4,
        chat_template=chat(image="<image>", video="<video>"),
    )


def _gemma3() -> Any:
    marks = {IMAGE: "<image_soft_token>", VISION_START: "<start_of_image>"}
    marks |= {VISION_END: "<end_of_image>"}
    return transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size=square(56), **HALF),
        tokenizer=tokenizer(
            marks,
            image_token="<image_soft_token>",
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
        ),
        image_seq_length=4,
        chat_template=chat(image="<start_of_image>"),
    )


def _save_gemma3(model: Any, folder: Path) -> None:
    """Save the model with a window longer than what layers remember beyond it, as is usual."""
    model.config.text_config.sliding_window = 256
    model.save_pretrained(folder)


SAVERS: dict[str, Saver] = {"gemma3": _save_gemma3}

CHECKPOINTS: dict[str, Maker] = {"gemma3": _gemma3, "idefics3": _idefics3}
# Its processor spells out how many frames there are with a package that transformers leaves out.
if importlib.util.find_spec("num2words"):
    CHECKPOINTS["smolvlm"] = _smolvlm
