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

    What a target becomes is the weighted sum of its sources, as they were before. A target takes
    part with what it was itself only if it is listed as one of its own sources.

    At the input and at layers features are merged, at a cache keys and values, those of each
    key-value head by themselves. There heads may differ: `[H, M]`, and a head with fewer pairs
    than others is filled up with pairs of weight 0 (in `weight`, and in `value_weight` if that is
    given), whose source and target may be any candidates. At a cache such a pair is none at all.

    Attributes:
        source: `[M]` int64, rows that give; `[H, M]` at a cache where heads differ.
        target: As `source`: rows that receive; every one of them is kept.
        weight: As `source`, any finite numbers: they sum to 1 for a mean, and need not.
        value_weight: As `weight`, for values; at a cache alone. None: values are weighed as keys.
        mass: Whether a target stands for as many entries as its sources did together, at a cache
            alone: an entry that was never merged for one, and one that stands for n has log n
            added to its attention logits from then on. If not, it counts as it did before.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    value_weight: Tensor | None = None
    mass: bool = False

    def __post_init__(self) -> None:
        shape = self.source.shape
        weights = self.weight if self.value_weight is None else self.value_weight
        alike = shape == self.target.shape == self.weight.shape == weights.shape
        if not alike or len(shape) not in (1, 2):
            raise ValueError("source, target and weights of a Merge must all be [M], or all [H, M]")


@dataclass(frozen=True)
class Selection:
    """Which of a stage's `N` candidates survive.

    Attributes:
        index: `[K]` int64, or `[H, K]` at a cache site (a set for each key-value head): kept
            candidates in increasing order, counted among the candidates. `K` may be 0.
        merge: Who absorbs whom, counted among the candidates; None if what is not kept is dropped
            for good.
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
