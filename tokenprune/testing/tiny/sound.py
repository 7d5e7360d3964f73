"""Families that hear."""

from __future__ import annotations

import torch
import transformers

from tokenprune.testing.tiny.base import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    Builder,
    Inputs,
    Tiny,
    make_tiny,
    merged,
    mrope,
    noise,
    patches,
    prompt,
    text_config,
)
from tokenprune.testing.tiny.qwen import windows


def _qwen2_audio(name: str, attention: str) -> Tiny:
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 16,
        "max_source_positions": 50,
    }
    config = transformers.Qwen2AudioConfig(
        audio_config=audio, text_config=text_config("qwen2").to_dict(), audio_token_index=AUDIO
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # 80 mel frames are 40 after the convolution and 20 tokens after the pooling.
        frames = [48] if short else [80, 60]
        mask = torch.zeros(len(frames), 100, dtype=torch.int64)
        for row, count in zip(mask, frames, strict=True):
            row[:count] = 1
        spans = [[AUDIO_START] + [AUDIO] * (count // 4) + [AUDIO_END] for count in frames]
        return {
            "input_ids": prompt(generator, spans, closing),
            "input_features": noise(generator, len(frames), 16, 100) * mask[:, None],
            "feature_attention_mask": mask,
        }

    return make_tiny(name, transformers.Qwen2AudioForConditionalGeneration, config, attention, make)


def _qwen2_5_omni(name: str, attention: str) -> Tiny:
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 16,
        "max_source_positions": 100,
        "n_window": 10,
        "output_dim": 64,
    }
    omni = transformers.models.qwen2_5_omni.configuration_qwen2_5_omni
    config = omni.Qwen2_5OmniThinkerConfig(
        audio_config=audio,
        vision_config=windows(),
        text_config=text_config(omni.Qwen2_5OmniTextConfig, **mrope()).to_dict(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        position_id_per_seconds=25,
        seconds_per_chunk=1,
    )

    def interleaved(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # The sound track of a clip with a frame a second, as `use_audio_in_video` wants it: each
        # second its frame, then its 25 tokens of sound.
        grid, frames, chunks = ((2, 4, 8), 48, [12]) if short else ((3, 4, 8), 120, [25, 5])
        span = [VISION_START, AUDIO_START]
        for second in range(grid[0]):
            span += [VIDEO] * 8 + [AUDIO] * sum(chunks[second : second + 1])
        span += [AUDIO_END, VISION_END]
        return {
            "input_ids": prompt(generator, [span], closing),
            "pixel_values_videos": patches(generator, [grid]),
            "video_grid_thw": torch.tensor([grid]),
            "video_second_per_grid": torch.tensor([1.0]),
            "input_features": noise(generator, 1, 16, frames),
            "feature_attention_mask": torch.ones(1, frames, dtype=torch.int64),
            "use_audio_in_video": True,
        }

    def separate(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        grid, frames = ((2, 4, 8), 48) if short else ((3, 4, 8), 80)
        spans = [
            [VISION_START] + [VIDEO] * merged(grid) + [VISION_END],
            [AUDIO_START] + [AUDIO] * (frames // 4) + [AUDIO_END],
        ]
        return {
            "input_ids": prompt(generator, spans, closing),
            "pixel_values_videos": patches(generator, [grid]),
            "video_grid_thw": torch.tensor([grid]),
            "video_second_per_grid": torch.tensor([1.0]),
            "input_features": noise(generator, 1, 16, frames),
            "feature_attention_mask": torch.ones(1, frames, dtype=torch.int64),
        }

    make = interleaved if name == "qwen2_5_omni_interleaved" else separate
    architecture = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    return make_tiny(name, architecture, config, attention, make)


FAMILIES: dict[str, Builder] = {
    "qwen2_5_omni": _qwen2_5_omni,
    "qwen2_audio": _qwen2_audio,
}

VARIANTS: dict[str, Builder] = {
    "qwen2_5_omni_interleaved": _qwen2_5_omni,
}
