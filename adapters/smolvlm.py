"""SmolVLM: as Idefics3, and frames of a clip are images in one piece."""

from __future__ import annotations

from typing import ClassVar

from tokenprune.adapters.idefics3 import Idefics3
from tokenprune.core.layout import Modality

__all__ = ["SmolVLM"]


class SmolVLM(Idefics3):
    """SmolVLM, SmolVLM2. Frames are images to the model, one item each; their times are text."""

    model_types = ("smolvlm",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
