"""Qwen families that see."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tokenprune.testing.tiny.base import (
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    Builder,
    Inputs,
    Maker,
    Tiny,
    make_tiny,
    merged,
    mrope,
    patches,
    prompt,
    text_config,
)
from tokenprune.testing.tiny.releases import OLD

QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def qwen_inputs(*, timestamps: bool = False, image: bool = True, seconds: str = "") -> Maker:
    """Prompts as Qwen's processors make them.

    Args:
        timestamps: Whether each frame of a clip is marked by itself.
        image: Whether there is an image before the clip.
        seconds: What the model calls the seconds between frames; "" if it is not told.
    """

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        images = [(1, 4, 8) if short else (1, 8, 12)] if image else []
        videos = [(2, 4, 8)] if short else [(4, 4, 8)]
        spans = [[VISION_START] + [IMAGE] * merged(grid) + [VISION_END] for grid in images]
        for grid in videos:
            parts = [(1, *grid[1:])] * grid[0] if timestamps else [grid]
            spans += [[VISION_START] + [VIDEO] * merged(part) + [VISION_END] for part in parts]
        ids = prompt(generator, spans, closing)
        inputs: Inputs = {"input_ids": ids}
        if image:
            inputs["pixel_values"] = patches(generator, images)
            inputs["image_grid_thw"] = torch.tensor(images)
        inputs["pixel_values_videos"] = patches(generator, videos)
        inputs["video_grid_thw"] = torch.tensor(videos)
        if seconds:
            inputs[seconds] = torch.tensor([0.5] if short else [1.0])
        return {**inputs, "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}

    return make


def _qwen2_vl(name: str, attention: str) -> Tiny:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    text = text_config("qwen2_vl_text", **mrope()).to_dict()
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    architecture = transformers.Qwen2VLForConditionalGeneration
    return make_tiny(name, architecture, config, attention, qwen_inputs())


def windows() -> dict[str, Any]:
    """A tower whose first block attends within windows of 4x4 patches."""
    return {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 14,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }


def _qwen2_5_vl(name: str, attention: str) -> Tiny:
    text = text_config("qwen2_5_vl_text", **mrope()).to_dict()
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=windows(), **QWEN_TOKENS)
    image = name != "qwen2_5_vl_video"
    # Older releases of transformers take the seconds of clips for those of images too.
    seconds = "" if image and OLD else "second_per_grid_ts"
    make = qwen_inputs(seconds=seconds, image=image)
    architecture = transformers.Qwen2_5_VLForConditionalGeneration
    return make_tiny(name, architecture, config, attention, make)


def _qwen3_vl(name: str, attention: str) -> Tiny:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 14,
        "deepstack_visual_indexes": [0, 1, 2],
        "num_position_embeddings": 64,
    }
    text = text_config("qwen3_vl_text", head_dim=16, **mrope()).to_dict()
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    make = qwen_inputs(timestamps=True, image=name != "qwen3_vl_video")
    return make_tiny(name, transformers.Qwen3VLForConditionalGeneration, config, attention, make)


FAMILIES: dict[str, Builder] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
}

VARIANTS: dict[str, Builder] = {
    "qwen2_5_vl_video": _qwen2_5_vl,
    "qwen3_vl_video": _qwen3_vl,
}
