"""Qwen3-VL with experts: as Qwen3-VL to whoever looks at tokens."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.adapters.qwen3_vl import Qwen3VL
from tokenprune.core.layout import Modality

__all__ = ["Qwen3VLMoe"]


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL-MoE."""

    model_types = ("qwen3_vl_moe",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
