"""Knorm: cache entries with short keys are those that attract attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.core.context import Context
from tokenprune.core.registry import method
from tokenprune.methods._caches import ScoredCache

__all__ = ["Knorm"]


@method("knorm")
@dataclass(frozen=True, kw_only=True)
class Knorm(ScoredCache):
    """Keep the cache entries whose keys are shortest, each key-value head its own.

    Method: the L2 norm of keys (https://arxiv.org/abs/2406.11430). An entry's score is minus the
    Euclidean length of its key: entries with short keys tend to get most of the attention. Nothing
    else is looked at, neither the question nor attention, so that decisions serve every question.
    Rotation turns keys and keeps their lengths, so the stored ones will do.

    Where we deviate: only media tokens are candidates, and `keep` counts these alone; text stays.
    Our choices, none confirmed as the paper's: `keep` 0.5, and pruning in all layers.

    Args:
        keep: Share or number of tokens kept of each group of `per`, or one for each modality.
        per: "prompt", "item", "frame" (an image or sound is one too) or "second".
        on: Modalities that are pruned; None for all.
        layers: Decoder layers, from 0, whose caches are pruned; None for all.
    """

    def score(self, context: Context) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(context.keys, dim=-1, dtype=torch.float32)
        return -lengths  # [H, N]
