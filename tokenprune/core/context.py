"""Contexts: what a stage sees at its site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tokenprune.core.layout import Per, TokenLayout
from tokenprune.core.signal import Hidden, Keys, Signal, Values

__all__ = ["Candidates", "Context", "EncoderView", "Lifetime", "ModelShape"]

T = TypeVar("T")

Lifetime = Literal["prompt", "sequence"]
"""How long state lives: as long as the prefill of a prompt, or as its cache."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a language model, known before anything runs."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    head_width: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidates:
    """The tokens that a stage may keep: all that is known before anything is looked at.

    Attributes:
        layout: The `P` media tokens of the sample's prompt, at every site; at a cache after
            "prefill" or "decode" those of all prompts that the sequence holds.
        rows: `[N]` int64, the candidates as rows of `layout`, increasing; at a cache `[H, N]`, for
            each key-value head. All heads hold equally many; they differ only after an earlier
            cache stage.
        shape: Sizes of the language model.
        layer: Decoder layer, from 0; None at the input.
        alive: `[P]` bool, at a cache after "prefill" or "decode": which tokens went through all
            layers, however few of their entries are left; None elsewhere.
    """

    layout: TokenLayout
    rows: Tensor
    shape: ModelShape
    layer: int | None = None
    alive: Tensor | None = None

    def __len__(self) -> int:
        return self.rows.shape[-1]

    @cached_property
    def tokens(self) -> TokenLayout:
        """The layout of the candidates, `N` of them; at a cache those of the first head."""
        rows = self.rows if self.rows.ndim == 1 else self.rows[0]
        return self.layout if len(rows) == len(self.layout) else self.layout[rows]

    def groups(self, per: Per) -> Tensor:
        """The group of each candidate, `[N]` or `[H, N]` int64 from 0; not all need have one."""
        if per == "prompt":
            return torch.zeros_like(self.rows)
        return self.layout.groups(per).to(self.rows.device)[self.rows]


@dataclass(frozen=True, eq=False, kw_only=True)
class Context(Candidates):
    """What a stage sees of one sample at its site.

    Attributes:
        collect: Gives a signal for these candidates; `context[signal]` calls it.
        make_state: Gives the state of a kind; `context.state` calls it.
    """

    collect: Callable[[Signal[Any]], Any]
    make_state: Callable[[type[Any], Lifetime], Any]

    def __getitem__(self, signal: Signal[T]) -> T:
        """The value of a signal that the stage named in `needs`."""
        value: T = self.collect(signal)
        return value

    @property
    def features(self) -> Tensor:
        """`[N, D]`: what enters the model or the layer; at the input and at layers alone."""
        return self[Hidden()]

    @property
    def keys(self) -> Tensor:
        """`[H, N, d]`: the stored keys, after rotation; at a cache alone."""
        return self[Keys()]

    @property
    def values(self) -> Tensor:
        """`[H, N, d]`: the stored values; at a cache alone."""
        return self[Values()]

    def state(self, kind: type[T], *, lives: Lifetime = "prompt") -> T:
        """What stages of one method hand to later ones, for this sample.

        Args:
            kind: A class without required arguments; the first who asks makes the object. Each
                step of a recipe has its own.
            lives: "prompt" for the prefill of this prompt; "sequence" for as long as the cache,
                with which it is rolled back.
        """
        made: T = self.make_state(kind, lives)
        return made

    def by_kv_head(self, scores: Tensor) -> Tensor:
        """The mean over the query heads of each key-value head: `[heads, ...]` -> `[H, ...]`."""
        return scores.view(self.shape.kv_heads, -1, *scores.shape[1:]).mean(dim=1)


class EncoderView(ABC):
    """Attention inside one block of a tower, for `W` views of `Nv` tokens each.

    A view is one image, tile, frame, sound or window of a sound. Nothing here ever holds
    `[Nv, Nv]` for all heads: rows are streamed in blocks. A class token takes part in the softmax;
    then its row and column are dropped and rows are normalised again. All results are float32.

    Attributes:
        views: `W`.
        tokens: `Nv`, without a class token.
        has_class: Whether the tower has a class token.
    """

    views: int
    tokens: int
    has_class: bool

    @abstractmethod
    def received(self) -> Tensor:
        """`[W, Nv]`: attention that each token receives, summed over all queries; sums to Nv.

        Averaged over heads.
        """

    @abstractmethod
    def rows(self, queries: Tensor) -> Tensor:
        """`[W, R, Nv]`: the attention rows of some query tokens, `queries` `[W, R]` int64.

        Averaged over heads.
        """

    @abstractmethod
    def class_row(self) -> Tensor:
        """`[W, Nv]`: the attention row of the class token, averaged over heads; sums to 1."""

    @abstractmethod
    def keys(self) -> Tensor:
        """`[W, Nv, d]`: keys, averaged over heads."""

    @abstractmethod
    def class_key(self) -> Tensor:
        """`[W, d]`: the key of the class token, averaged over heads."""

    @abstractmethod
    def grey(self) -> Tensor:
        """`[W, Nv, pixels]`: the pixels below each token as grey levels 0..255.

        Raises:
            RecipeError: The family cannot give them.
        """
