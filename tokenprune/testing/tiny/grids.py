"""Families whose towers take pictures of any size, besides those of `qwen`."""

from __future__ import annotations

import torch
import transformers

from tokenprune.testing.tiny.base import (
    IMAGE,
    SPECIAL,
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
    noise,
    patches,
    prompt,
    text_config,
)
from tokenprune.testing.tiny.qwen import QWEN_TOKENS, qwen_inputs

VIDEO_START, VIDEO_END = 158, 159


def _qwen3_vl_moe(name: str, attention: str) -> Tiny:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 14,
        "deepstack_visual_indexes": [0, 2],
        "num_position_embeddings": 64,
    }
    text = text_config(
        "qwen3_vl_moe_text",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=56,
        **mrope(),
    ).to_dict()
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    make = qwen_inputs(timestamps=True)
    return make_tiny(name, transformers.Qwen3VLMoeForConditionalGeneration, config, attention, make)


def _glm4v(name: str, attention: str) -> Tiny:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 14,
        "image_size": 112,
    }
    config = transformers.Glm4vConfig(
        text_config=text_config("glm4v_text", **mrope()).to_dict(),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )

    def image(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        grids = [(1, 4, 8)] if short else [(1, 8, 12), (1, 4, 4)]
        spans = [[VISION_START] + [IMAGE] * merged(grid) + [VISION_END] for grid in grids]
        ids = prompt(generator, spans, closing)
        return {
            "input_ids": ids,
            "pixel_values": patches(generator, grids),
            "image_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }

    def video(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # A frame is marked as an image is, with its second after it; all are within one clip.
        grid = (2, 4, 8) if short else (4, 4, 8)
        frame = [VISION_START] + [IMAGE] * (merged(grid) // grid[0]) + [VISION_END]
        span = [VIDEO_START]
        for second in range(grid[0]):
            span += [*frame, 10 + second]
        ids = prompt(generator, [[*span, VIDEO_END]], closing)
        return {
            "input_ids": ids,
            "pixel_values_videos": patches(generator, [grid]),
            "video_grid_thw": torch.tensor([grid]),
            "mm_token_type_ids": 2 * (ids == IMAGE).int(),
        }

    make = video if name == "glm4v_video" else image
    return make_tiny(name, transformers.Glm4vForConditionalGeneration, config, attention, make)


def _video_llama_3(name: str, attention: str) -> Tiny:
    vision = transformers.VideoLlama3VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        patch_size=14,
    )
    config = transformers.VideoLlama3Config(
        text_config=text_config("qwen2"),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )

    def pixels(generator: torch.Generator, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        return noise(generator, sum(t * h * w for t, h, w in grids), 3 * 14 * 14)

    def frames(tokens: list[int]) -> list[list[int]]:
        # The frame's time is text before it: all but the first follow a comma of their own.
        return [[11, *[VIDEO] * count] for count in tokens]

    def video(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        grid = (2, 4, 8) if short else (4, 4, 8)
        return {
            "input_ids": prompt(generator, frames([merged((1, *grid[1:]))] * grid[0]), closing),
            "pixel_values_videos": pixels(generator, [grid]),
            "video_grid_thw": torch.tensor([grid]),
            "video_merge_sizes": torch.tensor([2]),
            "video_compression_mask": torch.ones(merged(grid), dtype=torch.bool),
        }

    def compressed(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # The processor has left out what does not move: tokens 1, 4 and 7 after the first frame.
        inputs = video(generator, closing, short)
        mask = inputs["video_compression_mask"].view(-1, 8)
        mask[1:, 1::3] = False
        spans = frames(mask.sum(dim=1).tolist())
        return {**inputs, "input_ids": prompt(generator, spans, closing)}

    def image(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # Images are not merged, clips are.
        grids = [(1, 4, 6)] if short else [(1, 4, 6), (1, 6, 4)]
        clip = (2, 4, 8)
        spans = [[IMAGE] * (h * w) for _, h, w in grids] + frames([8] * clip[0])
        return {
            "input_ids": prompt(generator, spans, closing),
            "pixel_values": pixels(generator, grids),
            "image_grid_thw": torch.tensor(grids),
            "image_merge_sizes": torch.tensor([1] * len(grids)),
            "pixel_values_videos": pixels(generator, [clip]),
            "video_grid_thw": torch.tensor([clip]),
            "video_merge_sizes": torch.tensor([2]),
            "video_compression_mask": torch.ones(16, dtype=torch.bool),
        }

    makers: dict[str, Maker] = {
        "video_llama_3": video,
        "video_llama_3_compressed": compressed,
        "video_llama_3_image": image,
    }
    architecture = transformers.VideoLlama3ForConditionalGeneration
    return make_tiny(name, architecture, config, attention, makers[name])


assert {VIDEO_START, VIDEO_END} <= set(SPECIAL)

FAMILIES: dict[str, Builder] = {
    "glm4v": _glm4v,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "video_llama_3": _video_llama_3,
}

VARIANTS: dict[str, Builder] = {
    "glm4v_video": _glm4v,
    "video_llama_3_compressed": _video_llama_3,
    "video_llama_3_image": _video_llama_3,
}
