"""Families that cut images into square views, each with markers around it."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tokenprune.testing.tiny.base import (
    IMAGE,
    VISION_END,
    VISION_START,
    Builder,
    Inputs,
    Maker,
    Tiny,
    make_tiny,
    noise,
    prompt,
    siglip,
    text_config,
    tower,
)

AROUND, GLOBAL, NEWLINE = 140, 141, 142
"""Marks of the Idefics family: around views, before the view of a whole image, between rows."""


def place(row: int, column: int) -> int:
    """The token that says which tile follows."""
    return 143 + 3 * row + column


def views(rows: int, columns: int) -> list[int]:
    """An image of 4 tokens a view, cut into tiles (or not at all), as its processor writes it."""
    tokens = []
    for row in range(rows):
        for column in range(columns):
            tokens += [AROUND, place(row, column), *[IMAGE] * 4]
        tokens += [NEWLINE]
    return [*tokens, *[NEWLINE] * (rows > 0), AROUND, GLOBAL, *[IMAGE] * 4, AROUND]


def _tiled(generator: torch.Generator, closing: int, short: bool) -> Inputs:
    # Two rows of three tiles, then an image in one piece. Batches are padded with empty views.
    shapes = [(2, 1)] if short else [(2, 3), (0, 0)]
    count = sum(rows * columns + 1 for rows, columns in shapes)
    return {
        "input_ids": prompt(generator, [views(*shape) for shape in shapes], closing),
        "pixel_values": noise(generator, 1, count, 3, 56, 56),
        "pixel_attention_mask": torch.ones(1, count, 56, 56, dtype=torch.int64),
    }


def _frames(generator: torch.Generator, closing: int, short: bool) -> Inputs:
    # Frames of a clip are images in one piece, with their time between them.
    count = 3 if short else 5
    return {
        "input_ids": prompt(generator, [views(0, 0)] * count, closing),
        "pixel_values": noise(generator, 1, count, 3, 56, 56),
        "pixel_attention_mask": torch.ones(1, count, 56, 56, dtype=torch.int64),
    }


def _idefics(config: Any, architecture: Any) -> Builder:
    def build(name: str, attention: str) -> Tiny:
        vision = {**tower(), "image_size": 56}
        settings = config(
            vision_config=vision,
            text_config=text_config("llama").to_dict(),
            image_token_id=IMAGE,
            scale_factor=2,
        )
        make: Maker = _frames if name.endswith("_frames") else _tiled
        return make_tiny(name, architecture, settings, attention, make)

    return build


_idefics3 = _idefics(transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration)
_smolvlm = _idefics(transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration)


def _gemma3(name: str, attention: str) -> Tiny:
    # The window is shorter than the prompt; that of `gemma3_long` is so long that layers forget.
    types = ["sliding_attention"] * 5
    types[1] = types[4] = "full_attention"
    config = transformers.Gemma3Config(
        vision_config=siglip(),
        text_config=text_config(
            "gemma3_text",
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=12,
            layer_types=types,
        ),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    images = {"gemma3": 4, "gemma3_long": 24}[name]

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        count = images // 2 if short else images
        span = [VISION_START, *[IMAGE] * 4, VISION_END]
        ids = prompt(generator, [span] * count, closing)
        return {
            "input_ids": ids,
            "pixel_values": noise(generator, count, 3, 56, 56),
            "token_type_ids": (ids == IMAGE).long(),
        }

    return make_tiny(name, transformers.Gemma3ForConditionalGeneration, config, attention, make)


FAMILIES: dict[str, Builder] = {"gemma3": _gemma3, "idefics3": _idefics3, "smolvlm": _smolvlm}

VARIANTS: dict[str, Builder] = {"gemma3_long": _gemma3, "smolvlm_frames": _smolvlm}
