"""Stages: what a pruning method is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.core.budget import Budget
from tokenprune.core.context import EncoderView, ModelShape
from tokenprune.core.layout import MODALITIES, Modality, TokenLayout
from tokenprune.core.registry import register
from tokenprune.core.selection import Selection
from tokenprune.core.site import Cache, Encoder, Layer, Site
from tokenprune.errors import RecipeError

__all__ = ["EncoderStage", "Method", "Stage"]


class Method(ABC):
    """A published pruning method, or a baseline: a frozen dataclass of settings.

    A subclass in `tokenprune/methods/` is registered under its class name in lower case, and takes
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
            register(cls.name, cls)

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


class Stage(Method, part=True):
    """One decision at one site: settings only, no state."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What the engine must collect for it: "encoder_map", "attention_rows"."""

    @property
    @abstractmethod
    def site(self) -> Site:
        """Where the stage acts."""

    def budget(self, layout: TokenLayout, rows: Tensor | None = None) -> Budget | None:
        """How many tokens of which groups survive, known before anything is scored.

        The engine holds a stage to an exact budget; a plan reckons with any. A stage without one
        is adaptive, and a plan takes it to keep all.

        Args:
            layout: The candidates, or the tokens that `rows` refers to.
            rows: `[H, N]`, the candidates of each key-value head at a cache site; None if they are
                the layout.
        """
        return None

    @abstractmethod
    def select(self, context: Any) -> Selection:
        """Decide which candidates survive.

        Args:
            context: A `Context`, `LayerContext` or `CacheContext`, as the site has it.
        """

    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        return (self,)


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
