"""Signals: what a stage asks the engine to collect for it, and reads as `context[signal]`.

A stage names its signals in `needs`. They are checked before any work, and collected once, however
many stages ask. A stage without `needs` decides by where tokens are, and by what is free to read:
`Hidden()` at the input and at layers, `Keys()` and `Values()` at a cache. If it reads none of these
either, a plan can run it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    NoReturn,
    TypeVar,
    get_args,
)

from torch import Tensor

from tokenprune.core.site import Cache, Input, Layer, Site
from tokenprune.errors import RecipeError

if TYPE_CHECKING:
    from tokenprune.core.context import EncoderView

__all__ = [
    "INPUT",
    "Attention",
    "EncoderSignal",
    "Frames",
    "Hidden",
    "Keys",
    "Question",
    "Reduce",
    "Signal",
    "Text",
    "Values",
]

T_co = TypeVar("T_co", covariant=True)
Reduce = Literal["mean", "sum", "max"]

INPUT: Final = "input"
"""In place of a layer: what enters the language model."""


class Signal(ABC, Generic[T_co]):
    """Something to be collected; frozen and hashable. `T_co` is what a stage gets."""

    text_dependent: bool = False
    """Whether it depends on the prompt's text, so that decisions serve one question only."""

    def check(self, site: Site) -> None:
        """Check that it exists at a site.

        Raises:
            RecipeError: It does not.
        """
        return

    def _refuse(self, site: Site, rule: str) -> NoReturn:
        raise RecipeError(f"{self} cannot be had at {site}: {rule}")


def _refuse_late(signal: Signal[Any], site: Site) -> None:
    if _is_late(site):
        signal._refuse(site, "prompts before have gone, and only their cache is left")


class _OfLayer(Signal[Tensor]):
    """A signal of a decoder layer, counted from the one that the stage is at."""

    layer: int

    def check(self, site: Site) -> None:
        if isinstance(site, Input):
            self._refuse(site, "no layer has run; act at Layer(0) instead, layer=0")
        allowed = (0,) if isinstance(site, Cache) else (-1, 0)
        if self.layer not in allowed:
            what = (
                "the layer whose cache it is"
                if isinstance(site, Cache)
                else ("the layer about to run, and -1, the one before it")
            )
            self._refuse(site, f"layer must be 0, {what}")
        if isinstance(site, Layer) and site.index + self.layer < 0:
            self._refuse(site, "no layer comes before; use layer=0, the layer about to run")
        if _is_late(site) and not getattr(self, "rotary", True):
            self._refuse(site, "what is stored is rotated; use rotary=True")


def _is_late(site: Site) -> bool:
    """Whether a stage acts on what was stored before, of whatever prompt."""
    return isinstance(site, Cache) and site.after != "layer"


@dataclass(frozen=True, kw_only=True)
class Attention(_OfLayer):
    """Softmaxed attention of some queries to the candidates, `[heads, R, N]` float32.

    The softmax runs over all that the query sees, text included. Query heads read the candidates
    of their key-value head. Heads are reduced first, then queries; nothing as large as the whole
    attention is ever made.

    Args:
        layer: At a `Layer` site 0 is the layer about to run and -1 the one before it; at a `Cache`
            site it is 0.
        queries: The last so many tokens of the prompt; all "text" after the media; the stage's
            "own" choice among media tokens (`Stage.queries`); or at a cache after "decode" all
            "since" the stage's last decision, for which queries are kept that long.
        rotary: Whether queries and keys are rotated. Without rotation only the tokens of the
            prompt at hand are seen, for stored keys are rotated.
        reduce: Over queries: `[heads, N]`.
        heads: Over query heads that have the same candidates: all of them at a `Layer` site
            (`[R, N]`, or `[N]` with `reduce`), those of a key-value head at a `Cache` site
            (`[H, R, N]` or `[H, N]`).
    """

    layer: int = 0
    queries: int | Literal["text", "own", "since"] = 1
    rotary: bool = True
    reduce: Reduce | None = None
    heads: Reduce | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.queries, int) and not isinstance(self.queries, bool)
        if not (number and int(self.queries) >= 1) and self.queries not in _QUERIES:
            raise RecipeError(
                'queries must be a number of tokens of at least 1, "text", "own" or "since", '
                f"got {self.queries!r}"
            )
        for name, value in (("reduce", self.reduce), ("heads", self.heads)):
            if value is not None and value not in get_args(Reduce):
                known = ", ".join(get_args(Reduce))
                raise RecipeError(f"{name} must be one of {known} or None, got {value!r}")

    @property
    def text_dependent(self) -> bool:  # type: ignore[override]  # a constant of other signals
        return self.queries != "own"

    def check(self, site: Site) -> None:
        super().check(site)
        decoding = isinstance(site, Cache) and site.after == "decode"
        if decoding and self.queries not in (1, "since"):
            self._refuse(site, 'a decode step has one query; use queries=1 or "since"')
        if not decoding and self.queries == "since":
            self._refuse(site, 'there is no decision before; use it with Cache(after="decode")')
        if _is_late(site) and self.queries == "own":
            self._refuse(site, "media tokens have asked before; use queries=1")


