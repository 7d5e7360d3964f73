"""Baselines that every method has to beat: random and evenly spread tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.core.budget import (
    Budget,
    Per,
    allocate,
    check_budget,
)
from tokenprune.core.context import CacheContext, Context, LayerContext
from tokenprune.core.layout import TokenLayout
from tokenprune.core.selection import Selection
from tokenprune.core.selectors import top_per_group, uniform_per_group
from tokenprune.core.site import (
    Cache,
    Input,
    Layer,
    Site,
)
from tokenprune.core.stage import Stage
from tokenprune.errors import RecipeError

__all__ = ["Random", "Uniform"]


@dataclass(frozen=True, kw_only=True)
class _Baseline(Stage, part=True):
    """A choice that looks at nothing but where tokens are."""

    keep: float | int = 0.5
    at: str | int = "input"
    per: Per = "prompt"

    def __post_init__(self) -> None:
        check_budget(self.keep, self.per)
        layer = isinstance(self.at, int) and not isinstance(self.at, bool) and self.at >= 0
        if not layer and self.at not in ("input", "cache"):
            raise RecipeError(f'at must be "input", "cache" or a decoder layer, got {self.at!r}')

    @property
    def site(self) -> Site:
        if isinstance(self.at, int):
            return Layer(self.at)
        return Input() if self.at == "input" else Cache()

    def budget(self, layout: TokenLayout, rows: Tensor | None = None) -> Budget:
        return allocate(self.keep, self.per, layout, rows)

    def _budget(self, context: Context | CacheContext) -> Budget:
        rows = context.rows if isinstance(context, CacheContext) else None
        return self.budget(context.layout, rows)


@dataclass(frozen=True, kw_only=True)
class Random(_Baseline):
    """Keep tokens at random, each key-value head its own at a cache site.

    The choice depends on the seed, the layer and the number of candidates only: a sample in a
    batch is pruned as if alone, and beams agree. With the same seed a smaller budget per prompt
    keeps a subset of what a larger one keeps.

    Args:
        keep: Share or number of tokens kept of each group of `per`.
        at: "input", "cache", or the number of the decoder layer (from 0) they enter.
        per: "prompt", "item", "frame" (an image or sound is one too) or "second".
        seed: Seed of the draws.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int):
            raise RecipeError(f"seed must be a whole number, got {self.seed!r}")

    def select(self, context: Context | CacheContext) -> Selection:
        budget = self._budget(context)
        layer = context.layer if isinstance(context, LayerContext | CacheContext) else -1
        draws = _draws(tuple(budget.groups.shape), self.seed, layer)
        return Selection(top_per_group(draws.to(budget.groups.device), budget))


@dataclass(frozen=True, kw_only=True)
class Uniform(_Baseline):
    """Keep evenly spread tokens, the same in every head.

    Args:
        keep: Share or number of tokens kept of each group of `per`.
        at: "input", "cache", or the number of the decoder layer (from 0) they enter.
        per: "prompt", "item", "frame" (an image or sound is one too) or "second".
    """

    def select(self, context: Context | CacheContext) -> Selection:
        return Selection(uniform_per_group(self._budget(context)))


def _draws(shape: tuple[int, ...], seed: int, layer: int) -> Tensor:
    """Random scores, drawn on the CPU so that every device sees the same ones."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer + 1) % 2**63)
    return torch.rand(shape, generator=generator)
