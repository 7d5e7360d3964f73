"""Budgets: how many tokens of which groups survive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from tokenprune.core.context import Candidates
from tokenprune.core.layout import MODALITIES, Modality, Per
from tokenprune.core.selection import check_keep, count
from tokenprune.errors import RecipeError

__all__ = [
    "Budget",
    "Keep",
    "KeepEach",
    "allocate",
    "check_budget",
    "check_on",
    "group_sizes",
    "round_share",
]


class KeepEach(Mapping[Modality, float | int]):
    """A budget for each modality; modalities without one are kept whole. It hashes.

    Raises:
        RecipeError: A modality is unknown, or there is none.
    """

    def __init__(self, each: Mapping[Modality, float | int]) -> None:
        self._each = {name: each[name] for name in _kinds(each, "keep")}

    def __getitem__(self, modality: Modality) -> float | int:
        return self._each[modality]

    def __iter__(self) -> Iterator[Modality]:
        return iter(self._each)

    def __len__(self) -> int:
        return len(self._each)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        mine, others = ({n: (v, type(v)) for n, v in one.items()} for one in (self, other))
        return mine == others

    def __hash__(self) -> int:
        return hash(tuple(self._each.items()))

    def __repr__(self) -> str:
        return repr(self._each)


Keep = float | int | Mapping[Modality, float | int]
"""A share, a count, or one of them for each modality, such as `{"audio": 0.5, "video": 0.2}`."""


class Budget(NamedTuple):
    """How many tokens of each group survive.

    Attributes:
        groups: `[N]` or `[H, N]` int64, group of each candidate, from 0.
        counts: `[G]` or `[H, G]` int64, tokens kept of each group, or expected to be.
        total: Tokens kept in all, of each head: the sum of the first one's counts. Where heads
            hold different candidates and their counts add up differently, the others give up
            their weakest tokens, or keep their next strongest.
        least: The engine holds the stage to keep at least so many in all,
        most: and at most so many; both are `total` where the count is exact.
    """

    groups: Tensor
    counts: Tensor
    total: int
    least: int
    most: int

    @classmethod
    def of(
        cls, groups: Tensor, counts: Tensor, *, least: int | None = None, most: int | None = None
    ) -> Budget:
        """The budget of these counts, exact unless bounds are given."""
        total = int((counts if counts.ndim == 1 else counts[0]).sum())
        return cls(
            groups,
            counts,
            total,
            total if least is None else least,
            total if most is None else most,
        )

    @classmethod
    def adaptive(cls, candidates: Candidates) -> Budget:
        """Content alone decides: anything from none to all; a plan reckons with all."""
        groups = torch.zeros_like(candidates.rows)
        total = len(candidates)
        return cls(groups, groups.new_full((1,), total), total, 0, total)

    @property
    def exact(self) -> bool:
        """Whether the count is known before anything is scored."""
        return self.least == self.most


def check_budget(keep: Keep, per: str) -> Keep:
    """Check a budget and what it is spent over.

    Returns:
        `keep`, hashable.

    Raises:
        RecipeError: One is out of range, or `keep` is the int 1 per prompt.
    """
    if per not in get_args(Per):
        raise RecipeError(f"per must be one of {', '.join(get_args(Per))}, got {per!r}")
    if isinstance(keep, Mapping):
        keep = KeepEach(keep)
        for modality, one in keep.items():
            check_keep(one, name=f"keep.{modality}")
        return keep
    check_keep(keep)
    if per == "prompt" and isinstance(keep, int) and keep == 1:
        raise RecipeError(
            "keep=1 keeps a single token of the whole prompt, which is likely a slip; "
            "write keep=1.0 to keep all of them"
        )
    return keep


def check_on(
    on: Modality | tuple[Modality, ...] | None,
) -> Modality | tuple[Modality, ...] | None:
    """Check a choice of modalities.

    Returns:
        It in the one form that compares equal: a name, or several in a fixed order, or None.

    Raises:
        RecipeError: One is unknown, or there is none.
    """
    if on is None:
        return None
    kinds = _kinds(on if isinstance(on, tuple | list) else (on,), "on")
    return kinds if len(kinds) > 1 else kinds[0]


def _kinds(kinds: Iterable[str], name: str) -> tuple[Modality, ...]:
    chosen = tuple(kinds)
    unknown = [one for one in chosen if one not in list(MODALITIES)]  # or it has to hash
    if unknown or not chosen:
        got = repr(unknown[0]) if unknown else "none"
        raise RecipeError(f"{name} must name some of {', '.join(MODALITIES)}, got {got}")
    return tuple(one for one in MODALITIES if one in chosen)


def allocate(keep: Keep, per: Per, candidates: Candidates) -> Budget:
    """Spend a budget over groups of tokens: a share (at least one token) or a count of each.

    Args:
        keep: As users write it.
        per: What a group is.
        candidates: Whose groups they are.
    """
    groups = candidates.groups(per)
    if isinstance(keep, Mapping):
        return _allocate_each(keep, groups, candidates)
    if per == "prompt":
        # Needs no look at the tensors, so that no device has to wait.
        number = len(candidates)
        total = count(keep, number) if isinstance(keep, float) else min(keep, number)
        return Budget(groups, torch.full((1,), total, device=groups.device), total, total, total)
    return Budget.of(groups, _counts(keep, group_sizes(groups)))


def _allocate_each(
    keep: Mapping[Modality, float | int], groups: Tensor, candidates: Candidates
) -> Budget:
    """A budget for each modality: groups are told apart by it."""
    rows = candidates.rows
    kind = candidates.layout.modality.to(rows.device)[rows]
    split = groups * (len(MODALITIES) + 1) + kind
    sizes = group_sizes(split)
    counts = sizes.clone()  # what has no budget is kept whole
    for modality, one in keep.items():
        mine = slice(MODALITIES[modality], None, len(MODALITIES) + 1)
        counts[..., mine] = _counts(one, sizes[..., mine])
    return Budget.of(split, counts)


def _counts(keep: float | int, sizes: Tensor) -> Tensor:
    return sizes.clamp(max=keep) if isinstance(keep, int) else round_share(keep, sizes)


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
