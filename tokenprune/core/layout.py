"""Where the media tokens of a prompt come from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Literal

import torch
from torch import Tensor

__all__ = ["AUDIO", "IMAGE", "MODALITIES", "VIDEO", "Modality", "Per", "TokenLayout"]

Modality = Literal["image", "video", "audio"]
Per = Literal["prompt", "item", "frame", "second"]
"""What a budget is spent over."""

IMAGE: Final = 1
VIDEO: Final = 2
AUDIO: Final = 3
MODALITIES: Final[dict[Modality, int]] = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}


@dataclass(frozen=True)
class TokenLayout:
    """One row per media token of one sample, in sequence order.

    Placeholders that stand for no patch (newline tokens of a tiled image, timestamps, start and
    end markers) have no row: they are never pruned and never counted.

    Attributes:
        position: `[N]` int64, index of the token in the unpruned sequence.
        modality: `[N]` int64, 1 image, 2 video, 3 audio.
        item: `[N]` int64, which image, clip or sound of the prompt, counted from 0.
        canvas: `[N]` int64, which 2-D picture of the prompt the token lies on (a base view, a
            tiled view, a frame, a sound), counted from 0 over the whole prompt.
        frame: `[N]` int64, temporal index within the item; -1 for images.
        row: `[N]` int64, row on the canvas; -1 for audio.
        column: `[N]` int64, column on the canvas; for audio the index of the token in its sound.
        seconds: `[N]` float64, when the token's picture is shown or its sound begins. It is what
            the model is told as numbers; else what was handed in (see `prune`), since times that
            stand in the prompt as text are not read; else nan.
    """

    position: Tensor
    modality: Tensor
    item: Tensor
    canvas: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor
    seconds: Tensor

    def __post_init__(self) -> None:
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if len(set(shapes.values())) != 1 or self.position.ndim != 1:
            raise ValueError(f"all columns of a TokenLayout must be [N], got {shapes}")

    def __len__(self) -> int:
        return len(self.position)

    def __repr__(self) -> str:
        items = len(torch.unique(self.item))
        canvases = len(torch.unique(self.canvas))
        return f"TokenLayout({len(self)} tokens, {items} items, {canvases} canvases)"

    def __getitem__(self, rows: Tensor) -> TokenLayout:
        """The layout of some tokens: `rows` is an index `[K]` or a mask `[N]`."""
        return TokenLayout(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on another device."""
        return TokenLayout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def spans(self) -> Tensor:
        """Number the images, frames and sounds of the prompt.

        Returns:
            `[N]` int64: tokens of one image, of one video frame or of one sound share a number;
            numbers count from 0 in sequence order.
        """
        frame = torch.where(self.modality == VIDEO, self.frame, -1)
        return _number(self.item, frame)

    def groups(self, per: Per) -> Tensor:
        """Number the groups that a budget is spent over: `[N]` int64, from 0 in sequence order."""
        if per == "prompt":
            return torch.zeros_like(self.item)
        if per == "item":
            return _number(self.item)
        if per == "frame":
            return self.spans()
        # Tokens without a time are one group an item.
        second = self.seconds.nan_to_num(-1.0).floor().to(torch.int64)
        return _number(self.item, second)


def _number(major: Tensor, minor: Tensor | None = None) -> Tensor:
    """Give equal pairs one number, in increasing order of the pairs; `minor` is above -2**31."""
    # One sort of integers: comparing rows is ten times slower.
    key = major if minor is None else major * 2**32 + minor
    number: Tensor = torch.unique(key, return_inverse=True)[1]
    return number
