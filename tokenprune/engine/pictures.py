"""The pictures that the caller gave, dealt out to the samples of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core.layout import IMAGE, VIDEO, TokenLayout
from tokenprune.errors import MediaError

__all__ = ["deal_frames"]


def deal_frames(layouts: list[TokenLayout], frames: list[Tensor] | None) -> list[list[Tensor]]:
    """Deal the pictures of clips (of images, without clips) to the samples that show them.

    Args:
        layouts: Of each sample.
        frames: For each clip or image of the batch `[F, 3, H, W]`, in the order of the prompt.

    Returns:
        For each sample those of its own items.

    Raises:
        MediaError: There are more or fewer than the prompt has clips or images.
    """
    if frames is None:
        return [[] for _ in layouts]
    kind = VIDEO if any(bool((one.modality == VIDEO).any()) for one in layouts) else IMAGE
    counts = [len(torch.unique(one.item[one.modality == kind])) for one in layouts]
    if sum(counts) != len(frames):
        what = "clips" if kind == VIDEO else "images"
        raise MediaError(
            f"frames has the pictures of {len(frames)} {what}, but the prompt has {sum(counts)}; "
            "give those of each, in the order of the prompt"
        )
    dealt, first = [], 0
    for count in counts:
        dealt.append(frames[first : first + count])
        first += count
    return dealt
