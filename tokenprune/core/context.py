"""Contexts: what a stage sees at its site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenprune.core.layout import TokenLayout

__all__ = ["CacheContext", "Context", "EncoderView", "LayerContext", "ModelShape"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a language model, known before anything runs."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    head_width: int


@dataclass
class Context:
    """What a stage sees of one sample at the `Input` site.

    Attributes:
        layout: The `N` candidates: media tokens of this sample that are still alive.
        features: `[N, D]`, their embeddings or hidden states.
        shape: Sizes of the language model.
        memory: What stages of one method hand to later ones, under the method's name. It belongs
            to this sample of this prefill and dies with it.
        encoder_map: Returns the map that an `EncoderStage` made, aligned to the candidates:
            `[N]` float32. Its argument is the name the stage carries.
    """

    layout: TokenLayout
    features: Tensor
    shape: ModelShape
    memory: dict[str, Any]
    encoder_map: Callable[[str], Tensor]


@dataclass
class LayerContext(Context):
    """What a stage sees of one sample at a `Layer` site: `features` are hidden states."""

    layer: int = 0


@dataclass
class CacheContext:
    """What a stage sees of one sample at a `Cache` site.

    Attributes:
        layer: Decoder layer, from 0.
        layout: The media tokens of the prompt that entered this layer, `P` of them.
        rows: `[H, N]` int64: row of `layout` of candidate `n` in key-value head `h`. All heads
            hold equally many; they differ only after an earlier cache stage.
        keys: `[H, N, d]`, as cached (after rotation).
        values: `[H, N, d]`.
        attention: `[heads, N]` float32, softmaxed attention of the last prompt token to the
            candidates (query heads; the softmax runs over text too), if the stage needs
            "attention_rows"; a query head reads the candidates of its key-value head.
        shape: Sizes of the language model.
        memory: As in `Context`.
    """

    layer: int
    layout: TokenLayout
    rows: Tensor
    keys: Tensor
    values: Tensor
    attention: Tensor | None
    shape: ModelShape
    memory: dict[str, Any]


class EncoderView(ABC):
    """Attention inside one block of a tower, for `W` views of `Nv` tokens each.

    A view is one image, tile or frame. Nothing here ever holds `[Nv, Nv]` for all heads: rows are
    streamed in blocks. A class token takes part in the softmax; then its row and column are
    dropped and rows are normalised again. All results are float32, averaged over heads.
    """

    views: int
    tokens: int

    @abstractmethod
    def received(self) -> Tensor:
        """`[W, Nv]`: attention that each token receives, summed over all queries; sums to Nv."""

    @abstractmethod
    def rows(self, queries: Tensor) -> Tensor:
        """`[W, R, Nv]`: the attention rows of some query tokens, `queries` `[W, R]` int64."""
