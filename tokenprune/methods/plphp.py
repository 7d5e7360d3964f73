"""PLPHP: layers that look at media more keep more of it, and each head keeps its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokenprune.core.budget import Budget, group_sizes, round_share
from tokenprune.core.context import Candidates, Context
from tokenprune.core.layout import AUDIO, TokenLayout
from tokenprune.core.registry import method
from tokenprune.core.selection import Selection
from tokenprune.core.selectors import top_per_group
from tokenprune.core.signal import Attention
from tokenprune.core.site import Site
from tokenprune.core.stage import Selective
from tokenprune.errors import RecipeError
from tokenprune.methods._caches import caches

__all__ = ["PLPHP"]

Kinds = tuple[float, float]
"""A number for vision and one for audio."""


@dataclass
class _Seen:
    """What is known of a prompt from one layer to the next.

    Attributes:
        scores: Of the layers seen so far.
        columns: Of the layout: span and "is sound" of each token `[P]`, and how many spans.
    """

    scores: list[Kinds] = field(default_factory=list)
    columns: tuple[Tensor, Tensor, int] | None = None


@method("plphp")
@dataclass(frozen=True, kw_only=True)
class PLPHP(Selective):
    """Prune the cache after prefill: a rate for each layer, a choice for each key-value head.

    Method: PLPHP (https://arxiv.org/abs/2502.14504). A layer's score is the share of the last
    prompt token's attention that falls on media, averaged over query heads. Layers of at least
    `alpha` keep `keep + shift` of the media tokens, layers below `beta` keep `keep - shift`, the
    others `keep`. Each key-value head keeps the tokens that get most of its attention, so many of
    each image or frame. Prefill and the first generated token are those of the unpruned model.

    The paper's method section and code were not available to us; only that rates follow the
    layer's attention and that heads choose on their own is confirmed. Our choices, none of them
    the paper's numbers: all defaults, the last prompt token as the only query, the mean over the
    query heads of a group, rounding half up, quotas for each frame of a video, and a score and a
    rate of its own for sound. Until thresholds are calibrated, `alpha` and `beta` are 1.25 and
    0.75 times the mean score of the layers seen so far in this prefill, this one included: the
    first layer is balanced.

    Args:
        keep: Base share of media tokens kept.
        shift: What attentive layers gain and indifferent ones lose; None is 0.2, or less where
            `keep` is nearer to 0 or 1.
        alpha: Score from which a layer is attentive; None follows the layers seen so far.
        beta: Score below which a layer is indifferent; None follows the layers seen so far.
        layers: Decoder layers to prune, from 0; None is all.
        span: What gets a quota: each "image-or-frame" (or sound), or each "item" (a whole clip).
        least: Tokens that every head keeps of each span at least, whatever the layer's rate.
        on: Modalities that are pruned; None for all.
    """

    keep: float = 0.4
    shift: float | None = None
    alpha: float | None = None
    beta: float | None = None
    layers: int | tuple[int, ...] | None = None
    span: Literal["image-or-frame", "item"] = "image-or-frame"
    least: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keep, float) or not 0 < self.keep <= 1:
            raise RecipeError(
                f"keep must be a share in (0, 1], got {self.keep!r}; plphp moves it up and down "
                "by layer, so it takes no count: write 0.4, or 1.0 for all"
            )
        room = min(self.keep, 1 - self.keep)
        if self.shift is not None and not 0 <= self.shift <= room + 1e-9:
            raise RecipeError(
                f"shift must be between 0 and {room:g}, so that keep={self.keep!r} plus and minus "
                f"it are shares, got {self.shift!r}"
            )
        self._check_thresholds()
        caches(self.layers)
        if self.span not in ("image-or-frame", "item"):
            raise RecipeError(f'span must be "image-or-frame" or "item", got {self.span!r}')
        if not isinstance(self.least, int) or self.least < 1:
            raise RecipeError(f"least must be a count of at least 1, got {self.least!r}")

    def _check_thresholds(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None and not 0 <= value <= 1:
                raise RecipeError(
                    f"{name} is a share of attention and must be in [0, 1], got {value!r}"
                )
        if self.alpha is not None and self.beta is not None and self.beta > self.alpha:
            raise RecipeError(
                f"beta must not exceed alpha, got beta={self.beta:g} and alpha={self.alpha:g}"
            )

    @property
    def site(self) -> Site:
        return caches(self.layers)

    @property
    def needs(self) -> tuple[Attention]:
        return (Attention(),)

    def budget(self, candidates: Candidates) -> Budget:
        """What a balanced layer keeps; an attentive and an indifferent one are the bounds."""
        rows = candidates.rows if candidates.rows.ndim == 1 else candidates.rows[0]
        spans = self._spans(candidates.layout).to(rows.device)[rows]  # heads differ in few
        rates = self.keep - self._shift(), self.keep, self.keep + self._shift()
        shares = torch.tensor(rates, dtype=torch.float64, device=rows.device)[:, None]
        counts = round_share(shares, group_sizes(spans), self.least)  # [3, G]
        least, total, most = counts.sum(dim=-1).tolist()
        return Budget(spans.expand_as(candidates.rows), counts[1], total, least, most)

    def select(self, context: Context) -> Selection:
        rows, attention = context.rows, context[self.needs[0]][:, 0]  # [heads, N]
        seen = context.state(_Seen)
        spans, sound, number = self._columns(context, seen)  # [H, N]
        kinds = self._layer_rates(_media_share(attention, sound), seen)
        # In double precision: 0.7 of 45 tokens must round as it does everywhere.
        rate = torch.tensor(kinds, dtype=torch.float64, device=rows.device)[sound.long()]
        sizes = group_sizes(spans, number)  # [H, G]
        rates = torch.zeros_like(sizes, dtype=torch.float64).scatter(-1, spans, rate)
        scores = context.by_kv_head(attention)  # [H, N]
        budget = Budget.of(spans, round_share(rates, sizes, self.least))
        return Selection(top_per_group(scores, budget), scores=scores)

    def rate(self, score: float, mean: float) -> float:
        """Share of media tokens that a layer keeps.

        Args:
            score: Its attention to media.
            mean: Mean score of the layers seen so far.
        """
        alpha = 1.25 * mean if self.alpha is None else self.alpha
        beta = 0.75 * mean if self.beta is None else self.beta
        if score >= alpha:
            return min(1.0, self.keep + self._shift())
        return max(0.0, self.keep - self._shift()) if score < beta else self.keep

    def _shift(self) -> float:
        return min(0.2, self.keep, 1 - self.keep) if self.shift is None else self.shift

    def _spans(self, layout: TokenLayout) -> Tensor:
        return layout.spans() if self.span == "image-or-frame" else layout.groups("item")

    def _columns(self, context: Context, seen: _Seen) -> tuple[Tensor, Tensor, int]:
        """Span and "is sound" of each candidate, `[H, N]`, and how many spans there are."""
        if seen.columns is None:
            spans = self._spans(context.layout)
            seen.columns = spans, context.layout.modality == AUDIO, int(spans.max()) + 1
        spans, sound, number = seen.columns
        rows = context.rows
        return spans.to(rows.device)[rows], sound.to(rows.device)[rows], number

    def _layer_rates(self, scores: Kinds, seen: _Seen) -> Kinds:
        seen.scores.append(scores)
        number = len(seen.scores)
        vision, sound = (sum(kind) / number for kind in zip(*seen.scores, strict=True))
        return self.rate(scores[0], vision), self.rate(scores[1], sound)


def _media_share(attention: Tensor, sound: Tensor) -> Kinds:
    """Attention mass on vision and on sound, averaged over query heads.

    Args:
        attention: `[heads, N]`.
        sound: `[H, N]` bool: which candidates are audio.
    """
    heads = sound.repeat_interleave(len(attention) // len(sound), dim=0)
    masses = torch.stack([attention.where(~heads, 0.0), attention.where(heads, 0.0)])
    vision, audio = masses.sum(dim=-1).mean(dim=-1).tolist()
    return vision, audio
