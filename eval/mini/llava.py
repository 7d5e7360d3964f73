"""The second mini video model: a very small LLaVA-OneVision and its processor, built offline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
)

from tokenprune.eval.mini.architecture import Architecture
from tokenprune.eval.mini.model import FRAME_SIZE
from tokenprune.eval.mini.vocabulary import CHAT_TEMPLATE, TOKENS, build_tokenizer

__all__ = ["Llava", "build_model", "build_processor"]

PATCH, SIDE = 8, 64  # pixels; every picture is stretched to a square
PATCHES = (SIDE // PATCH) ** 2


def build_processor() -> LlavaOnevisionProcessor:
    """The processor of the mini model."""
    settings = {
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            **settings, image_grid_pinpoints=[[SIDE, SIDE]]
        ),
        tokenizer=build_tokenizer(),
        video_processor=LlavaOnevisionVideoProcessor(**settings),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )


def build_model(seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    """A freshly initialised mini model in float32."""
    width = 128
    ends = {"eos_token_id": TOKENS["<|end|>"], "pad_token_id": TOKENS["<|pad|>"]}
    config = LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(TOKENS),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            # Twice the usual width: one half of the 32 frequencies tells tokens and frames apart,
            # the other hardly turns over 64 frames and is free to compare content.
            "head_dim": 64,
            "max_position_embeddings": 16384,
            "initializer_range": 0.08,  # a model this small does not start to learn at 0.02
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            **ends,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_token_index=TOKENS["<|image_pad|>"],
        video_token_index=TOKENS["<|video_pad|>"],
        image_grid_pinpoints=[[SIDE, SIDE]],
        tie_word_embeddings=True,
        **ends,
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **ends)
    return model


class _Visual(nn.Module):
    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector


class _Language(nn.Module):
    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        super().__init__()
        self.decoder = model.model.language_model
        self.newline = model.model.image_newline


class Llava(Architecture):
    """The mini LLaVA-OneVision: one position per token, a newline token after the last frame."""

    frame_size = (SIDE, SIDE)
    grid = (SIDE // PATCH // 2, SIDE // PATCH // 2)  # the model halves both sides of a frame
    # Frames come as the held-out questions hold them, or large from a decoder.
    source_sizes = (FRAME_SIZE, (SIDE, SIDE))
    text_follows = True

    model: LlavaOnevisionForConditionalGeneration

    build_model = staticmethod(build_model)
    build_processor = staticmethod(build_processor)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._visual, self._language = _Visual(self.model), _Language(self.model)

    def use_training_attention(self) -> None:
        # On a tower's short rows the fused kernel's backward pass is ten times slower.
        self.model.model.vision_tower.config._attn_implementation = "eager"
        self.decoder.config._attn_implementation = "mini_by_question"

    @property
    def visual(self) -> nn.Module:
        return self._visual

    @property
    def feature_layer(self) -> nn.Linear:
        layer: nn.Linear = self.model.model.multi_modal_projector.linear_2
        return layer

    @property
    def language(self) -> nn.Module:
        return self._language

    def encode(self, frames: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        clip: Any = self.model.model.get_video_features(pixels[None], return_dict=True)
        # The newline comes behind them on newer releases of transformers.
        features: Tensor = clip.pooler_output[0, : len(frames) * self.frame_tokens]
        return features.view(len(frames), self.frame_tokens, -1)

    def ending(self) -> Tensor:
        newline = self.model.model.image_newline[None]
        return torch.cat([newline, self.embed("<|vision_end|>")])

    def positions(self, frames: int) -> tuple[Tensor, int]:
        count = len(self.opening) + frames * self.frame_tokens + len(self.ending())
        return torch.arange(count)[None], count
