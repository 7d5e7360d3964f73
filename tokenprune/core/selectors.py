"""Selectors that methods share: they turn scores and a budget into kept tokens.

All of them return increasing indices, break ties towards the lower index, and return exactly as
many as the budget says. Scores that are nan rank last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenprune.core.budget import Budget, group_sizes

__all__ = ["top", "top_per_group", "uniform_per_group"]


def top(scores: Tensor, keep: int) -> Tensor:
    """The `keep` highest scores: `[N]` -> `[K]`, or `[H, N]` -> `[H, K]`."""
    return _order(scores)[..., :keep].sort(dim=-1).values


def top_per_group(scores: Tensor, budget: Budget) -> Tensor:
    """The highest scores of each group.

    Args:
        scores: `[N]`, or `[H, N]` with one or the same groups for all heads.
        budget: What is kept of each group; of the first head, if all heads have the same scores.

    Returns:
        `[K]` or `[H, K]`.
    """
    if budget.counts.shape[-1] == 1:
        return top(scores, budget.total)
    groups, counts = budget.groups, budget.counts
    if scores.ndim < groups.ndim:
        groups, counts = groups[0], counts[0]
    groups, counts = groups.expand(scores.shape), counts.expand(*scores.shape[:-1], -1)
    kept = _ranks(scores, groups, counts.shape[-1]) < counts.gather(-1, groups)
    return _exactly(kept, scores, budget.total)


def uniform_per_group(budget: Budget) -> Tensor:
    """Tokens spread evenly over each group, half a step from its ends: `[K]` or `[H, K]`.

    Of `n` tokens the `i`-th of `k` is number `floor((i + 1/2) * n / k)`.
    """
    groups = budget.groups
    size = group_sizes(groups, budget.counts.shape[-1]).gather(-1, groups)
    keep = budget.counts.expand(*groups.shape[:-1], -1).gather(-1, groups)
    rank = _ranks(torch.zeros_like(groups), groups, budget.counts.shape[-1])
    kept = _chosen_up_to(rank + 1, keep, size) > _chosen_up_to(rank, keep, size)
    return _exactly(kept, torch.zeros_like(groups), budget.total)


def _chosen_up_to(rank: Tensor, keep: Tensor, size: Tensor) -> Tensor:
    """How many of the evenly spread tokens have a lower rank: `ceil(rank * k / n - 1/2)`."""
    return -torch.div(size - 2 * rank * keep, 2 * size, rounding_mode="floor")


def _order(scores: Tensor) -> Tensor:
    """Indices from the highest score to the lowest."""
    if scores.is_floating_point():
        scores = torch.where(scores.isnan(), -math.inf, scores)
    return scores.argsort(dim=-1, descending=True, stable=True)


def _ranks(scores: Tensor, groups: Tensor, number: int) -> Tensor:
    """Rank of each token within its group, 0 for the highest score: same shape, int64."""
    order = _order(scores)
    order = order.gather(-1, groups.gather(-1, order).argsort(dim=-1, stable=True))
    sizes = group_sizes(groups, number)
    starts = (sizes.cumsum(-1) - sizes).gather(-1, groups.gather(-1, order))
    places = torch.arange(scores.shape[-1], device=scores.device)
    return torch.empty_like(order).scatter(-1, order, places - starts)


def _exactly(kept: Tensor, scores: Tensor, total: int) -> Tensor:
    """Indices of `total` tokens: marked ones first, then the highest."""
    order = _order(scores)
    order = order.gather(-1, _order(kept.gather(-1, order).to(torch.uint8)))
    return order[..., :total].sort(dim=-1).values
