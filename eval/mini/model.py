"""The mini video model: a very small Qwen2.5-VL and its processor, both built offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from tokenprune.eval.mini.architecture import Architecture
from tokenprune.eval.mini.vocabulary import CHAT_TEMPLATE, TOKENS, build_tokenizer

__all__ = ["FRAME_SIZE", "FRAME_TOKENS", "Qwen", "build_model", "build_processor", "save"]

PATCH, MERGE = 8, 2
FRAME_SIZE = (48, 96)  # height, width after the video processor, for 16:9 pictures
FRAME_TOKENS = (FRAME_SIZE[0] // PATCH // MERGE) * (FRAME_SIZE[1] // PATCH // MERGE)
FRAME_PATCHES = FRAME_TOKENS * MERGE * MERGE
# Brings 16:9 pictures to 48x96, square ones to 64x64, 4:3 ones to 64x80.
PIXELS = {"shortest_edge": 4096, "longest_edge": 6144}


def build_processor() -> Qwen2VLProcessor:
    """The processor of the mini model; one frame is one step in time.

    It is Qwen2-VL's, which tells the model no seconds between frames: temporal positions count
    frames, so that "the frame before" is one step back whatever the sampling, and order can be
    learnt by a model this small.
    """
    settings = {
        "size": dict(PIXELS),
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 1,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**settings, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised mini model in float32."""
    width = 128
    ends = {"eos_token_id": TOKENS["<|end|>"], "pad_token_id": TOKENS["<|pad|>"]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(TOKENS),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16384,
            "initializer_range": 0.08,  # a model this small does not start to learn at 0.02
            "tie_word_embeddings": True,
            "bos_token_id": None,
            # The slowest of the eight temporal frequencies turns half round in 480 seconds.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100000.0,
                "mrope_section": [8, 4, 4],
            },
            **ends,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
            "tokens_per_second": 1,
            "window_size": 8 * PATCH * MERGE,
            "fullatt_block_indexes": [0, 1, 2, 3],
            "out_hidden_size": width,
            "initializer_range": 0.04,
        },
        image_token_id=TOKENS["<|image_pad|>"],
        video_token_id=TOKENS["<|video_pad|>"],
        vision_start_token_id=TOKENS["<|vision_start|>"],
        vision_end_token_id=TOKENS["<|vision_end|>"],
        tie_word_embeddings=True,
        **ends,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **ends)
    return model


def save(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write weights in float16, configuration and processor to `folder`."""
    Qwen(model).save(folder)


def _attention_by_frame(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Full attention inside each frame, all frames in one call: training only.

    The model's own path calls the kernel once per frame.
    """

    def fold(x: Tensor) -> Tensor:  # [1, heads, frames * patches, d] -> [frames, heads, patches, d]
        by_frame: Tensor = x[0].unflatten(1, (-1, FRAME_PATCHES))  # type: ignore[no-untyped-call]
        return by_frame.transpose(0, 1)

    # Written out: on these short rows the fused kernel's backward pass is ten times slower.
    scale: float = query.shape[-1] ** -0.5
    weights = (fold(query) * scale @ fold(key).transpose(-1, -2)).softmax(-1)
    out = weights.to(value.dtype) @ fold(value)
    return out.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register("mini_by_frame", _attention_by_frame)
AttentionMaskInterface.register("mini_by_frame", lambda *_, **__: None)


class Qwen(Architecture):
    """The mini Qwen2.5-VL: positions in time, height and width; the text's lie amid the frames'."""

    frame_size = FRAME_SIZE
    grid = (FRAME_SIZE[0] // PATCH // MERGE, FRAME_SIZE[1] // PATCH // MERGE)
    source_sizes = (FRAME_SIZE,)
    text_follows = False

    model: Qwen2_5_VLForConditionalGeneration

    build_model = staticmethod(build_model)
    build_processor = staticmethod(build_processor)

    def use_training_attention(self) -> None:
        self.visual.config._attn_implementation = "mini_by_frame"
        self.decoder.config._attn_implementation = "mini_by_question"

    @property
    def visual(self) -> Any:
        return self.model.model.visual

    @property
    def feature_layer(self) -> nn.Linear:
        layer: nn.Linear = self.visual.merger.mlp[2]
        return layer

    @property
    def language(self) -> nn.Module:
        language: nn.Module = self.model.model.language_model
        return language

    def encode(self, frames: NDArray[np.uint8]) -> Tensor:
        pixels = patches(frames)
        grid = torch.tensor([[len(frames), FRAME_SIZE[0] // PATCH, FRAME_SIZE[1] // PATCH]])
        whole = torch.tensor([0, len(pixels)], dtype=torch.int32)
        features: Tensor = self.visual(pixels, grid, cu_seqlens=whole).pooler_output
        return features.view(len(frames), FRAME_TOKENS, -1)

    def ending(self) -> Tensor:
        return self.embed("<|vision_end|>")

    def positions(self, frames: int) -> tuple[Tensor, int]:
        video = TOKENS["<|video_pad|>"]
        opening = [TOKENS[word] for word in self.opening]
        after = [TOKENS["<|vision_end|>"], TOKENS["<|unk|>"]]
        ids = torch.tensor([[*opening, *[video] * (frames * FRAME_TOKENS), *after]])
        height, width = (side // PATCH for side in FRAME_SIZE)
        positions, _ = self.model.model.get_rope_index(
            ids,
            2 * (ids == video).int(),
            video_grid_thw=torch.tensor([[frames, height, width]]),
            second_per_grid_ts=torch.ones(1),  # the processor tells no seconds
        )
        return positions[:, 0, :-1], int(positions[0, 0, -1])


def patches(frames: NDArray[np.uint8]) -> Tensor:
    """The video processor's patches of frames `[n, 48, 96, 3]`: `[n * 72, 192]`."""
    n, height, width, _ = frames.shape
    step = PATCH * MERGE
    pixels = torch.from_numpy(frames).float() / 127.5 - 1
    grid = pixels.view(n, height // step, MERGE, PATCH, width // step, MERGE, PATCH, 3)
    return grid.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * PATCH * PATCH)
