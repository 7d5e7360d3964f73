"""A prompt with media, and the state of each row of its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters.base import MediaCall
from tokenprune.core.layout import MODALITIES, TokenLayout
from tokenprune.core.signal import EncoderSignal
from tokenprune.core.stage import Stage

__all__ = ["Given", "Prompt", "Sample"]


@dataclass(frozen=True)
class Given:
    """What the caller knows and the model is not told; None is what the caller does not tell.

    Attributes:
        question: What is asked, without the words of the chat template.
        frames: For each clip (each image, if there are no clips) its pictures `[F, 3, H, W]` uint8.
        frame_seconds: For each clip `[F]` float64, when its frames are shown.
        continues: Whether the prompt's clip goes on with that of the prompt before.
        more: Whether more of the prompt will follow, its question included.
    """

    question: str | None = None
    frames: list[Tensor] | None = None
    frame_seconds: list[Tensor] | None = None
    continues: bool = False
    more: bool = False


@dataclass(frozen=True)
class Prompt:
    """A prompt with media, as the model is given it.

    Attributes:
        input_ids: `[B, S]`, placeholders included.
        calls: The encoder calls that made its media tokens.
        arguments: Of the base model's forward, by name, as `Adapter.items` takes them.
        given: What the caller knows.
    """

    input_ids: Tensor
    calls: list[MediaCall]
    arguments: dict[str, Any] = field(default_factory=dict)
    given: Given = field(default_factory=Given)


@dataclass
class Sample:
    """The state of one row of the batch.

    Attributes:
        number: The row.
        layout: Its `P` media tokens, on the model's device.
        alive: `[N]` rows of `layout` that are still there, increasing.
        text: `[T]` indices into the input of everything else but padding.
        text_after: `[T']`, those of it that come after the last media token.
        encoder: Returns an encoder signal aligned to `layout`.
        modalities: Codes of the kinds of media there are.
        state: What stages keep for later ones, by step and kind.
    """

    number: int
    layout: TokenLayout
    alive: Tensor
    text: Tensor
    text_after: Tensor
    encoder: Callable[[EncoderSignal], Tensor]
    modalities: frozenset[int]
    state: dict[tuple[int, type[Any]], Any] = field(default_factory=dict)
    _newest: tuple[Tensor, int, Tensor] | None = None

    def newest(self, count: int, past: int) -> Tensor:
        """The last tokens that are still there, as indices `[R]` into the input.

        Args:
            count: How many; all if there are fewer.
            past: Logical length before the prompt.
        """
        if self._newest is None or self._newest[0] is not self.alive or self._newest[1] != count:
            media = self.layout.position[self.alive[-count:]] - past
            tokens = torch.cat([self.text[-count:], media]).sort().values[-count:]
            self._newest = self.alive, count, tokens
        return self._newest[2]

    def mask(self) -> Tensor:
        """`[P]` bool: which tokens are still there."""
        there = torch.zeros(len(self.layout), dtype=torch.bool, device=self.alive.device)
        return there.index_fill_(0, self.alive, True)

    def candidates(self, stage: Stage) -> Tensor:
        """Rows of `layout` that the stage may look at, `[N]`."""
        return self.alive if self.all_on(stage) else self.alive[self.on(stage)[self.alive]]

    def all_on(self, stage: Stage) -> bool:
        """Whether the stage acts on all kinds of media there are."""
        return self.modalities <= {MODALITIES[name] for name in stage.acts_on}

    def on(self, stage: Stage) -> Tensor:
        """`[P]` bool: which tokens are of a kind that the stage acts on."""
        wanted = sorted(MODALITIES[name] for name in stage.acts_on)
        return torch.isin(self.layout.modality, self.layout.modality.new_tensor(wanted))
