"""GLM-4.1V: as Qwen2-VL, with a text timestamp after each frame."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tokenprune.adapters.qwen2_vl import Qwen2VL
from tokenprune.core.layout import MODALITIES, Modality

__all__ = ["Glm4v"]


class Glm4v(Qwen2VL):
    """GLM-4.1V. Frames and images share one placeholder: those of a clip stand within its marks."""

    model_types = ("glm4v",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    def token_ids(self) -> dict[Modality, int]:
        return dict.fromkeys(self.modalities, self.config.image_token_id)

    def placeholders(
        self, input_ids: Tensor, types: Tensor | None = None
    ) -> dict[Modality, Tensor]:
        placeholders = input_ids == self.config.image_token_id
        if types is not None:  # part of a clip may come without the clip's marks
            video = types == MODALITIES["video"]
        else:
            started = (input_ids == self.config.video_start_token_id).cumsum(dim=1)
            ended = (input_ids == self.config.video_end_token_id).cumsum(dim=1)
            video = started > ended
        return {"image": placeholders & ~video, "video": placeholders & video}
