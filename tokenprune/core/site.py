"""Sites: where in a model a stage acts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cache", "Input", "Layer", "Site"]


@dataclass(frozen=True)
class Input:
    """The embeddings that are about to enter the language model."""

    def __str__(self) -> str:
        return "input"


@dataclass(frozen=True)
class Layer:
    """The hidden states that enter decoder layer `index` (from 0) during prefill."""

    index: int

    def __str__(self) -> str:
        return f"layer {self.index}"


@dataclass(frozen=True)
class Cache:
    """The stored keys and values of a layer, right after its attention in prefill.

    Attributes:
        layers: Decoder layers (from 0) at which the stage acts; None for all.
    """

    layers: tuple[int, ...] | None = None

    def covers(self, layer: int) -> bool:
        """Whether the stage acts at the cache of this decoder layer."""
        return self.layers is None or layer in self.layers

    def __str__(self) -> str:
        return "cache"


Site = Input | Layer | Cache
