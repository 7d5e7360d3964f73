"""What methods share that prune the caches of some layers."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.core.site import Cache, Site
from tokenprune.core.stage import Budgeted, Scored
from tokenprune.errors import RecipeError

__all__ = ["ScoredCache", "caches"]


def caches(layers: int | tuple[int, ...] | None) -> Cache:
    """The caches of some decoder layers, from 0; of all for None.

    Raises:
        RecipeError: These are no layers.
    """
    several = (layers,) if isinstance(layers, int) else layers
    if several is not None and not (several and all(type(x) is int for x in several)):
        raise RecipeError(f"layers must be decoder layers or none for all, got {layers!r}")
    return Cache(several)


@dataclass(frozen=True, kw_only=True)
class ScoredCache(Scored, Budgeted):
    """A stage that keeps the cache entries of the highest scores, in some layers or in all.

    Args:
        layers: Decoder layers, from 0, whose caches are pruned; None for all.
    """

    layers: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        caches(self.layers)

    @property
    def site(self) -> Site:
        return caches(self.layers)
