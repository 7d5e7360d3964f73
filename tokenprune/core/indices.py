"""Index tensors with holes: what bridges logical sequences and physical tensors.

An index tensor holds places along one axis; -1 is a hole. Rows of unequal length are aligned at
the right, so holes are on the left, as left padding is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["pack_mask", "pad_left", "runs", "take"]


def pad_left(rows: list[Tensor], least: int = 0) -> Tensor:
    """Stack index tensors `[..., K_b]` of several samples to `[B, ..., max K]`, holes left.

    Args:
        rows: Of each sample.
        least: How wide the result is at least.
    """
    longest = max(least, *(row.shape[-1] for row in rows))
    return torch.stack(
        [torch.nn.functional.pad(row, (longest - row.shape[-1], 0), value=-1) for row in rows]
    )


def pack_mask(mask: Tensor) -> Tensor:
    """The places at which a mask `[..., N]` is true, `[..., K]` for the longest row's `K`."""
    longest = int(mask.sum(-1).max())
    order = mask.to(torch.uint8).argsort(dim=-1, stable=True)[..., mask.shape[-1] - longest :]
    return torch.where(mask.gather(-1, order), order, -1)


def runs(held: Tensor) -> Iterator[int]:
    """Lengths of the unbroken runs of True in each row of `[B, S]`, row by row."""
    for row in held.int():
        edge = row.new_zeros(1)
        steps = torch.cat([edge, row, edge]).diff()
        starts, ends = (steps == 1).nonzero()[:, 0], (steps == -1).nonzero()[:, 0]
        yield from (ends - starts).tolist()


def take(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather along `dim` for each sample of a batch; holes repeat the first place.

    Args:
        values: The batch axis is the one before `dim`; its size is `B`, or 1 if all samples share.
        index: `[B, K]`.
        dim: The axis that `index` counts along, at least 1.
    """
    batch, kept = index.shape
    values = values.expand(*values.shape[: dim - 1], batch, *values.shape[dim:])
    ahead, behind = dim - 1, values.ndim - dim - 1
    shaped = index.to(values.device).clamp_min(0).reshape(*[1] * ahead, batch, kept, *[1] * behind)
    target = (*values.shape[:dim], kept, *values.shape[dim + 1 :])
    return values.gather(dim, shaped.expand(target))
