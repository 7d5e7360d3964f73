"""Families on CLIP, SigLIP, Pixtral and InternViT towers."""

from __future__ import annotations

import torch
import transformers

from tokenprune.testing.tiny.base import (
    IMAGE,
    PINPOINTS,
    VIDEO,
    VISION_END,
    VISION_START,
    Builder,
    Inputs,
    Maker,
    Tiny,
    anyres,
    clip,
    make_tiny,
    noise,
    prompt,
    siglip,
    text_config,
    tower,
)


def _llava(name: str, attention: str) -> Tiny:
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=text_config("llama"), image_token_index=IMAGE
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        images = 1 if short else 2
        return {
            "input_ids": prompt(generator, [[IMAGE] * 16] * images, closing),
            "pixel_values": noise(generator, images, 3, 56, 56),
        }

    return make_tiny(name, transformers.LlavaForConditionalGeneration, config, attention, make)


def _llava_pixtral(name: str, attention: str) -> Tiny:
    tower = transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=8,
        image_size=112,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=text_config("mistral", sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        sizes = [[42, 56]] if short else [[56, 70], [28, 42]]
        spans = [[IMAGE] * (height // 14 * (width // 14)) for height, width in sizes]
        return {
            "input_ids": prompt(generator, spans, closing),
            "pixel_values": noise(generator, len(sizes), 3, 56, 70),
            "image_sizes": torch.tensor(sizes),
        }

    return make_tiny(name, transformers.LlavaForConditionalGeneration, config, attention, make)


def _llava_next(name: str, attention: str) -> Tiny:
    config = transformers.LlavaNextConfig(
        vision_config=clip(),
        text_config=text_config("mistral", sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return make_tiny(
        name, transformers.LlavaNextForConditionalGeneration, config, attention, anyres
    )


def _llava_onevision(name: str, attention: str) -> Tiny:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=text_config("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[*PINPOINTS, [224, 112]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_1",
    )

    def video(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # All clips of a batch hold equally many frames: 2x2 pooled tokens each, then a newline.
        return {
            "input_ids": prompt(generator, [[VIDEO] * (6 * 4 + 1)], closing),
            "pixel_values_videos": noise(generator, 1, 6, 3, 56, 56),
        }

    def image(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # 180x112 goes to 4x2 tiles, 16x8 patches, 12 rows of them hold the picture; over one
        # tile's worth ("anyres_max_1") they are shrunk by sqrt(12 * 8 / 16), to 4x3.
        # 56x56 goes to 1x2 tiles, 4x8 patches, 4 columns of them hold the picture.
        size, tokens, tiles = [180, 112], 16 + 4 * (3 + 1), 9
        if short:
            size, tokens, tiles = [56, 56], 16 + 4 * (4 + 1), 3
        return {
            "input_ids": prompt(generator, [[IMAGE] * tokens], closing),
            "pixel_values": noise(generator, 1, tiles, 3, 56, 56),
            "image_sizes": torch.tensor([size]),
            "batch_num_images": torch.tensor([1]),
        }

    def images(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # Several images of one sample are not tiled: one view and a newline each.
        count = 2 if short else 3
        return {
            "input_ids": prompt(generator, [[IMAGE] * 17] * count, closing),
            "pixel_values": noise(generator, count, 1, 3, 56, 56),
            "image_sizes": torch.tensor([[90, 112]] * count),
            "batch_num_images": torch.tensor([count]),
        }

    makers: dict[str, Maker] = {
        "llava_onevision": video,
        "llava_onevision_image": image,
        "llava_onevision_images": images,
    }
    architecture = transformers.LlavaOnevisionForConditionalGeneration
    return make_tiny(name, architecture, config, attention, makers[name])


def _llava_next_video(name: str, attention: str) -> Tiny:
    config = transformers.LlavaNextVideoConfig(
        vision_config=clip(),
        text_config=text_config("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        spatial_pool_mode="average",
        spatial_pool_stride=2,
    )

    def video(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # All clips of a batch hold equally many frames: 2x2 pooled tokens each.
        return {
            "input_ids": prompt(generator, [[VIDEO] * 24], closing),
            "pixel_values_videos": noise(generator, 1, 6, 3, 56, 56),
        }

    make = {"llava_next_video": video, "llava_next_video_image": anyres}[name]
    architecture = transformers.LlavaNextVideoForConditionalGeneration
    return make_tiny(name, architecture, config, attention, make)


def _internvl(name: str, attention: str) -> Tiny:
    vision = {**tower(), "image_size": [84, 84], "patch_size": [14, 14]}
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text_config("qwen2"),
        image_token_id=IMAGE,
        image_seq_length=9,
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # An image of two tiles and a thumbnail, then frames of a video; 3x3 tokens each.
        tiles = [3, 1] if short else [3, 1, 1, 1]
        spans = [[VISION_START] + [IMAGE] * (9 * count) + [VISION_END] for count in tiles]
        return {
            "input_ids": prompt(generator, spans, closing),
            "pixel_values": noise(generator, sum(tiles), 3, 84, 84),
        }

    return make_tiny(name, transformers.InternVLForConditionalGeneration, config, attention, make)


FAMILIES: dict[str, Builder] = {
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
}

VARIANTS: dict[str, Builder] = {
    "llava_next_video_image": _llava_next_video,
    "llava_onevision_image": _llava_onevision,
    "llava_onevision_images": _llava_onevision,
    "llava_pixtral": _llava_pixtral,
}
