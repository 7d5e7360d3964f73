"""PyramidDrop: the deeper the layer, the fewer media tokens it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

import torch
from torch import Tensor

from tokenprune.core.budget import Budget, allocate, check_on, group_sizes
from tokenprune.core.context import Candidates, Context, ModelShape
from tokenprune.core.layout import MODALITIES, Modality, Per
from tokenprune.core.registry import method
from tokenprune.core.signal import Attention
from tokenprune.core.site import Layer, Site
from tokenprune.core.stage import Method, Scored, Selective, Stage
from tokenprune.errors import RecipeError

__all__ = ["PyramidDrop", "mean_share", "solve_ratio"]

_ATTENTION: Final = Attention(layer=0, queries=1, reduce="mean", heads="mean")


@method("pyramiddrop")
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Method):
    """Keep fewer and fewer tokens from layer to layer, those that the last token attends to most.

    Method: PyramidDrop (https://arxiv.org/abs/2410.17247). At several decoder layers a share of
    the prompt's media tokens goes on. The score is the attention that the prompt's last token
    pays to each in the layer about to run, averaged over heads. The paper's shares halve three
    times, at 1/4, 1/2 and 3/4 of the depth, which is 0.469 of the tokens in the mean over layers.

    Shares are of the tokens of the original prompt, not of those left; where stages of other
    methods have left fewer, all of these stay. Where we deviate: positions stay the original ones
    (the authors' code renumbers them). Our choices: the last token of the prompt as the last one
    of the instruction, whatever the chat template puts there; shares rounded half up, for each
    group of `per`; layers `L * i // 4` of models of any depth; and `keep`, which sets the mean and
    derives shares from it that fall by the same ratio at each layer, 1/2 for 0.46875 where 4
    divides the depth.

    Args:
        keep: Share of tokens kept, averaged over decoder layers; None takes `shares`.
        layers: Decoder layers, from 0, that fewer tokens enter; None is the three of the paper.
        shares: Share of the prompt's tokens that goes on at each of them; None derives them from
            `keep`, or without it halves them each time.
        per: Shares are of each "item", "frame" or "second", or of the whole "prompt".
        on: Modalities that are pruned; None for all.
    """

    keep: float | None = None
    layers: int | tuple[int, ...] | None = None
    shares: float | tuple[float, ...] | None = None
    per: Per = "prompt"
    on: Modality | tuple[Modality, ...] | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and not (isinstance(self.keep, float) and 0 < self.keep <= 1):
            raise RecipeError(
                f"keep must be a share in (0, 1], got {self.keep!r}; the budget of pyramiddrop is "
                "a mean over layers, so it takes no count: write 0.4, or 1.0 for all"
            )
        if self.keep is not None and self.shares is not None:
            raise RecipeError("keep and shares both say how much is kept; leave one of them out")
        if self.per not in get_args(Per):
            raise RecipeError(f"per must be one of {', '.join(get_args(Per))}, got {self.per!r}")
        object.__setattr__(self, "on", check_on(self.on))
        self._check_layers()
        self._check_shares()

    def _check_layers(self) -> None:
        layers = self._layers
        if layers is not None and not (
            layers
            and all(type(one) is int and one >= 0 for one in layers)
            and all(one < other for one, other in zip(layers, layers[1:], strict=False))
        ):
            raise RecipeError(f"layers must be decoder layers that increase, got {self.layers!r}")

    def _check_shares(self) -> None:
        shares = self._shares
        if shares is None:
            return
        if not all(type(one) in (int, float) for one in shares) or not all(
            0 < other <= one for one, other in zip((1.0, *shares), shares, strict=False)
        ):
            raise RecipeError(
                "shares must be in (0, 1] and may not grow, for they are of the prompt's tokens, "
                f"got {self.shares!r}"
            )
        number = 3 if self._layers is None else len(self._layers)
        if len(shares) != number:
            raise RecipeError(f"shares must be {number}, one for each layer, got {self.shares!r}")

    @property
    def _layers(self) -> tuple[int, ...] | None:
        return (self.layers,) if isinstance(self.layers, int) else self.layers

    @property
    def _shares(self) -> tuple[float, ...] | None:
        return (self.shares,) if isinstance(self.shares, int | float) else self.shares

    @property
    def needs(self) -> tuple[Attention]:
        return (_ATTENTION,)

    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        return tuple(
            _Drop(layer=layer, share=share, per=self.per, on=self.on)
            for layer, share in self.schedule(shape.layers).items()
            if share < 1
        )

    def schedule(self, depth: int) -> dict[int, float]:
        """The share of the prompt's tokens that goes on, by the layer that they enter.

        Args:
            depth: How many decoder layers there are.

        Raises:
            RecipeError: There is no such layer, or no shares meet `keep` with these.
        """
        layers = self._layers or tuple(depth * quarter // 4 for quarter in (1, 2, 3))
        if layers[-1] >= depth:
            raise RecipeError(
                f"pyramiddrop acts at layer {layers[-1]}, but the model has layers 0 to "
                f"{depth - 1}; choose one of these"
            )
        shares = self._shares
        if shares is None:
            ratio = 0.5 if self.keep is None else solve_ratio(self.keep, layers, depth)
            shares = tuple(ratio**number for number in range(1, len(layers) + 1))
        return dict(zip(layers, shares, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Drop(Scored, Selective):
    """One layer of the pyramid.

    Args:
        layer: Decoder layer, from 0, that the kept tokens enter.
        share: Share of the prompt's tokens that goes on.
        per: What it is a share of.
        on: Modalities that are pruned; None for all.
    """

    layer: int
    share: float
    per: Per

    name = "pyramiddrop"

    @property
    def site(self) -> Site:
        return Layer(self.layer)

    @property
    def needs(self) -> tuple[Attention]:
        return (_ATTENTION,)

    def budget(self, candidates: Candidates) -> Budget:
        kind = candidates.layout.modality.to(candidates.rows.device)
        ours = torch.isin(kind, kind.new_tensor([MODALITIES[one] for one in sorted(self.acts_on)]))
        all_of_them = replace(candidates, rows=ours.nonzero()[:, 0])
        counts = allocate(self.share, self.per, all_of_them).counts
        groups = candidates.groups(self.per)
        return Budget.of(groups, counts.minimum(group_sizes(groups, len(counts))))

    def score(self, context: Context) -> Tensor:
        return context[_ATTENTION]  # [N]


def mean_share(shares: Sequence[float], layers: Sequence[int], depth: int) -> float:
    """Share of the tokens that a decoder layer sees on average.

    Args:
        shares: That go on.
        layers: At these, increasing.
        depth: How many layers there are.
    """
    bounds = (0, *layers, depth)
    lengths = (end - start for start, end in zip(bounds, bounds[1:], strict=False))
    return sum(s * n for s, n in zip((1.0, *shares), lengths, strict=True)) / depth


def solve_ratio(keep: float, layers: Sequence[int], depth: int) -> float:
    """The ratio of shares, each to the one before, with which `keep` is their mean over layers.

    Raises:
        RecipeError: The layers before the first of `layers` alone keep more.
    """

    def mean(ratio: float) -> float:
        shares = [ratio**number for number in range(1, len(layers) + 1)]
        return mean_share(shares, layers, depth)

    if keep <= mean(0.0):
        raise RecipeError(
            f"pyramiddrop keeps all tokens until layer {layers[0]} of {depth}, so keep must be "
            f"above {mean(0.0):.4g}, got {keep!r}; raise it, or let layers begin earlier"
        )
    low, high = 0.0, 1.0
    for _ in range(60):  # beyond the precision of a float
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < keep else (low, middle)
    return high
