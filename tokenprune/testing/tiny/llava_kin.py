"""Families built like LLaVA: ViP-LLaVA, Video-LLaVA, Mistral 3, Aya Vision, PerceptionLM."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from unittest import SkipTest

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
    clip,
    make_tiny,
    noise,
    prompt,
    siglip,
    text_config,
    tower,
)

TILE, TILE_GLOBAL = 158, 159
"""Aya Vision: what announces a tile, and the whole picture."""
BREAK = VISION_START
"""Mistral 3: what ends a line of a picture; `VISION_END` ends the last one."""


def _vipllava(name: str, attention: str) -> Tiny:
    config = transformers.VipLlavaConfig(
        vision_config=clip(),
        text_config=text_config("llama"),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, 1],
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        images = 1 if short else 2
        return {
            "input_ids": prompt(generator, [[IMAGE] * 16] * images, closing),
            "pixel_values": noise(generator, images, 3, 56, 56),
        }

    return make_tiny(name, transformers.VipLlavaForConditionalGeneration, config, attention, make)


def _video_llava(name: str, attention: str) -> Tiny:
    config = transformers.VideoLlavaConfig(
        vision_config=clip(),
        text_config=text_config("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    architecture = transformers.VideoLlavaForConditionalGeneration
    # Releases of transformers differ in the name.
    named = inspect.signature(architecture.forward).parameters
    images_name = "pixel_values" if "pixel_values" in named else "pixel_values_images"

    def video(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # All clips of a batch hold equally many frames: a class token and 4x4 patches each.
        return {
            "input_ids": prompt(generator, [[VIDEO] * (3 * 17)], closing),
            "pixel_values_videos": noise(generator, 1, 3, 3, 56, 56),
        }

    def both(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        images = 1 if short else 2
        return {
            "input_ids": prompt(
                generator,
                [[IMAGE] * 16, [VIDEO] * (2 * 17), *[[IMAGE] * 16] * (images - 1)],
                closing,
            ),
            images_name: noise(generator, images, 3, 56, 56),
            "pixel_values_videos": noise(generator, 1, 2, 3, 56, 56),
        }

    make = {"video_llava": both, "video_llava_video": video}[name]
    return make_tiny(name, architecture, config, attention, make)


def _mistral3(name: str, attention: str) -> Tiny:
    pixtral = transformers.PixtralVisionConfig(**{**tower(), "image_size": 112}, head_dim=8)
    config = transformers.Mistral3Config(
        vision_config=pixtral,
        text_config=text_config("mistral", sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # In patches: 4x6 and 6x4, or 2x8.
        sizes = [[28, 112]] if short else [[56, 84], [84, 56]]
        spans = []
        for height, width in sizes:
            lines = ([IMAGE] * (width // 28) + [BREAK]) * (height // 28)
            spans.append([*lines[:-1], VISION_END])
        return {
            "input_ids": prompt(generator, spans, closing),
            "pixel_values": noise(generator, len(sizes), 3, 84, 112),
            "image_sizes": torch.tensor(sizes),
        }

    return make_tiny(name, transformers.Mistral3ForConditionalGeneration, config, attention, make)


def _aya_vision(name: str, attention: str) -> Tiny:
    config = transformers.AyaVisionConfig(
        vision_config=siglip(),
        # Three of four layers look back no further than this.
        text_config=text_config("cohere2", sliding_window=12 if "windows" in name else 4096),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )

    def image(tiles: int) -> list[int]:
        """Tiles and the whole picture, or that alone: 2x2 tokens each."""
        parts = [[TILE, *[IMAGE] * 4] for _ in range(tiles)]
        return [VISION_START, *sum(parts, []), TILE_GLOBAL, *[IMAGE] * 4, VISION_END]

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        tiles = [2] if short else [4, 0, 2]
        views = sum(tiles) + len(tiles)
        return {
            "input_ids": prompt(generator, [image(count) for count in tiles], closing),
            "pixel_values": noise(generator, views, 3, 56, 56),
        }

    return make_tiny(name, transformers.AyaVisionForConditionalGeneration, config, attention, make)


def _perception_lm(name: str, attention: str) -> Tiny:
    if find_spec("timm") is None:
        raise SkipTest("the tower of PerceptionLM is one of timm's, which is not installed")
    arguments = {
        "embed_dim": 32,
        "img_size": (56, 56),
        "depth": 3,
        "num_heads": 4,
        "global_pool": "",
        "use_post_transformer_norm": False,
        "init_values": 0.1,
        "ref_feat_shape": (4, 4),
    }
    vision = transformers.TimmWrapperConfig(
        architecture="vit_pe_core_large_patch14_336", model_args=arguments
    )
    return _perceiving(name, attention, vision)


def _longva(name: str, attention: str) -> Tiny:
    vision = transformers.CLIPVisionConfig(**tower(), model_args={"embed_dim": 32})
    return _perceiving(name, attention, vision)


def _perceiving(name: str, attention: str, vision: object) -> Tiny:
    config = transformers.PerceptionLMConfig(
        vision_config=vision,
        text_config=text_config("qwen2" if name.startswith("longva") else "llama"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
    )

    def image(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # The whole picture and two tiles: 2x2 pooled tokens each.
        return {
            "input_ids": prompt(generator, [[IMAGE] * 12] * (1 if short else 2), closing),
            "pixel_values": noise(generator, 1 if short else 2, 3, 3, 56, 56),
        }

    def both(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # All clips of a batch hold equally many frames.
        return {
            "input_ids": prompt(generator, [[VIDEO] * 24, [IMAGE] * 8], closing),
            "pixel_values": noise(generator, 1, 2, 3, 56, 56),
            "pixel_values_videos": noise(generator, 1, 6, 3, 56, 56),
        }

    makers: dict[str, Maker] = {"longva": both, "perception_lm": both}
    architecture = transformers.PerceptionLMForConditionalGeneration
    return make_tiny(name, architecture, config, attention, makers.get(name, image))


FAMILIES: dict[str, Builder] = {
    "aya_vision": _aya_vision,
    "longva": _longva,
    "mistral3": _mistral3,
    "perception_lm": _perception_lm,
    "video_llava": _video_llava,
    "vipllava": _vipllava,
}

VARIANTS: dict[str, Builder] = {
    "aya_vision_windows": _aya_vision,
    "longva_image": _longva,
    "perception_lm_image": _perception_lm,
    "video_llava_video": _video_llava,
}
