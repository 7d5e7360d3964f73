"""Families that hear: windows, Q-Formers, and sound between the frames of a clip."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tokenprune.testing.tiny.base import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
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


def sound(tokens: int) -> list[int]:
    """Placeholders of a sound, between its marks."""
    return [AUDIO_START] + [AUDIO] * tokens + [AUDIO_END]


def mask_of(lengths: list[int], longest: int) -> Tensor:
    """`[n, longest]`: 1 where a sound has features, 0 where it is padded."""
    return (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


def whisper(**settings: Any) -> dict[str, Any]:
    """Settings of an encoder like that of Whisper."""
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_mel_bins": 16,
        **settings,
    }


def _audioflamingo3(name: str, attention: str) -> Tiny:
    audio = whisper(model_type="audioflamingo3_encoder", max_source_positions=50)
    config = transformers.AudioFlamingo3Config(
        audio_config=audio, text_config=text_config("qwen2").to_dict(), audio_token_id=AUDIO
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # A window is 100 mel frames and 25 tokens; the first sound fills two and part of a third.
        lengths = [48] if short else [100, 100, 30, 60]
        sounds = [12] if short else [25 + 25 + 7, 15]
        mask = mask_of(lengths, 100)
        return {
            "input_ids": prompt(generator, [sound(tokens) for tokens in sounds], closing),
            "input_features": noise(generator, len(mask), 16, 100) * mask[:, None],
            "input_features_mask": mask,
        }

    architecture = transformers.AudioFlamingo3ForConditionalGeneration
    return make_tiny(name, architecture, config, attention, make)


def _voxtral(name: str, attention: str) -> Tiny:
    # A window is 80 mel frames and 40 states, four of which are one token.
    audio = whisper(model_type="voxtral_encoder", max_source_positions=40, intermediate_size=128)
    config = transformers.VoxtralConfig(
        audio_config=audio,
        text_config=text_config("llama", head_dim=16).to_dict(),
        audio_token_id=AUDIO,
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        windows = [1] if short else [3, 1]
        spans = [[AUDIO_START] + [AUDIO] * (10 * count) for count in windows]
        return {
            "input_ids": prompt(generator, spans, closing),
            "input_features": noise(generator, sum(windows), 16, 80),
        }

    architecture = transformers.VoxtralForConditionalGeneration
    return make_tiny(name, architecture, config, attention, make)


def _granite_speech(name: str, attention: str) -> Tiny:
    encoder = {
        "input_dim": 16,
        "num_layers": 2,
        "hidden_dim": 32,
        "num_heads": 4,
        "dim_head": 8,
        "output_dim": 10,
        "context_size": 20,
        "max_pos_emb": 32,
    }
    projector = {
        "model_type": "blip_2_qformer",
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "cross_attention_frequency": 1,
    }
    config = transformers.GraniteSpeechConfig(
        text_config=text_config("granite").to_dict(),
        encoder_config=encoder,
        projector_config=projector,
        audio_token_index=AUDIO,
        has_lora_adapter=False,
        tie_word_embeddings=False,
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # Three tokens a window of 15 states. The tower sees padding, so that all sounds that are
        # to be batched must be padded to one length.
        tokens = [9] if short else [15, 12]
        return {
            "input_ids": prompt(generator, [[AUDIO] * count for count in tokens], closing),
            "input_features": noise(generator, len(tokens), 70, 16),
            "input_features_mask": mask_of(tokens, 15).bool(),
        }

    architecture = transformers.GraniteSpeechForConditionalGeneration
    return make_tiny(name, architecture, config, attention, make)


def _phi4_multimodal(name: str, attention: str) -> Tiny:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "crop_size": 56,
        "patch_size": 14,
        "image_token_id": IMAGE,
    }
    audio = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_blocks": 2,
        "num_attention_heads": 4,
        "input_size": 16,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
        "audio_token_id": AUDIO,
    }
    config = transformers.Phi4MultimodalConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=[VOCABULARY - 1],
        vision_config=vision,
        audio_config=audio,
    )

    def image(generator: torch.Generator, short: bool) -> tuple[list[int], Inputs]:
        # 2x2 tiles of 4x4 patches, the lower half of the lower ones padding: 3 lines of 4 tokens;
        # or one tile, and views of zeros that fill up a batch. Then the whole: 2 lines of 2.
        size, lines = ([56, 56], (2, 2)) if short else ([112, 112], (3, 4))
        mask = torch.ones(1, 5, 4, 4)
        pixels = noise(generator, 1, 5, 3, 56, 56)
        # Some padding in each: the tower attends causally where transformers gives it no mask.
        if short:
            pixels[:, 2:] = 0
            mask[:, 1, 3:] = 0
        else:
            mask[:, 3:, 2:] = 0
        tokens = lines[0] * (lines[1] + 1) + 1 + 2 * (2 + 1)
        return [IMAGE] * tokens, {
            "image_pixel_values": pixels,
            "image_sizes": torch.tensor([size]),
            "image_attention_mask": mask,
        }

    def sounds(generator: torch.Generator, tokens: list[int]) -> tuple[list[list[int]], Inputs]:
        # Eight mel frames a token. The tower sees padding here, too.
        features: Inputs = {
            "audio_input_features": noise(generator, len(tokens), 120, 16),
            "audio_embed_sizes": torch.tensor(tokens),
            "audio_attention_mask": mask_of([8 * count for count in tokens], 120).bool(),
        }
        return [[AUDIO] * count for count in tokens], features

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        several = [15, 12] if name == "phi4_multimodal_sounds" else [12]
        seen, pictures = image(generator, short)
        heard, features = sounds(generator, [9] if short else several)
        ids = prompt(generator, [seen, *heard], closing)
        return {"input_ids": ids, **pictures, **features}

    return make_tiny(name, transformers.Phi4MultimodalForCausalLM, config, attention, make)


def _qwen3_omni_moe(name: str, attention: str) -> Tiny:
    omni = transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 16,
        "max_source_positions": 100,
        "n_window": 50,
        "n_window_infer": 200,
        "output_dim": 64,
        "downsample_hidden_size": 8,
    }
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
    text = text_config(
        omni.Qwen3OmniMoeTextConfig,
        moe_intermediate_size=48,
        num_experts=6,
        num_experts_per_tok=2,
        mlp_only_layers=[0, 1, 3, 4],  # experts alone answer with the same token over and over
        **mrope(),
    )
    config = omni.Qwen3OmniMoeThinkerConfig(
        audio_config=audio,
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        position_id_per_seconds=13,
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # 13 tokens a second of sound, of which the last is cut short: 30 mel frames are four.
        frames = 2 if short else 3
        mel, tokens = (148, 19) if short else (230, 30)
        grid = (frames, 4, 8)
        if name == "qwen3_omni_moe_interleaved":
            # Each second its frame, then its sound.
            inner: list[int] = []
            for second in range(frames):
                inner += [VIDEO] * 8 + [AUDIO] * min(13, tokens - 13 * second)
            spans = [[VISION_START, AUDIO_START, *inner, AUDIO_END, VISION_END]]
        else:
            spans = [[VISION_START] + [VIDEO] * merged(grid) + [VISION_END], sound(tokens)]
        ids = prompt(generator, spans, closing)
        inputs: Inputs = {
            "input_ids": ids,
            "pixel_values_videos": patches(generator, [grid]),
            "video_grid_thw": torch.tensor([grid]),
            "video_second_per_grid": torch.tensor([1.0]),
            "input_features": noise(generator, 1, 16, mel),
            "feature_attention_mask": torch.ones(1, mel, dtype=torch.int64),
        }
        if name == "qwen3_omni_moe_interleaved":
            inputs["use_audio_in_video"] = True
        return inputs

    architecture = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    return make_tiny(name, architecture, config, attention, make)


FAMILIES: dict[str, Builder] = {
    "audioflamingo3": _audioflamingo3,
    "granite_speech": _granite_speech,
    "phi4_multimodal": _phi4_multimodal,
    "qwen3_omni_moe": _qwen3_omni_moe,
    "voxtral": _voxtral,
}

VARIANTS: dict[str, Builder] = {
    "phi4_multimodal_sounds": _phi4_multimodal,
    "qwen3_omni_moe_interleaved": _qwen3_omni_moe,
}
