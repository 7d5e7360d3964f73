"""Tiny random models of every family, and prompts for them.

`build("qwen2_vl")` returns a model of five decoder layers and grouped key-value heads, whose
weights are lively enough that dropping tokens visibly moves its logits, and prompts with media.
Names are those of `FAMILIES` (the default prompt of a family) and `VARIANTS` (other prompts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["FAMILIES", "NAMES", "VARIANTS", "Tiny", "build", "family_of", "pad_batch"]

VOCABULARY = 200
PAD = 0
IMAGE, VIDEO, VISION_START, VISION_END, AUDIO, AUDIO_START, AUDIO_END = range(151, 158)
SPECIAL = [PAD, *range(150, 160)]

Inputs = dict[str, Any]
Maker = Callable[[torch.Generator, int, bool], Inputs]


@dataclass(frozen=True)
class Tiny:
    """A tiny model with its prompts.

    Attributes:
        name: As given to `build`.
        model: In evaluation mode, float32.
        suppress: Tokens that decoding must not produce: `generate(suppress_tokens=...)`. A
            placeholder among the answers would look like media in the next forward.
        make: Builds a prompt from a generator, the number of closing text tokens, and whether it
            is to be the short one with fewer media.
    """

    name: str
    model: PreTrainedModel
    suppress: list[int]
    make: Maker

    def inputs(self, seed: int = 0, text_tokens: int = 7, short: bool = False) -> Inputs:
        """A prompt, batch 1: what a processor would return.

        Args:
            short: Fewer images, frames or seconds, where the family can batch that with the
                usual prompt.
        """
        generator = torch.Generator().manual_seed(seed)
        inputs = self.make(generator, text_tokens, short)
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def batch(self, seed: int = 0) -> Inputs:
        """Two prompts of different length, padded on the left."""
        return pad_batch(self.inputs(seed, 7), self.inputs(seed + 1, 4, short=True))


def build(name: str, *, attention: str = "sdpa") -> Tiny:
    """Build the tiny model of this name; the same name always gives the same weights."""
    return {**FAMILIES, **VARIANTS}[name](name, attention)


def pad_batch(a: Inputs, b: Inputs) -> Inputs:
    """Join two prompts of one model to a batch, padded on the left."""
    length = max(a["input_ids"].shape[1], b["input_ids"].shape[1])
    batch = {}
    for key, first in a.items():
        second = b[key]
        if key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            first, second = _pad_left(first, length), _pad_left(second, length)
        elif not isinstance(first, Tensor):
            batch[key] = first
            continue
        elif first.shape[1:] != second.shape[1:]:
            # Tiles of an image, or time of a sound: zeros after the end.
            size = [max(x, y) for x, y in zip(first.shape[1:], second.shape[1:], strict=True)]
            first, second = _pad_right(first, size), _pad_right(second, size)
        batch[key] = torch.cat([first, second])
    return batch


def _pad_left(tokens: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (length - tokens.shape[1], 0), value=PAD)


def _pad_right(values: Tensor, size: list[int]) -> Tensor:
    padded = values.new_zeros(len(values), *size)
    padded[tuple(slice(n) for n in values.shape)] = values
    return padded


# -- parts


def _text(kind: str, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    return transformers.AutoConfig.for_model(kind, **{**defaults, **settings})


def _mrope() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return {"rope_parameters": rope}


def _tower() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }


def _clip() -> Any:
    return transformers.CLIPVisionConfig(**_tower(), projection_dim=32)


def _siglip() -> Any:
    return transformers.SiglipVisionConfig(**_tower(), vision_use_head=False)


def _tiny(name: str, architecture: Any, config: Any, attention: str, make: Maker) -> Tiny:
    config._attn_implementation = attention
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        model = architecture(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                elif parameter.ndim > 2:
                    parameter.normal_(std=0.05)
            newline = getattr(getattr(model, "model", None), "image_newline", None)
            if newline is not None:
                newline.normal_(std=0.1)
    finally:
        torch.set_rng_state(state)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = None
    return Tiny(name, model, SPECIAL, make)


def _prompt(generator: torch.Generator, spans: list[list[int]], closing: int) -> Tensor:
    """Text, then each span with some text after it, then the closing text: `[1, S]`."""

    def words(count: int) -> list[int]:
        return torch.randint(5, 140, (count,), generator=generator).tolist()

    tokens = words(4)
    for span in spans:
        tokens += span + words(2)
    return torch.tensor([tokens + words(closing)])


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


# -- families on CLIP, SigLIP and InternViT towers


def _llava(name: str, attention: str) -> Tiny:
    config = transformers.LlavaConfig(
        vision_config=_clip(), text_config=_text("llama"), image_token_index=IMAGE
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        images = 1 if short else 2
        return {
            "input_ids": _prompt(generator, [[IMAGE] * 16] * images, closing),
            "pixel_values": _noise(generator, images, 3, 56, 56),
        }

    return _tiny(name, transformers.LlavaForConditionalGeneration, config, attention, make)


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
        text_config=_text("mistral", sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        sizes = [[42, 56]] if short else [[56, 70], [28, 42]]
        spans = [[IMAGE] * (height // 14 * (width // 14)) for height, width in sizes]
        return {
            "input_ids": _prompt(generator, spans, closing),
            "pixel_values": _noise(generator, len(sizes), 3, 56, 70),
            "image_sizes": torch.tensor(sizes),
        }

    return _tiny(name, transformers.LlavaForConditionalGeneration, config, attention, make)


PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def _anyres(generator: torch.Generator, closing: int, short: bool) -> Inputs:
    # 90x112 goes to 2x2 tiles, 8x8 patches; 6 rows of them hold the picture: 16 + 6 * (8 + 1).
    # 50x112 goes to 1x2 tiles, 4x8 patches; padding is (4 - 3) // 2 = 0: 16 + 4 * (8 + 1).
    size, tokens, tiles = [90, 112], 16 + 6 * 9, 5
    if short:
        size, tokens, tiles = [50, 112], 16 + 4 * 9, 3
    return {
        "input_ids": _prompt(generator, [[IMAGE] * tokens], closing),
        "pixel_values": _noise(generator, 1, tiles, 3, 56, 56),
        "image_sizes": torch.tensor([size]),
    }


def _llava_next(name: str, attention: str) -> Tiny:
    config = transformers.LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text("mistral", sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return _tiny(name, transformers.LlavaNextForConditionalGeneration, config, attention, _anyres)


def _llava_onevision(name: str, attention: str) -> Tiny:
    config = transformers.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=_text("qwen2"),
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
            "input_ids": _prompt(generator, [[VIDEO] * (6 * 4 + 1)], closing),
            "pixel_values_videos": _noise(generator, 1, 6, 3, 56, 56),
        }

    def image(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # 180x112 goes to 4x2 tiles, 16x8 patches, 12 rows of them hold the picture; over one
        # tile's worth ("anyres_max_1") they are shrunk by sqrt(12 * 8 / 16), to 4x3.
        # 56x56 goes to 1x2 tiles, 4x8 patches, 4 columns of them hold the picture.
        size, tokens, tiles = [180, 112], 16 + 4 * (3 + 1), 9
        if short:
            size, tokens, tiles = [56, 56], 16 + 4 * (4 + 1), 3
        return {
            "input_ids": _prompt(generator, [[IMAGE] * tokens], closing),
            "pixel_values": _noise(generator, 1, tiles, 3, 56, 56),
            "image_sizes": torch.tensor([size]),
            "batch_num_images": torch.tensor([1]),
        }

    def images(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # Several images of one sample are not tiled: one view and a newline each.
        count = 2 if short else 3
        return {
            "input_ids": _prompt(generator, [[IMAGE] * 17] * count, closing),
            "pixel_values": _noise(generator, count, 1, 3, 56, 56),
            "image_sizes": torch.tensor([[90, 112]] * count),
            "batch_num_images": torch.tensor([count]),
        }

    makers: dict[str, Maker] = {
        "llava_onevision": video,
        "llava_onevision_image": image,
        "llava_onevision_images": images,
    }
    architecture = transformers.LlavaOnevisionForConditionalGeneration
    return _tiny(name, architecture, config, attention, makers[name])


def _llava_next_video(name: str, attention: str) -> Tiny:
    config = transformers.LlavaNextVideoConfig(
        vision_config=_clip(),
        text_config=_text("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        spatial_pool_mode="average",
        spatial_pool_stride=2,
    )

    def video(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # All clips of a batch hold equally many frames: 2x2 pooled tokens each.
        return {
            "input_ids": _prompt(generator, [[VIDEO] * 24], closing),
            "pixel_values_videos": _noise(generator, 1, 6, 3, 56, 56),
        }

    make = {"llava_next_video": video, "llava_next_video_image": _anyres}[name]
    architecture = transformers.LlavaNextVideoForConditionalGeneration
    return _tiny(name, architecture, config, attention, make)


def _internvl(name: str, attention: str) -> Tiny:
    vision = {**_tower(), "image_size": [84, 84], "patch_size": [14, 14]}
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=_text("qwen2"),
        image_token_id=IMAGE,
        image_seq_length=9,
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # An image of two tiles and a thumbnail, then frames of a video; 3x3 tokens each.
        tiles = [3, 1] if short else [3, 1, 1, 1]
        spans = [[VISION_START] + [IMAGE] * (9 * count) + [VISION_END] for count in tiles]
        return {
            "input_ids": _prompt(generator, spans, closing),
            "pixel_values": _noise(generator, sum(tiles), 3, 84, 84),
        }

    return _tiny(name, transformers.InternVLForConditionalGeneration, config, attention, make)


# -- Qwen

QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _qwen_inputs(*, timestamps: bool = False, image: bool = True, seconds: str = "") -> Maker:
    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        images = [(1, 4, 8) if short else (1, 8, 12)] if image else []
        videos = [(2, 4, 8)] if short else [(4, 4, 8)]
        spans = [[VISION_START] + [IMAGE] * _merged(grid) + [VISION_END] for grid in images]
        for grid in videos:
            parts = [(1, *grid[1:])] * grid[0] if timestamps else [grid]
            spans += [[VISION_START] + [VIDEO] * _merged(part) + [VISION_END] for part in parts]
        ids = _prompt(generator, spans, closing)
        inputs: Inputs = {"input_ids": ids}
        if image:
            inputs["pixel_values"] = _patches(generator, images)
            inputs["image_grid_thw"] = torch.tensor(images)
        inputs["pixel_values_videos"] = _patches(generator, videos)
        inputs["video_grid_thw"] = torch.tensor(videos)
        if seconds:
            inputs[seconds] = torch.tensor([0.5] if short else [1.0])
        return {**inputs, "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}

    return make


def _merged(grid: tuple[int, ...]) -> int:
    return grid[0] * grid[1] * grid[2] // 4


def _patches(generator: torch.Generator, grids: list[tuple[int, int, int]]) -> Tensor:
    return _noise(generator, 4 * sum(_merged(grid) for grid in grids), 3 * 2 * 14 * 14)


def _qwen2_vl(name: str, attention: str) -> Tiny:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    text = _text("qwen2_vl_text", **_mrope()).to_dict()
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    architecture = transformers.Qwen2VLForConditionalGeneration
    return _tiny(name, architecture, config, attention, _qwen_inputs())


def _windows() -> dict[str, Any]:
    """A tower whose first block attends within windows of 4x4 patches."""
    return {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 14,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }


def _qwen2_5_vl(name: str, attention: str) -> Tiny:
    text = _text("qwen2_5_vl_text", **_mrope()).to_dict()
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=_windows(), **QWEN_TOKENS
    )
    make = _qwen_inputs(seconds="second_per_grid_ts", image=name != "qwen2_5_vl_video")
    architecture = transformers.Qwen2_5_VLForConditionalGeneration
    return _tiny(name, architecture, config, attention, make)


def _qwen3_vl(name: str, attention: str) -> Tiny:
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
    text = _text("qwen3_vl_text", head_dim=16, **_mrope()).to_dict()
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    make = _qwen_inputs(timestamps=True, image=name != "qwen3_vl_video")
    return _tiny(name, transformers.Qwen3VLForConditionalGeneration, config, attention, make)


# -- sound


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
        audio_config=audio, text_config=_text("qwen2").to_dict(), audio_token_index=AUDIO
    )

    def make(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        # 80 mel frames are 40 after the convolution and 20 tokens after the pooling.
        frames = [48] if short else [80, 60]
        mask = torch.zeros(len(frames), 100, dtype=torch.int64)
        for row, count in zip(mask, frames, strict=True):
            row[:count] = 1
        spans = [[AUDIO_START] + [AUDIO] * (count // 4) + [AUDIO_END] for count in frames]
        return {
            "input_ids": _prompt(generator, spans, closing),
            "input_features": _noise(generator, len(frames), 16, 100) * mask[:, None],
            "feature_attention_mask": mask,
        }

    return _tiny(name, transformers.Qwen2AudioForConditionalGeneration, config, attention, make)


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
        vision_config=_windows(),
        text_config=_text("qwen2_5_omni_text", **_mrope()).to_dict(),
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
            "input_ids": _prompt(generator, [span], closing),
            "pixel_values_videos": _patches(generator, [grid]),
            "video_grid_thw": torch.tensor([grid]),
            "video_second_per_grid": torch.tensor([1.0]),
            "input_features": _noise(generator, 1, 16, frames),
            "feature_attention_mask": torch.ones(1, frames, dtype=torch.int64),
            "use_audio_in_video": True,
        }

    def separate(generator: torch.Generator, closing: int, short: bool) -> Inputs:
        grid, frames = ((2, 4, 8), 48) if short else ((3, 4, 8), 80)
        spans = [
            [VISION_START] + [VIDEO] * _merged(grid) + [VISION_END],
            [AUDIO_START] + [AUDIO] * (frames // 4) + [AUDIO_END],
        ]
        return {
            "input_ids": _prompt(generator, spans, closing),
            "pixel_values_videos": _patches(generator, [grid]),
            "video_grid_thw": torch.tensor([grid]),
            "video_second_per_grid": torch.tensor([1.0]),
            "input_features": _noise(generator, 1, 16, frames),
            "feature_attention_mask": torch.ones(1, frames, dtype=torch.int64),
        }

    make = interleaved if name == "qwen2_5_omni_interleaved" else separate
    architecture = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    return _tiny(name, architecture, config, attention, make)


Builder = Callable[[str, str], Tiny]

FAMILIES: dict[str, Builder] = {
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "qwen2_5_omni": _qwen2_5_omni,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_audio": _qwen2_audio,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
}

VARIANTS: dict[str, Builder] = {
    "llava_next_video_image": _llava_next_video,
    "llava_onevision_image": _llava_onevision,
    "llava_onevision_images": _llava_onevision,
    "llava_pixtral": _llava_pixtral,
    "qwen2_5_omni_interleaved": _qwen2_5_omni,
    "qwen2_5_vl_video": _qwen2_5_vl,
    "qwen3_vl_video": _qwen3_vl,
}

NAMES = sorted({**FAMILIES, **VARIANTS})


def family_of(name: str) -> str:
    """The family that a name of `FAMILIES` or `VARIANTS` belongs to."""
    return max((family for family in FAMILIES if name.startswith(family)), key=len)
