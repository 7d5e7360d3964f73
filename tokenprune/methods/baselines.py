"""Baselines that every method has to beat: random and evenly spread tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.core.context import Context
from tokenprune.core.registry import method
from tokenprune.core.selection import Selection
from tokenprune.core.selectors import top_per_group, uniform_per_group
from tokenprune.core.site import Cache, Input, Layer, Site
from tokenprune.core.stage import Budgeted
from tokenprune.errors import RecipeError

__all__ = ["Random", "Uniform"]


@dataclass(frozen=True, kw_only=True)
class _Baseline(Budgeted):
    """A choice that looks at nothing but where tokens are."""

    at: str | int = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        layer = isinstance(self.at, int) and not isinstance(self.at, bool) and self.at >= 0
        if not layer and self.at not in ("input", "cache"):
            raise RecipeError(f'at must be "input", "cache" or a decoder layer, got {self.at!r}')

    @property
    def site(self) -> Site:
        if isinstance(self.at, int):
            return Layer(self.at)
        return Input() if self.at == "input" else Cache()


@method("random")
@dataclass(frozen=True, kw_only=True)
class Random(_Baseline):
    """Keep tokens at random, each key-value head its own at a cache site.

    The choice depends on the seed, the layer and the number of candidates only: a sample in a
    batch is pruned as if alone, and beams agree. With the same seed a smaller budget per prompt
    keeps a subset of what a larger one keeps.

    Args:
        keep: Share or number of tokens kept of each group of `per`, or one for each modality.
        per: "prompt", "item", "frame" (an image or sound is one too) or "second".
        on: Modalities that are pruned; None for all.
        at: "input", "cache", or the number of the decoder layer (from 0) they enter.
        seed: Seed of the draws.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int):
            raise RecipeError(f"seed must be a whole number, got {self.seed!r}")

    def select(self, context: Context) -> Selection:
        budget = self.budget(context)
        draws = _draws(
            tuple(budget.groups.shape), self.seed, -1 if context.layer is None else context.layer
        )
        return Selection(top_per_group(draws.to(budget.groups.device), budget))


@method("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(_Baseline):
    """Keep evenly spread tokens, the same in every head.

    Args:
        keep: Share or number of tokens kept of each group of `per`, or one for each modality.
        per: "prompt", "item", "frame" (an image or sound is one too) or "second".
        on: Modalities that are pruned; None for all.
        at: "input", "cache", or the number of the decoder layer (from 0) they enter.
    """

    def select(self, context: Context) -> Selection:
        return Selection(uniform_per_group(self.budget(context)))


def _draws(shape: tuple[int, ...], seed: int, layer: int) -> Tensor:
    """Random scores, drawn on the CPU so that every device sees the same ones."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer + 1) % 2**63)
    return torch.rand(shape, generator=generator)
