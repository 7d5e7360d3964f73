"""What a stage decides: which tokens survive, and who absorbs the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tokenprune.errors import RecipeError

__all__ = ["Merge", "Selection", "check_keep", "count"]


def count(share: float, total: int) -> int:
    """Round a share of `total` tokens to a number of tokens: half up, and at least one.

    A share that is a rounding error of binary fractions below a half is a half: 0.7 of 45 is 32,
    though `0.7 * 45` is 31.499999999999996.
    """
    if total == 0:
        return 0
    return min(total, max(1, math.floor(share * total + 0.5 + 1e-9)))


def check_keep(keep: float | int, *, name: str = "keep") -> None:
    """Check a budget.

    Raises:
        RecipeError: It is neither a share in (0, 1] nor a count of at least 1.
    """
    whole = isinstance(keep, int) and not isinstance(keep, bool)
    share = isinstance(keep, float) and 0.0 < keep <= 1.0
    if not (share or (whole and keep >= 1)):
        raise RecipeError(f"{name} must be a share in (0, 1] or a count >= 1, got {keep!r}")


@dataclass(frozen=True)
class Merge:
    """Tokens that are absorbed by others, as rows of the stage's candidates.

    The new feature of a target is the weighted sum of its sources. A target takes part with its
    own old feature only if it is listed as one of its own sources.

    Attributes:
        source: `[M]` int64, rows that give.
        target: `[M]` int64, rows that receive; every one of them is kept.
        weight: `[M]` float, any finite numbers: they sum to 1 for a mean, and need not.
    """

    source: Tensor
    target: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        if not self.source.shape == self.target.shape == self.weight.shape or self.source.ndim != 1:
            raise ValueError("source, target and weight of a Merge must all be [M]")


@dataclass(frozen=True)
class Selection:
    """Which of a stage's `N` candidates survive.

    Attributes:
        index: `[K]` int64, or `[H, K]` at a cache site (a set for each key-value head): kept
            candidates in increasing order, counted among the candidates. `K` may be 0.
        merge: Who absorbs whom, counted among the candidates, at the input and at layers; None if
            what is not kept is dropped for good.
        scores: `[N]` or `[H, N]`, for pictures and reports; None if the stage has none.
    """

    index: Tensor
    merge: Merge | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.ndim not in (1, 2) or self.index.is_floating_point():
            shape = tuple(self.index.shape)
            raise ValueError(f"Selection.index must be integers [K] or [H, K], got {shape}")

    def __repr__(self) -> str:
        return f"Selection(index={tuple(self.index.shape)}, merge={self.merge is not None})"
