"""Large models and prompts that the bench on a card measures, and tiny ones to try it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.eval.bench.random_models import (
    QWEN2_7B,
    SO400M,
    Model,
    Settings,
    build,
    llava_config,
    llava_inputs,
    qwen_config,
    qwen_inputs,
)

__all__ = ["QWEN_TOWER", "TINY_SIGLIP", "TINY_TEXT", "Case", "Models", "cases"]

QWEN_TOWER: Settings = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
TINY_TEXT: Settings = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}
TINY_SIGLIP: Settings = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TINY_TOWER: Settings = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}


@dataclass(frozen=True)
class Case:
    """A model, and the length of its prompts.

    Attributes:
        model: What the model is called.
        build: Makes it on a device.
        inputs: Makes a prompt.
    """

    model: str
    build: Callable[[torch.device], Model]
    inputs: Callable[[Model], dict[str, Tensor]]


def cases(tiny: bool) -> dict[str, Case]:
    """What is measured, by the name of its part; tiny models take no time on a processor."""
    text = TINY_TEXT if tiny else QWEN2_7B
    siglip, tower = (TINY_SIGLIP, TINY_TOWER) if tiny else (SO400M, QWEN_TOWER)
    size = "tiny" if tiny else "7b"

    def llava(frames: int) -> Case:
        return Case(
            f"llava-onevision-{size}",
            lambda device: build(llava_config(text, siglip), device),
            lambda model: llava_inputs(model, frames),
        )

    def qwen(frames: int) -> Case:
        return Case(
            f"qwen2.5-vl-{size}",
            lambda device: build(
                qwen_config({**text, "max_position_embeddings": 128000}, tower), device
            ),
            lambda model: qwen_inputs(model, frames, side=8 if tiny else 32),
        )

    # A frame is 196 tokens of LLaVA-OneVision, and a pair of pictures 256 of Qwen2.5-VL.
    return {
        "llava-6k": llava(4 if tiny else 31),
        "llava-24k": llava(8 if tiny else 122),
        "qwen-6k": qwen(2 if tiny else 24),
        "qwen-24k": qwen(4 if tiny else 94),
    }


class Models:
    """Holds one model at a time: two of them may not fit.

    Args:
        device: Where models are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: tuple[str, Model] | None = None

    def get(self, name: str, make: Callable[[torch.device], Model]) -> Model:
        """The model of this name, made if it is not at hand."""
        if self._held is None or self._held[0] != name:
            self.drop()
            self._held = name, make(self.device)
        return self._held[1]

    def drop(self) -> None:
        """Let go of the model."""
        self._held = None
        self.tidy()

    def tidy(self) -> None:
        """Give memory back that nothing refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # a device that failed gives nothing back
                torch.cuda.empty_cache()
