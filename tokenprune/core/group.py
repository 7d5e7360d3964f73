"""Groups: parts of a prompt that are prefilled one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenprune.core.layout import AUDIO, VIDEO, TokenLayout
from tokenprune.errors import RecipeError

__all__ = ["Group"]

Unit = Literal["frame", "second", "token"]


@dataclass(frozen=True)
class Group:
    """How much of a prompt is prefilled at once.

    Attributes:
        size: How many.
        per: Of what: "frame" (pictures as the processor is given them; an image is one, and so is
            a sound where there are no pictures), "second", or media "token".
    """

    size: int
    per: Unit = "frame"

    def __post_init__(self) -> None:
        whole = isinstance(self.size, int) and not isinstance(self.size, bool)
        if not whole or self.size < 1:
            raise RecipeError(f"a group must hold at least 1 {self.per}, got {self.size!r}")
        if self.per not in get_args(Unit):
            raise RecipeError(f"a group is of {', '.join(get_args(Unit))}s, got {self.per!r}")

    def __str__(self) -> str:
        return f"{self.size} {self.per}{'s' if self.size > 1 else ''}"

    def numbers(self, layout: TokenLayout, pictures: int = 1) -> Tensor:
        """The group of each media token, `[N]` int64 from 0, never decreasing.

        Args:
            layout: Of a prompt.
            pictures: Of how many pictures the model makes one frame.

        Raises:
            RecipeError: A group would end inside such a frame, or times are not known.
        """
        if self.per == "token":
            return torch.arange(len(layout), device=layout.position.device) // self.size
        if self.per == "second":
            if bool(layout.seconds.isnan().any()):
                raise RecipeError(
                    f"groups of {self} need the times of all media tokens, which are not known "
                    "here; give prune(..., frame_seconds=...), or count frames"
                )
            return (layout.seconds / self.size).floor().to(torch.int64).cummax(0).values
        if self.size % pictures and bool((layout.modality == VIDEO).any()):
            raise RecipeError(
                f"groups of {self} would end inside a frame that the model makes of {pictures} "
                f"pictures; give a multiple of {pictures}"
            )
        frame = _frames(layout)
        group = _fill(_weights(layout, frame, pictures), self.size)
        return torch.tensor(group, device=frame.device)[frame]


def _frames(layout: TokenLayout) -> Tensor:
    """The number of each token's frame, `[N]` from 0; sound goes with the picture before it."""
    spans, sound = layout.spans(), layout.modality == AUDIO
    shown = torch.ones_like(sound) if bool(sound.all()) else ~sound
    before = torch.cat([spans.new_full((1,), -1), spans.where(shown, -1).cummax(0).values[:-1]])
    return ((shown & (spans > before)).cumsum(0) - 1).clamp_min(0)


def _weights(layout: TokenLayout, frame: Tensor, pictures: int) -> list[int]:
    """Of how many pictures each frame is made."""
    count = int(frame.max()) + 1 if len(frame) else 0
    weight = torch.where(layout.modality == VIDEO, pictures, 1)
    made = torch.ones(count, dtype=torch.int64, device=frame.device)
    found: list[int] = made.scatter_reduce(0, frame, weight, "amax").tolist()
    return found


def _fill(weights: list[int], size: int) -> list[int]:
    """The group of each frame: as many frames as fit."""
    groups, group, held = [], 0, 0
    for weight in weights:
        if held and held + weight > size:
            group, held = group + 1, 0
        groups.append(group)
        held += weight
    return groups
