"""What the tiny models share: their text model, towers, and prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

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


def pad_batch(a: Inputs, b: Inputs) -> Inputs:
    """Join two prompts of one model to a batch, padded on the left."""
    length = max(a["input_ids"].shape[1], b["input_ids"].shape[1])
    batch = {}
    for key, first in a.items():
        second = b[key]
        if key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
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


def decoder_of(model: PreTrainedModel) -> Any:
    """The language model; before they had an inner model, thinkers named themselves instead."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else decoder.model


# -- parts


def text_config(kind: str | type, **settings: Any) -> Any:
    """The configuration of a text model, by its type or by its class (older releases of
    transformers do not know all types)."""
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
    merged = {**defaults, **settings}
    return AutoConfig.for_model(kind, **merged) if isinstance(kind, str) else kind(**merged)


def mrope() -> dict[str, Any]:
    """Settings of a text model with three positions a token."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return {"rope_parameters": rope}


def tower() -> dict[str, Any]:
    """Settings of an encoder of 4x4 patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }


def clip() -> Any:
    """The configuration of a CLIP tower, which has a class token."""
    return transformers.CLIPVisionConfig(**tower(), projection_dim=32)


def siglip() -> Any:
    """The configuration of a SigLIP tower, which has none."""
    return transformers.SiglipVisionConfig(**tower(), vision_use_head=False)


def make_tiny(name: str, architecture: Any, config: Any, attention: str, make: Maker) -> Tiny:
    """A model of a configuration with random weights, which its class alone decides.

    Args:
        name: Of the tiny model.
        architecture: The model's class.
        config: Its configuration.
        attention: "sdpa" or "eager".
        make: Makes its prompts.
    """
    config._attn_implementation = attention
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        try:
            model = architecture(config).eval()
        except ValueError as error:  # not all parts have all kernels in older releases
            if "attention implementation" not in str(error):
                raise
            for part in config.sub_configs:
                getattr(config, part)._attn_implementation = None
            config.get_text_config()._attn_implementation = attention
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


def prompt(generator: torch.Generator, spans: list[list[int]], closing: int) -> Tensor:
    """Text, then each span with some text after it, then the closing text: `[1, S]`."""

    def words(count: int) -> list[int]:
        return torch.randint(5, 140, (count,), generator=generator).tolist()

    tokens = words(4)
    for span in spans:
        tokens += span + words(2)
    return torch.tensor([tokens + words(closing)])


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Random pixels or sound."""
    return torch.randn(*shape, generator=generator)


PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def anyres(generator: torch.Generator, closing: int, short: bool) -> Inputs:
    """A prompt with a tiled image, as LLaVA-NeXT's processor makes it."""
    # 90x112 goes to 2x2 tiles, 8x8 patches; 6 rows of them hold the picture: 16 + 6 * (8 + 1).
    # 50x112 goes to 1x2 tiles, 4x8 patches; padding is (4 - 3) // 2 = 0: 16 + 4 * (8 + 1).
    size, tokens, tiles = [90, 112], 16 + 6 * 9, 5
    if short:
        size, tokens, tiles = [50, 112], 16 + 4 * 9, 3
    return {
        "input_ids": prompt(generator, [[IMAGE] * tokens], closing),
        "pixel_values": noise(generator, 1, tiles, 3, 56, 56),
        "image_sizes": torch.tensor([size]),
    }


def merged(grid: tuple[int, ...]) -> int:
    """Tokens of a grid of patches, four of which are one token."""
    return grid[0] * grid[1] * grid[2] // 4


def patches(generator: torch.Generator, grids: list[tuple[int, int, int]]) -> Tensor:
    """Random pixels of grids of patches, as Qwen's processors flatten them."""
    return noise(generator, 4 * sum(merged(grid) for grid in grids), 3 * 2 * 14 * 14)


Builder = Callable[[str, str], Tiny]
"""Builds the tiny model of a name, with the attention implementation given."""
