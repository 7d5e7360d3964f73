"""Selectors that methods share: they turn scores and a budget into kept tokens.

All of them return increasing indices, break ties towards the lower index, and return exactly as
many as the budget says. Scores that are nan rank last.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokenprune.core.layout import TokenLayout
from tokenprune.core.selection import check_keep, count
from tokenprune.errors import RecipeError

__all__ = [
    "Budget",
    "Per",
    "allocate",
    "check_budget",
    "group_sizes",
    "round_share",
    "top",
    "top_per_group",
    "uniform_per_group",
]

Per = Literal["prompt", "item", "frame", "second"]


class Budget(NamedTuple):
    """How many tokens of each group survive.

    Attributes:
        groups: `[N]` or `[H, N]` int64, group of each candidate, from 0.
        counts: `[G]` or `[H, G]` int64, tokens kept of each group.
        total: Tokens kept in all, of each head: the sum of the first one's counts. Where heads
            hold different candidates and their counts add up differently, the others give up
            their weakest tokens, or keep their next strongest.
    """

    groups: Tensor
    counts: Tensor
    total: int

    @classmethod
    def of(cls, groups: Tensor, counts: Tensor) -> Budget:
        """The budget of these counts."""
        return cls(groups, counts, int(counts.reshape(-1, counts.shape[-1])[0].sum()))


def check_budget(keep: float | int, per: str) -> None:
    """Check a budget and what it is spent over.

    Raises:
        RecipeError: One is out of range, or `keep` is the int 1 per prompt.
    """
    check_keep(keep)
    if per not in get_args(Per):
        raise RecipeError(f"per must be one of {', '.join(get_args(Per))}, got {per!r}")
    if per == "prompt" and isinstance(keep, int) and keep == 1:
        raise RecipeError(
            "keep=1 keeps a single token of the whole prompt, which is likely a slip; "
            "write keep=1.0 to keep all of them"
        )


def allocate(
    keep: float | int, per: Per, layout: TokenLayout, rows: Tensor | None = None
) -> Budget:
    """Spend a budget over groups of tokens: a share (at least one token) or a count of each.

    Args:
        keep: As users write it.
        per: What a group is.
        layout: The candidates, or the tokens that `rows` refers to.
        rows: `[H, N]`, the candidates of each key-value head; None if they are the layout.
    """
    groups = layout.groups(per)
    groups = groups if rows is None else groups.to(rows.device)[rows]
    if per == "prompt":
        # Needs no look at the tensors, so that no device has to wait.
        candidates = groups.shape[-1]
        total = count(keep, candidates) if isinstance(keep, float) else min(keep, candidates)
        return Budget(groups, torch.full((1,), total, device=groups.device), total)
    sizes = group_sizes(groups)
    counts = sizes.clamp(max=keep) if isinstance(keep, int) else round_share(keep, sizes)
    return Budget.of(groups, counts)


def group_sizes(groups: Tensor, number: int | None = None) -> Tensor:
    """Tokens of each group: `[N]` -> `[G]`, or `[H, N]` -> `[H, G]`, int64.

    Args:
        groups: Group of each candidate, from 0.
        number: `G`, if it is known; asking the tensor makes a device wait.
    """
    if number is None:
        number = int(groups.max()) + 1 if groups.numel() else 0
    sizes = groups.new_zeros(*groups.shape[:-1], number)
    return sizes.scatter_add(-1, groups, torch.ones_like(groups))


def round_share(share: float | Tensor, sizes: Tensor, least: int = 1) -> Tensor:
    """Round shares of many groups as `tokenprune.core.selection.count` rounds one.

    Args:
        share: A share for all groups, or one for each.
        sizes: `[G]` or `[H, G]` int64.
        least: Tokens kept at least, if a group has as many.
    """
    counts = torch.floor(share * sizes.to(torch.float64) + 0.5 + 1e-9).to(torch.int64)
    return counts.clamp(min=least).minimum(sizes)


def top(scores: Tensor, keep: int) -> Tensor:
    """The `keep` highest scores: `[N]` -> `[K]`, or `[H, N]` -> `[H, K]`."""
    return _order(scores)[..., :keep].sort(dim=-1).values


def top_per_group(scores: Tensor, budget: Budget) -> Tensor:
    """The highest scores of each group.

    Args:
        scores: `[N]`, or `[H, N]` with one or the same groups for all heads.
        budget: What is kept of each group.

    Returns:
        `[K]` or `[H, K]`.
    """
    if budget.counts.shape[-1] == 1:
        return top(scores, budget.total)
    groups = budget.groups.expand(scores.shape)
    counts = budget.counts.expand(*scores.shape[:-1], -1)
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
