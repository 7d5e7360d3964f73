"""Qwen3-VL: as Qwen2-VL, with a text timestamp before each frame."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.adapters._pixels import HALF, Normalisation
from tokenprune.adapters.qwen2_vl import Qwen2VL
from tokenprune.layout import Modality

__all__ = ["Qwen3VL"]


class Qwen3VL(Qwen2VL):
    """Qwen3-VL. Timestamps are text of the prompt, and no tokens of the layout."""

    model_types = ("qwen3_vl",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    normalisation: ClassVar[Normalisation] = HALF
