"""Sites: where in a model a stage acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenprune.errors import RecipeError

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
    """The stored keys and values of a layer.

    Attributes:
        layers: Decoder layers (from 0) at which the stage acts; None for all.
        after: "layer" for right after the layer's attention in prefill; candidates are the prompt's
            tokens. "prefill" for once after the last layer, when the whole prompt is there (in a
            session with each question, for that question alone), and "decode" for every so many
            tokens that are generated; candidates are all media entries that the cache still
            stores, of whatever prompt or group.
        every: How many tokens, with `after="decode"`.
    """

    layers: tuple[int, ...] | None = None
    after: Literal["layer", "prefill", "decode"] = "layer"
    every: int = 1

    def __post_init__(self) -> None:
        if self.after not in ("layer", "prefill", "decode"):
            raise RecipeError(f'after must be "layer", "prefill" or "decode", got {self.after!r}')
        whole = isinstance(self.every, int) and not isinstance(self.every, bool)
        if not whole or self.every < 1 or (self.every > 1 and self.after != "decode"):
            raise RecipeError(
                "every must be a number of generated tokens of at least 1, for "
                f'after="decode" alone, got {self.every!r}'
            )

    def covers(self, layer: int) -> bool:
        """Whether the stage acts at the cache of this decoder layer."""
        return self.layers is None or layer in self.layers

    def __str__(self) -> str:
        return "cache" if self.after == "layer" else f"cache after {self.after}"


Site = Input | Layer | Cache
