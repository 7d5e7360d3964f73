"""DivPrune: tokens that are as far from each other as can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.core.budget import Keep
from tokenprune.core.context import Context
from tokenprune.core.registry import method
from tokenprune.core.selection import Selection
from tokenprune.core.site import Input
from tokenprune.core.stage import Budgeted

__all__ = ["DivPrune"]

_BLOCK_ELEMENTS: Final = 1 << 22
"""Similarities that are held at a time: in float32, 16 MiB."""


@method("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(Budgeted):
    """Keep tokens whose features are far from each other, before the language model.

    Method: DivPrune (https://arxiv.org/abs/2503.02175). The distance of two tokens is one minus
    the cosine of their features as the language model gets them. The first token is the one
    farthest from its nearest neighbour; then, again and again, the one whose nearest kept token is
    farthest. Neither attention nor the question plays a part.

    Where we deviate: the number kept is rounded half up, as everywhere here, and each group of
    `per` is a problem of its own. Our choices: ties go to the lower index; a kept token is never
    picked twice, so that duplicates fill up what is left of a budget; features of zero are at
    distance one from all; and distances are computed anew for each pick, in float32, so that
    nothing as large as a table of all pairs is held.

    Args:
        keep: Share or number of tokens kept of each group of `per`, or one for each modality (the
            paper: 0.098).
        per: "prompt", "item", "frame" (an image or sound is one too) or "second".
        on: Modalities that are pruned; None for all.
    """

    keep: Keep = 0.098

    site = Input()

    def select(self, context: Context) -> Selection:
        budget = self.budget(context)
        unit = functional.normalize(context.features.float(), dim=-1).nan_to_num(0.0)  # [N, D]
        kept = []
        for group, count in enumerate(budget.counts.tolist()):
            rows = (budget.groups == group).nonzero()[:, 0]
            kept.append(rows if count == len(rows) else rows[_spread(unit[rows], count)])
        return Selection(torch.cat(kept).sort().values)


def _spread(unit: Tensor, count: int) -> Tensor:
    """Pick rows greedily, each as far as can be from those picked before: `[n, D]` -> `[k]`."""
    picked = [_most_isolated(unit)]
    distance = unit.new_full((len(unit),), torch.inf)  # to the nearest of those picked
    for _ in range(count - 1):
        distance = distance.minimum(1 - unit @ unit[picked[-1]][0])
        distance.index_fill_(0, picked[-1], -torch.inf)  # from now on
        picked.append(distance.argmax(dim=0, keepdim=True))
    return torch.cat(picked)


def _most_isolated(unit: Tensor) -> Tensor:
    """The row whose nearest other row is farthest: `[n, D]` -> `[1]`."""
    step = max(1, _BLOCK_ELEMENTS // len(unit))
    nearest = []
    for start in range(0, len(unit), step):
        likeness = unit[start : start + step] @ unit.T  # [r, n]
        likeness.diagonal(start).fill_(-torch.inf)  # not itself
        nearest.append(likeness.amax(dim=1))
    return torch.cat(nearest).argmin(dim=0, keepdim=True)
