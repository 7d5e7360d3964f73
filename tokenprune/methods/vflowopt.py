"""VFlowOpt: one map of the encoder's attention drives three rounds of pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from tokenprune.core.budget import check_on
from tokenprune.core.context import ModelShape
from tokenprune.core.layout import Modality
from tokenprune.core.registry import method
from tokenprune.core.stage import Method, Stage
from tokenprune.errors import RecipeError
from tokenprune.methods._vflowopt import Importance, VFlowOptInput, VFlowOptLayer

__all__ = ["VFlowOpt", "last_share", "mean_share", "stage_lengths"]

Lengths = tuple[int, int, int]


class _Strategy(NamedTuple):
    r1: float
    r2: float
    r3: float
    t: float
    cell: float


_TINY: Final = 1e-9

# What the authors released for LLaVA-OneVision-7B (28 layers, views of 27 x 27 tokens).
_RELEASED: Final = {
    0.5: _Strategy(0.72332, 0.74875, 0.487, 28.683, 11.757),
    0.25: _Strategy(0.26510, 0.98334, 0.87733, 34.760, 15.581),
    0.1: _Strategy(0.11662, 1.0, 0.6011, 39.265, 17.387),
}


@method("vflowopt")
@dataclass(frozen=True, kw_only=True)
class VFlowOpt(Method):
    """Prune by encoder attention in three rounds, and recycle some of the first round's tokens.

    Method: VFlowOpt (https://arxiv.org/abs/2508.05211). Its importance map is the mean attention
    row of the encoder's anchor tokens (those that receive more than `t` times the average
    attention), plus `alpha` times the softmax of the patches' entropy. Before the language model
    a share `r1` is kept, and the strongest grid cells of the others are merged into one token
    each; a share `r2` of the rest goes on at layer `L // 3`, and `r3` of that at `2 * (L // 3)`.
    The question plays no part.

    Where the paper is silent or leaves it to tuning, the defaults are our choice: `r1` 1.2 times
    `keep`, `r2` 1, `t` 0.05 times the tokens of a view, `alpha` 0 and cells of 0.55 of the
    canvas. Where we deviate:

    - anchor rows are averaged (as in the authors' code), not summed, so that `alpha` means the
      same whatever the number of anchors; a view without anchors takes the mean of all rows;
    - exactly `r1` of the tokens leave the first round, recycled ones included;
    - videos and several images recycle too (their code does not), on each frame or tile;
    - entropy reads true grey levels, and tokens that an encoder merges average their patches';
    - negative importance ranks, but weighs nothing in a merge;
    - positions stay the original ones, as in the paper (their code renumbers after round one).

    A model of fewer than three decoder layers has round one only, with `r1 = keep`.

    Args:
        keep: Share of tokens kept, averaged over decoder layers.
        r1: Share kept before the language model; None derives it from `keep`.
        r2: Share of these kept at the second round; None is 1.
        r3: Share of those kept at the third; None derives it from the budget.
        t: Anchor threshold, in multiples of the average received attention.
        alpha: Weight of the entropy, -1 to 1; other than 0 it needs the pixels.
        cell: Side of a grid cell in tokens; None is 0.55 of each canvas side, at least 2.
        recycled: Largest share of round one's tokens that are recycled ones; 0 merges nothing.
        per: Shares are of each "item" (image or clip), or of the whole "prompt".
        log_base: Base of the entropy's logarithm (2 in the authors' code).
        strategy: "llava-onevision-7b" takes what the authors tuned for that one model at `keep`
            0.5, 0.25 or 0.1. On another model it is a guess, and its budget is only near `keep`.
        on: "image" or "video" to prune these alone; None for both.
    """

    keep: float = 0.1
    r1: float | None = None
    r2: float | None = None
    r3: float | None = None
    t: float | None = None
    alpha: float = 0.0
    cell: float | None = None
    recycled: float = 0.25
    per: Literal["item", "prompt"] = "item"
    log_base: float = 2.0
    strategy: Literal["llava-onevision-7b"] | None = None
    on: Modality | tuple[Modality, ...] | None = None

    modalities = frozenset[Modality]({"image", "video"})

    def __post_init__(self) -> None:
        if not isinstance(self.keep, float) or not 0 < self.keep <= 1:
            raise RecipeError(
                f"keep must be a share in (0, 1], got {self.keep!r}; the budget of vflowopt is a "
                "mean over layers, so it takes no count: write 0.1 for a tenth, 1.0 for all"
            )
        for name in ("r1", "r2", "r3"):
            value = getattr(self, name)
            _check(value is None or 0 < value <= 1, name, "a share in (0, 1]", value)
        _check(self.t is None or self.t >= 0, "t", "at least 0", self.t)
        _check(-1 <= self.alpha <= 1, "alpha", "between -1 and 1", self.alpha)
        _check(self.cell is None or self.cell >= 1, "cell", "at least 1 token", self.cell)
        _check(0 <= self.recycled <= 1, "recycled", "a share in [0, 1]", self.recycled)
        _check(self.per in ("item", "prompt"), "per", '"item" or "prompt"', self.per)
        _check(self.log_base > 1, "log_base", "above 1", self.log_base)
        object.__setattr__(self, "on", check_on(self.on))
        self._check_strategy()

    def _check_strategy(self) -> None:
        if self.strategy is None:
            return
        name = "llava-onevision-7b"
        _check(self.strategy == name, "strategy", f'"{name}" or none', self.strategy)
        released = ", ".join(map(str, _RELEASED))
        _check(self.keep in _RELEASED, "keep", f"one of {released} with a strategy", self.keep)
        if self.alpha or any(v is not None for v in (self.r1, self.r2, self.r3, self.t, self.cell)):
            raise RecipeError(f"strategy {name} sets r1, r2, r3, t, alpha and cell; leave them out")

    @property
    def needs(self) -> tuple[Importance]:
        t = _RELEASED[self.keep].t if self.strategy else self.t
        return (Importance(t=t, alpha=self.alpha, log_base=self.log_base),)

    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        first, second, third = self.shares(shape.layers)
        layer = shape.layers // 3
        cell = _RELEASED[self.keep].cell if self.strategy else self.cell
        common: dict[str, Any] = {"importance": self.needs[0], "per": self.per, "on": self.on}
        rounds: list[Stage] = []
        if first < 1:
            rounds.append(VFlowOptInput(keep=first, cell=cell, recycled=self.recycled, **common))
        if second < 1:
            rounds.append(VFlowOptLayer(layer=layer, keep=second, **common))
        if third < 1:
            rounds.append(VFlowOptLayer(layer=2 * layer, keep=third, **common))
        return tuple(rounds)

    def shares(self, layers: int) -> tuple[float, float, float]:
        """Shares kept in the three rounds on a model of so many decoder layers.

        Raises:
            RecipeError: No shares meet the budget with these settings.
        """
        given = (self.r1, self.r2, self.r3)
        if layers < 3:
            if self.strategy or any(share is not None for share in given):
                raise RecipeError(
                    "r1, r2, r3 and strategy need at least 3 decoder layers, the model has "
                    f"{layers}; set keep alone"
                )
            return self.keep, 1.0, 1.0
        if self.strategy:
            return _RELEASED[self.keep][:3]
        return _solve(self.keep, *given, lengths=stage_lengths(layers))


def _check(valid: bool, name: str, rule: str, value: object) -> None:
    if not valid:
        raise RecipeError(f"{name} must be {rule}, got {value!r}")


def stage_lengths(layers: int) -> Lengths:
    """Decoder layers before, between and after the second and third round."""
    third = layers // 3
    return third, third, layers - 2 * third


def mean_share(r1: float, r2: float, r3: float, lengths: Lengths) -> float:
    """Share of the tokens that a decoder layer sees on average."""
    shares = (r1, r1 * r2, r1 * r2 * r3)
    return sum(s * n for s, n in zip(shares, lengths, strict=True)) / sum(lengths)


def last_share(keep: float, r1: float, r2: float, lengths: Lengths) -> float:
    """The `r3` that meets the budget; infeasible settings give values outside (0, 1]."""
    left = keep * sum(lengths) - r1 * lengths[0] - r1 * r2 * lengths[1]
    return left / lengths[2] / (r1 * r2)


def _solve(
    keep: float, r1: float | None, r2: float | None, r3: float | None, *, lengths: Lengths
) -> tuple[float, float, float]:
    r2 = 1.0 if r2 is None else r2
    if r3 is None:
        r1 = min(1.0, 1.2 * keep) if r1 is None else r1
        r3 = last_share(keep, r1, r2, lengths)
        if not _TINY < r3 <= 1 + _TINY:
            raise RecipeError(_infeasible(keep, r1, r2, r3, lengths))
        return r1, r2, _near_one(r3)
    if r1 is None:
        r1 = keep / mean_share(1.0, r2, r3, lengths)
        if r1 > 1 + _TINY:
            most = mean_share(1.0, r2, r3, lengths)
            raise RecipeError(
                f"r2={r2:g} and r3={r3:g} keep at most {most:.4g} of the tokens on average, "
                f"less than keep={keep:g}; raise them, or leave r3 out"
            )
        return _near_one(r1), r2, r3
    mean = mean_share(r1, r2, r3, lengths)
    if abs(mean - keep) > 0.01 * keep:
        raise RecipeError(
            f"r1={r1:g}, r2={r2:g} and r3={r3:g} keep {mean:.4g} of the tokens on average over "
            f"{sum(lengths)} layers, not keep={keep:g}; leave one of r1 and r3 out, or set "
            f"keep={mean:.4g}"
        )
    return r1, r2, r3


def _near_one(share: float) -> float:
    return 1.0 if share > 1 - _TINY else share


def _infeasible(keep: float, r1: float, r2: float, r3: float, lengths: Lengths) -> str:
    first, second, third = lengths
    total = keep * sum(lengths)
    least, most = total / (first + r2 * (second + third)), total / (first + r2 * second)
    if least <= 1:
        # An `r1` of `most` would leave nothing for the last layers.
        end = f"{most:.4g})" if most <= 1 else "1]"
        remedy = f"with this r2, r1 must lie in [{least:.4g}, {end}"
    else:
        remedy = f"r2 must be at least {(total - first) / (second + third):.4g}"
    return (
        f"r1={r1:g} and r2={r2:g} need r3={r3:.4g} to keep {keep:g} on average over "
        f"{sum(lengths)} layers, and r3 must be in (0, 1]; {remedy}"
    )
