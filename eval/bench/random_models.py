"""Models with random weights, built where they run, and prompts that hold one video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

__all__ = [
    "QWEN2_7B",
    "SO400M",
    "TEXT",
    "Model",
    "Settings",
    "build",
    "keep_layers",
    "llava_config",
    "llava_inputs",
    "qwen_config",
    "qwen_inputs",
]

Model: TypeAlias = LlavaOnevisionForConditionalGeneration | Qwen2_5_VLForConditionalGeneration
Settings: TypeAlias = dict[str, Any]
"""Arguments of a configuration of transformers."""

TEXT = 32  # tokens of a prompt beside its video
BEFORE = 8  # of them before it

SO400M: Settings = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
"""SigLIP-so400m without its last layer, as LLaVA-OneVision uses it."""

QWEN2_7B: Settings = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
"""The language model of Qwen2-7B, and of Qwen2.5-VL-7B."""


def build(
    config: LlavaOnevisionConfig | Qwen2_5_VLConfig,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Model:
    """A model whose weights are drawn on the device, which takes an accelerator a second.

    How weights are spread does not change the time that an answer takes.
    """
    architecture: Callable[[Any], Model] = (
        LlavaOnevisionForConditionalGeneration
        if isinstance(config, LlavaOnevisionConfig)
        else Qwen2_5_VLForConditionalGeneration
    )
    with init_empty_weights(include_buffers=False):  # buffers hold numbers that are computed
        model = architecture(config).eval()
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.empty(parameter.shape, dtype=dtype, device=device)
            if weight.ndim > 1:
                weight.normal_(std=0.02)
            else:  # of norms, most of them
                weight.fill_(0.0 if name == "bias" else 1.0)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    # A placeholder in an answer would look like media in the next forward.
    settings.suppress_tokens = sorted({config.image_token_id, config.video_token_id})
    return model


def keep_layers(model: Model, layers: int) -> None:
    """Leave a model its first decoder layers alone: enough to see what each of them costs."""
    language_model: Any = model.get_decoder()
    language_model.layers = language_model.layers[:layers]
    for config in (language_model.config, model.config.get_text_config()):
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]


def llava_config(
    text: Settings, vision: Settings, placeholders: tuple[int, int] | None = None
) -> LlavaOnevisionConfig:
    """A LLaVA-OneVision of a Qwen2 and a SigLIP.

    Args:
        text: Of the language model.
        vision: Of the tower.
        placeholders: Tokens of images and of videos; None for the last two of the vocabulary.
    """
    last = text["vocab_size"] - 1
    image, video = placeholders or (last - 1, last)
    side = vision["image_size"]
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=Qwen2Config(**text, tie_word_embeddings=False),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[side, side]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def llava_inputs(model: Model, frames: int) -> dict[str, Tensor]:
    """A prompt with one video of random pixels, a frame of 384 x 384 being 196 tokens."""
    config: Any = model.config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    tokens = frames * (-(-(side // patch) // 2)) ** 2 + 1  # and a newline
    pixels = _noise(model, 1, frames, 3, side, side)
    return _prompt(model, [config.video_token_id] * tokens) | {"pixel_values_videos": pixels}


def qwen_config(text: Settings, vision: Settings) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL; the last four tokens of its vocabulary are placeholders.

    Args:
        text: Of the language model.
        vision: Of the tower.
    """
    size = text["vocab_size"]
    width = text["hidden_size"] // text["num_attention_heads"] // 8
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [width, width * 3 // 2, width * 3 // 2],
    }
    return Qwen2_5_VLConfig(
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": False},
        image_token_id=size - 1,
        video_token_id=size - 2,
        vision_start_token_id=size - 3,
        vision_end_token_id=size - 4,
        tie_word_embeddings=False,
    )


def qwen_inputs(model: Model, frames: int, side: int = 32) -> dict[str, Tensor]:
    """A prompt with one video of random pixels.

    Args:
        model: A Qwen2.5-VL.
        frames: Pairs of pictures: its tower joins two.
        side: Patches along a side of them; four patches are a token.
    """
    config: Any = model.config
    vision, video = config.vision_config, config.video_token_id
    tokens = frames * (side // vision.spatial_merge_size) ** 2
    ends = config.vision_start_token_id, config.vision_end_token_id
    prompt = _prompt(model, [ends[0], *[video] * tokens, ends[1]])
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return prompt | {
        "pixel_values_videos": _noise(model, frames * side**2, width),
        "video_grid_thw": torch.tensor([[frames, side, side]], device=model.device),
        "second_per_grid_ts": torch.ones(1, device=model.device),
        "mm_token_type_ids": 2 * (prompt["input_ids"] == video).int(),
    }


def _prompt(model: Model, media: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    most = min(1000, model.config.get_text_config().vocab_size - 10)
    text = torch.randint(5, most, (TEXT,), generator=generator)
    ids = torch.cat([text[:BEFORE], torch.tensor(media), text[BEFORE:]])[None]
    ids = ids.to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _noise(model: Model, *shape: int) -> Tensor:
    """Between -1 and 1, drawn on the device."""
    generator = torch.Generator(model.device).manual_seed(0)
    noise = torch.rand(*shape, generator=generator, device=model.device, dtype=model.dtype)
    return noise * 2 - 1
