"""DeepStack: features of the encoder that early decoder layers add to media tokens (Qwen3-VL)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["DeepStack", "absorb_"]


class DeepStack:
    """The features of one forward, added here instead of in the model, since rows move.

    Attributes:
        features: For each of the first layers `[M, D]`, a row for each media token of the batch.
        row: `[B, S]`, the row of each token of the input; -1 for text.
    """

    def __init__(self, features: list[Tensor], row: Tensor) -> None:
        self.features = features
        self.row = row

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any]) -> DeepStack | None:
        """Take the features out of the arguments of the language model; None if it has none."""
        features = kwargs.pop("deepstack_visual_embeds", None)
        where = kwargs.pop("visual_pos_masks", None)
        if features is None:
            return None
        row = where.flatten().cumsum(0).view_as(where) - 1
        return cls(list(features), torch.where(where, row, -1))

    def copied(self) -> DeepStack:
        """The same with features that may be written to."""
        return DeepStack([one.clone() for one in self.features], self.row.clone())

    def absorb_(self, sample: int, source: Tensor, target: Tensor, weight: Tensor) -> None:
        """Merge features as hidden states are merged: indices `[M]` into the input of a sample.

        Tokens without features, those of sound, give nothing, and have some once they absorb any.
        """
        row = self.row[sample]
        source, target = source.to(row.device), target.to(row.device)
        bare = torch.unique(target[row[target] < 0])
        if len(bare):
            first = len(self.features[0])
            row[bare] = torch.arange(first, first + len(bare), device=row.device)
            self.features = [
                torch.cat([one, one.new_zeros(len(bare), one.shape[1])]) for one in self.features
            ]
        given = row[source]
        weight = torch.where(given >= 0, weight.to(row.device), 0)
        for one in self.features:
            absorb_(one, given.clamp_min(0), row[target], weight)

    def add(self, layer: int, hidden: Tensor, source: Tensor | None) -> Tensor:
        """Hidden states with the features of a layer added to media tokens.

        Args:
            layer: The layer that they come out of.
            hidden: `[B, Q, D]`.
            source: `[B, Q]` indices into the input, -1 for holes; None if all of it is there.
        """
        if layer >= len(self.features) or not len(self.features[layer]):
            return hidden
        row = self.row
        if source is not None:
            source = source.to(row.device)
            row = torch.where(source >= 0, row.gather(1, source.clamp_min(0)), -1)  # [B, Q]
        row = row.to(hidden.device)
        extra = self.features[layer].to(hidden)[row.clamp_min(0)]  # [B, Q, D]
        return hidden + torch.where((row >= 0)[..., None], extra, 0)


def absorb_(features: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> None:
    """Replace the rows `target` of `features [S, D]` by weighted sums of the rows `source`."""
    source, target, weight = (one.to(features.device) for one in (source, target, weight))
    rows, place = torch.unique(target, return_inverse=True)
    sums = torch.zeros(len(rows), features.shape[1], device=features.device)  # [targets, D]
    sums.index_add_(0, place, features[source].float() * weight[:, None].float())
    features.index_copy_(0, rows, sums.to(features.dtype))
