"""Qwen3-VL: as Qwen2-VL, with a text timestamp before each frame."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.adapters._pixels import HALF, Normalisation
from tokenprune.adapters.qwen2_vl import Qwen2VL
from tokenprune.core.layout import Modality

__all__ = ["Qwen3VL"]


class Qwen3VL(Qwen2VL):
    """Qwen3-VL. Timestamps are text of the prompt, and no tokens of the layout.

    Of pictures that are joined to one frame they tell the middle.
    """

    model_types = ("qwen3_vl",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    normalisation: ClassVar[Normalisation] = HALF

    def frame_times(self, seconds: Tensor) -> Tensor:
        missing = seconds[-1:].expand(-len(seconds) % self._joined)  # the last picture is repeated
        whole = torch.cat([seconds, missing])
        return (whole[:: self._joined] + whole[self._joined - 1 :: self._joined]) / 2
