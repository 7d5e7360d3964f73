"""Families built like LLaVA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.checkpoints.base import HALF, Maker, Saver, chat, shortest, square, tokenizer
from tokenprune.adapters.longva import convert
from tokenprune.testing.tiny import IMAGE, VIDEO, VISION_END, VISION_START
from tokenprune.testing.tiny.llava_kin import BREAK, TILE, TILE_GLOBAL


def _vipllava() -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**shortest(56)),
        tokenizer=tokenizer({IMAGE: "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat(image="<image>"),
    )


def _video_llava() -> Any:
    return transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(**shortest(56)),
        video_processor=transformers.VideoLlavaVideoProcessor(**shortest(56)),
        tokenizer=tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat(image="<image>", video="<video>"),
    )


def _pixtral(merge: int) -> Any:
    marks = {IMAGE: "[IMG]", BREAK: "[IMG_BREAK]", VISION_END: "[IMG_END]"}
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": 112}, patch_size=14 * merge
        ),
        tokenizer=tokenizer(marks),
        patch_size=14,
        spatial_merge_size=merge,
        chat_template=chat(image="[IMG]"),
    )


def _aya_vision() -> Any:
    marks = {
        IMAGE: "<|IMG_PATCH|>",
        VISION_START: "<|START_OF_IMG|>",
        VISION_END: "<|END_OF_IMG|>",
        TILE: "TILE",
        TILE_GLOBAL: "TILE_GLOBAL",
    }
    return transformers.AyaVisionProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=square(56), crop_to_patches=True, min_patches=1, max_patches=4, **HALF
        ),
        tokenizer=tokenizer(marks),
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template=chat(image="<image>"),
    )


def _perception_lm() -> Any:
    return transformers.PerceptionLMProcessor(
        image_processor=transformers.PerceptionLMImageProcessor(
            size=square(56), tile_size=56, max_num_tiles=4, **HALF
        ),
        video_processor=transformers.PerceptionLMVideoProcessor(size=square(56), **HALF),
        tokenizer=tokenizer(
            {IMAGE: "<image>", VIDEO: "<video>"}, image_token="<image>", video_token="<video>"
        ),
        patch_size=14,
        pooling_ratio=2,
        chat_template=chat(image="<image>", video="<video>"),
    )


def save_original_longva(model: Any, folder: Path) -> None:
    """Save a LongVA as its authors do: their names and settings, one more block in the tower."""
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
        name = name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")
        tower = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
        if name.startswith("model.vision_tower."):
            name = f"model.vision_tower.vision_tower.vision_model.{tower}"
        weights[name] = tensor.contiguous()
    blocks = model.config.vision_config.num_hidden_layers
    before, after = f".encoder.layers.{blocks - 1}.", f".encoder.layers.{blocks}."
    weights |= {
        name.replace(before, after): torch.randn_like(one)
        for name, one in weights.items()
        if before in name
    }
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = folder / f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, file)
    text = model.config.text_config
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    kept += ("rms_norm_eps", "tie_word_embeddings")
    settings = {name: getattr(text, name) for name in kept} | {
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "rope_theta": text.rope_parameters["rope_theta"],
        "torch_dtype": "float32",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        "mm_hidden_size": 32,
        "mm_patch_merge_type": "unires",
        "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_mode": "average",
        "mm_spatial_pool_stride": 2,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tiny/clip",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    model.generation_config.save_pretrained(folder)
    tokenizer({IMAGE: "<image>", VIDEO: "<video>"}).save_pretrained(folder)


def save_longva_tower(model: Any, folder: Path) -> None:
    """Save the settings of the tower that a LongVA names, as CLIP's own checkpoint has them."""
    vision = {**model.config.vision_config.to_dict()}
    vision["num_hidden_layers"] += 1
    del vision["model_args"]
    transformers.CLIPConfig(vision_config=vision).save_pretrained(folder)


def _save_longva(model: Any, folder: Path) -> None:
    original, tower = folder / "original", folder / "tower"
    save_original_longva(model, original)
    save_longva_tower(model, tower)
    save_file({"logit_scale": torch.zeros(())}, tower / "model.safetensors")
    convert(original, folder / "converted", tower)
    for file in (folder / "converted").iterdir():
        file.rename(folder / file.name)


CHECKPOINTS: dict[str, Maker] = {
    "aya_vision": _aya_vision,
    "longva": _perception_lm,  # which parts it has; the converter writes its own
    "llava_pixtral": lambda: _pixtral(1),
    "mistral3": lambda: _pixtral(2),
    "perception_lm": _perception_lm,
    "video_llava": _video_llava,
    "vipllava": _vipllava,
}
SAVERS: dict[str, Saver] = {"longva": _save_longva}
