"""Stages: what a pruning method is made of, where it acts, and what it sees there."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.core.layout import MODALITIES, Modality, TokenLayout
from tokenprune.core.selection import Selection
from tokenprune.errors import RecipeError

__all__ = [
    "Cache",
    "CacheContext",
    "Context",
    "Encoder",
    "EncoderStage",
    "EncoderView",
    "Input",
    "Layer",
    "LayerContext",
    "Method",
    "ModelShape",
    "Site",
    "Stage",
    "find_method",
    "list_methods",
]


@dataclass(frozen=True)
class Encoder:
    """Inside the vision tower, at the block whose output becomes the features."""

    def __str__(self) -> str:
        return "encoder"


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

    def __str__(self) -> str:
        return "cache"


Site = Encoder | Input | Layer | Cache


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


class Method(ABC):
    """A published pruning method, or a baseline: a frozen dataclass of settings.

    A subclass in `tokenprune/stages/` is registered under its class name in lower case, and takes
    part in recipes, lists and contract tests from then on. A class that is only a part of another
    method says so: `class _Second(Stage, part=True)`.
    """

    name: ClassVar[str]
    text_dependent: ClassVar[bool] = False
    """Whether decisions depend on the prompt's text, so that they serve one question only."""
    joint: ClassVar[bool] = False
    """Whether decisions weigh a whole prompt at once, so that groups of frames cannot be decided
    one after the other."""
    modalities: ClassVar[frozenset[Modality]] = frozenset(MODALITIES)
    """Kinds of media tokens the method looks at; others are not among its candidates."""

    def __init_subclass__(cls, *, part: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A part goes by the name of its method, if it gives one: users know no other.
        if not part or "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()
        if not part:
            _METHODS[cls.name] = cls

    @abstractmethod
    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        """The stages this method runs on a model of this shape, in order."""

    def check(self, shape: ModelShape) -> None:
        """Check settings that only the model can judge, such as a layer's number.

        Raises:
            RecipeError: They do not fit the model.
        """
        for stage in self.stages(shape):
            site = stage.site
            layers: tuple[int, ...] = (site.index,) if isinstance(site, Layer) else ()
            if isinstance(site, Cache):
                layers = site.layers or ()
            for layer in layers:
                if not 0 <= layer < shape.layers:
                    raise RecipeError(
                        f"{self.name} acts at layer {layer}, but the model has layers 0 to "
                        f"{shape.layers - 1}; choose one of these"
                    )


_METHODS: dict[str, type[Method]] = {}


class Stage(Method, part=True):
    """One decision at one site: settings only, no state."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What the engine must collect for it: "encoder_map", "attention_rows"."""

    @property
    @abstractmethod
    def site(self) -> Site:
        """Where the stage acts."""

    def counts(self, layout: TokenLayout) -> int | None:
        """Tokens kept of these candidates (of each head, at a cache site); None if adaptive."""
        return None

    def expects(self, layout: TokenLayout) -> int:
        """Tokens that a plan reckons with: `counts`, or what an adaptive stage aims at.

        An adaptive stage that aims at nothing is taken to keep all.
        """
        known = self.counts(layout)
        return len(layout) if known is None else known

    @abstractmethod
    def select(self, context: Any) -> Selection:
        """Decide which candidates survive.

        Args:
            context: A `Context`, `LayerContext` or `CacheContext`, as the site has it.
        """

    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        return (self,)


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


class EncoderStage(Stage, part=True):
    """A stage that drops nothing, but makes a map of the encoder's views for later stages."""

    @property
    def site(self) -> Site:
        return Encoder()

    @abstractmethod
    def importance(self, view: EncoderView, grey: Callable[[], Tensor] | None) -> Tensor:
        """Score the tokens of each view.

        Args:
            view: The attention of the block.
            grey: Returns the pixels below each token as grey levels 0..255, `[W, Nv, pixels]`
                float32; None if the family cannot give them.

        Returns:
            `[W, Nv]` float32.
        """

    def select(self, context: Any) -> Selection:
        raise TypeError("an EncoderStage makes a map and selects nothing")


def list_methods() -> dict[str, type[Method]]:
    """All methods by name, those of files dropped into `tokenprune/stages/` included."""
    import tokenprune.methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_METHODS.items()))


def find_method(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        RecipeError: There is none.
    """
    methods = list_methods()
    if name.lower() not in methods:
        raise RecipeError(f"no method {name!r}; known: {', '.join(methods)}")
    return methods[name.lower()]
