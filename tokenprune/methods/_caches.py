"""What methods share that score the entries of caches."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.core.site import Cache, Site
from tokenprune.core.stage import Budgeted, Scored
from tokenprune.errors import RecipeError

__all__ = ["ScoredCache"]


@dataclass(frozen=True, kw_only=True)
class ScoredCache(Scored, Budgeted):
    """A stage that keeps the cache entries of the highest scores, in some layers or in all.

    Args:
        layers: Decoder layers, from 0, whose caches are pruned; None for all.
    """

    layers: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and not (
            self._layers and all(type(x) is int for x in self._layers)
        ):
            raise RecipeError(f"layers must be decoder layers or none for all, got {self.layers!r}")

    @property
    def site(self) -> Site:
        return Cache(self._layers)

    @property
    def _layers(self) -> tuple[int, ...] | None:
        return (self.layers,) if isinstance(self.layers, int) else self.layers
