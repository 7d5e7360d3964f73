"""Budgets: how many tokens of which groups survive."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokenprune.core.layout import TokenLayout
from tokenprune.core.selection import check_keep, count
from tokenprune.errors import RecipeError

__all__ = ["Budget", "Per", "allocate", "check_budget", "group_sizes", "round_share"]

Per = Literal["prompt", "item", "frame", "second"]


class Budget(NamedTuple):
    """How many tokens of each group survive.

    Attributes:
        groups: `[N]` or `[H, N]` int64, group of each candidate, from 0.
        counts: `[G]` or `[H, G]` int64, tokens kept of each group.
        total: Tokens kept in all, of each head: the sum of the first one's counts. Where heads
            hold different candidates and their counts add up differently, the others give up
            their weakest tokens, or keep their next strongest.
        exact: Whether a stage keeps to it; False if it only aims at it and may keep more or less.
    """

    groups: Tensor
    counts: Tensor
    total: int
    exact: bool = True

    @classmethod
    def of(cls, groups: Tensor, counts: Tensor, *, exact: bool = True) -> Budget:
        """The budget of these counts."""
        return cls(groups, counts, int(counts.reshape(-1, counts.shape[-1])[0].sum()), exact)


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