_QUERIES: Final = ("text", "own", "since")

Of = Literal["media", "text"]


class _Stored(_OfLayer):
    """What a layer stores of the candidates, or of the prompt's text."""

    of: Of

    def __post_init__(self) -> None:
        if self.of not in get_args(Of):
            raise RecipeError(f"of must be one of {', '.join(get_args(Of))}, got {self.of!r}")

    @property
    def text_dependent(self) -> bool:  # type: ignore[override]  # a constant of other signals
        return self.of == "text"


@dataclass(frozen=True, kw_only=True)
class Keys(_Stored):
    """Keys of the candidates, or of the prompt's text, `[H, N, d]` in the model's precision.

    Args:
        layer: As in `Attention`.
        rotary: Whether they are rotated, as the cache stores them.
        of: "media" for the candidates; "text" for all text of the prompt at hand, in order.
    """

    layer: int = 0
    rotary: bool = True
    of: Of = "media"


@dataclass(frozen=True, kw_only=True)
class Values(_Stored):
    """Values of the candidates, or of the prompt's text, `[H, N, d]`; as `Keys`."""

    layer: int = 0
    of: Of = "media"


@dataclass(frozen=True, kw_only=True)
class Hidden(Signal[Tensor]):
    """Hidden states of the candidates, `[N, D]`.

    At a `Cache` site where an earlier stage left heads different candidates, `[H, N, D]`.

    Args:
        layer: 0 for what enters the layer at hand (at `Input`, the model); INPUT for what entered
            the language model, merges at the input included.
    """

    layer: Literal[0, "input"] = 0

    def __post_init__(self) -> None:
        if self.layer not in (0, INPUT):
            raise RecipeError(f'layer must be 0 or "input", got {self.layer!r}')

    def check(self, site: Site) -> None:
        _refuse_late(self, site)


@dataclass(frozen=True, kw_only=True)
class Text(Signal[Tensor]):
    """Embeddings of the prompt's text, `[T, D]`, as they enter the language model.

    Args:
        after: Only of the text after the last media token.
    """

    after: bool = True
    text_dependent = True

    def check(self, site: Site) -> None:
        _refuse_late(self, site)


@dataclass(frozen=True)
class Question(Signal[str]):
    """The question as the caller gave it: `prune(..., question=...)`; `ask` gives it by itself."""

    text_dependent = True


@dataclass(frozen=True)
class Frames(Signal[list[Tensor]]):
    """The pictures of each clip (of each image, without clips) of the sample, `[F, 3, H, W]` uint8.

    They are what the caller gave: `prune(..., frames=...)`; `ask` and `Session` give them by
    themselves.
    """

    def check(self, site: Site) -> None:
        _refuse_late(self, site)


class EncoderSignal(Signal[Tensor]):
    """Something computed from the attention of the encoder's last block, while it runs.

    Subclass it as a frozen dataclass of settings. `[N]`, or `[N, C]`, of the candidates: what `of`
    returns, pooled and packed as the model does its features.
    """

    per: ClassVar[Literal["token", "view"]] = "token"
    """"view" if `of` returns a vector for each view; then the signal is `[G, C]`, a vector for each
    image, frame or sound of the sample (`TokenLayout.spans`), the mean over its views."""

    @property
    def class_token(self) -> bool:
        """Whether it must have a class token; towers without one are refused before any work.

        What reads one only where there is one asks the view: `EncoderView.has_class`.
        """
        return False

    def check(self, site: Site) -> None:
        _refuse_late(self, site)

    @abstractmethod
    def of(self, view: EncoderView) -> Tensor:
        """Compute it for some views.

        Returns:
            `[W, Nv]` or `[W, Nv, C]`; `[W, C]` where `per` is "view". Float32.
        """
