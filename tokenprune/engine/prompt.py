"""A prompt with media, and the state of each row of its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters.base import MediaCall
from tokenprune.core.layout import MODALITIES, TokenLayout
from tokenprune.core.stage import Stage

__all__ = ["Prompt", "Sample"]


@dataclass(frozen=True)
class Prompt:
    """A prompt with media, as the model is given it.

    Attributes:
        input_ids: `[B, S]`, placeholders included.
        calls: The encoder calls that made its media tokens.
        arguments: Of the base model's forward, by name, as `Adapter.items` takes them.
        frame_seconds: For each clip `[F]` float64, when its frames are shown; None if not known.
    """

    input_ids: Tensor
    calls: list[MediaCall]
    arguments: dict[str, Any] = field(default_factory=dict)
    frame_seconds: list[Tensor] | None = None


@dataclass
class Sample:
    """The state of one row of the batch.

    Attributes:
        number: The row.
        layout: Its `P` media tokens, on the model's device.
        alive: `[N]` rows of `layout` that are still there, increasing.
        text: `[T]` indices into the input of everything else but padding.
        encoder_map: Returns a map aligned to `layout`, `[P]`.
        memory: What stages keep for later ones, by method name.
    """

    number: int
    layout: TokenLayout
    alive: Tensor
    text: Tensor
    encoder_map: Callable[[str], Tensor]
    memory: dict[str, Any] = field(default_factory=dict)
    modalities: frozenset[int] = frozenset()

    def candidates(self, stage: Stage) -> Tensor:
        """Rows of `layout` that the stage may look at."""
        wanted = {MODALITIES[name] for name in stage.modalities}
        if self.modalities <= wanted:
            return self.alive
        modality = self.layout.modality[self.alive]
        return self.alive[torch.isin(modality, modality.new_tensor(sorted(wanted)))]
