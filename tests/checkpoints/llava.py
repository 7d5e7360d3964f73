"""Families on CLIP, SigLIP and InternViT towers."""

from __future__ import annotations

from typing import Any

import transformers

from tests.checkpoints.base import HALF, IMAGENET, Maker, chat, shortest, square, tokenizer
from tokenprune.testing.tiny import IMAGE, PINPOINTS, VIDEO, VISION_END, VISION_START


def _llava() -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**shortest(56)),
        tokenizer=tokenizer({IMAGE: "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat(image="<image>"),
    )


def _llava_next() -> Any:
    return transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            **shortest(56), image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer({IMAGE: "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat(image="<image>"),
    )


def _llava_next_video() -> Any:
    return transformers.LlavaNextVideoProcessor(
        video_processor=transformers.LlavaNextVideoVideoProcessor(**shortest(56)),
        image_processor=transformers.LlavaNextImageProcessor(
            **shortest(56), image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat(image="<image>", video="<video>"),
    )


def _llava_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=square(56), image_grid_pinpoints=[*PINPOINTS, [224, 112]], **HALF
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=square(56), **HALF),
        tokenizer=tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        chat_template=chat(image="<image>", video="<video>"),
    )


def _internvl() -> Any:
    marks = {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", VISION_START: "<img>", VISION_END: "</img>"}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=square(84), crop_to_patches=True, min_patches=1, max_patches=4, **IMAGENET
        ),
        video_processor=transformers.InternVLVideoProcessor(size=square(84), **IMAGENET),
        tokenizer=tokenizer(
            marks,
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        image_seq_length=9,
        chat_template=chat(image="<IMG_CONTEXT>", video="<video>"),
    )


CHECKPOINTS: dict[str, Maker] = {
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
}
