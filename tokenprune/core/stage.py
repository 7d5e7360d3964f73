"""Stages: what a pruning method is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.core.budget import Budget, Keep, allocate, check_budget, check_on
from tokenprune.core.context import Candidates, Context, ModelShape
from tokenprune.core.group import Group
from tokenprune.core.layout import MODALITIES, Modality, Per
from tokenprune.core.selection import Selection
from tokenprune.core.selectors import top_per_group
from tokenprune.core.signal import Signal
from tokenprune.core.site import Cache, Layer, Site
from tokenprune.errors import RecipeError

__all__ = ["Budgeted", "Method", "Scored", "Selective", "Stage"]


class Method(ABC):
    """A published pruning method, or a baseline: a frozen dataclass of settings.

    `@method("name")` above it makes it known by that name to recipes, lists and contract tests. A
    stage that is only a part of another method has that one's name, as a class attribute.
    """

    name: ClassVar[str]
    modalities: ClassVar[frozenset[Modality]] = frozenset(MODALITIES)
    """Kinds of media tokens the method can look at."""

    @property
    def needs(self) -> tuple[Signal[Any], ...]:
        """The signals that its stages read, beside those that are free.

        Free are `Hidden()` at the input and at layers, `Keys()` and `Values()` at a cache. A stage
        that reads none at all decides by where tokens are alone, so a plan can run it.
        """
        return ()

    @property
    def text_dependent(self) -> bool:
        """Whether decisions depend on the prompt's text, so that they serve one question only."""
        return any(signal.text_dependent for signal in self.needs)

    @property
    def group(self) -> Group | None:
        """How much of a prompt the method has prefilled at once; None if it does not care."""
        return None

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
            for signal in stage.needs:
                signal.check(site)
                if signal not in self.needs:
                    raise RecipeError(
                        f"a stage of {self.name} reads {signal}, which the needs of {self.name} do "
                        "not name; add it there"
                    )


class Stage(Method):
    """One decision at one site: settings only, no state."""

    @property
    @abstractmethod
    def site(self) -> Site:
        """Where the stage acts."""

    @property
    def text_dependent(self) -> bool:
        """As of a method; no session has to do without what acts on a question's branch alone."""
        site = self.site
        late = isinstance(site, Cache) and site.after != "layer"
        return super().text_dependent and not late

    @property
    def acts_on(self) -> frozenset[Modality]:
        """Kinds of media tokens among its candidates; others pass by."""
        return self.modalities

    def budget(self, candidates: Candidates) -> Budget:
        """How many candidates of which groups survive, as far as it is known before scoring.

        The engine holds a stage to its bounds; a plan reckons with the counts. By default content
        alone decides.
        """
        return Budget.adaptive(candidates)

    def queries(self, candidates: Candidates) -> Tensor:
        """The tokens whose attention an `Attention(queries="own")` signal shows.

        Returns:
            `[R]` int64, rows of `candidates.layout` among `candidates.rows`.
        """
        raise NotImplementedError(f"{type(self).__name__} reads queries of its own and names none")

    @abstractmethod
    def select(self, context: Context) -> Selection:
        """Decide which candidates survive."""

    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        return (self,)


@dataclass(frozen=True, kw_only=True)
class Selective(Stage):
    """A stage that can be kept to some modalities.

    Args:
        on: Modalities that are pruned; others pass by. None for all that the method can look at.
    """

    on: Modality | tuple[Modality, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "on", check_on(self.on))

    @property
    def acts_on(self) -> frozenset[Modality]:
        on = (self.on,) if isinstance(self.on, str) else self.on
        return self.modalities if on is None else self.modalities.intersection(on)


@dataclass(frozen=True, kw_only=True)
class Budgeted(Selective):
    """A stage whose count is set before anything is scored.

    Args:
        keep: Share or number of tokens kept of each group of `per`, or one of them for each
            modality (others are kept whole).
        per: "prompt", "item", "frame" (an image or sound is one too) or "second".
        on: Modalities that are pruned; others pass by. None for all that the method can look at.
    """

    keep: Keep = 0.5
    per: Per = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", check_budget(self.keep, self.per))

    def budget(self, candidates: Candidates) -> Budget:
        return allocate(self.keep, self.per, candidates)


class Scored(Stage):
    """A stage that keeps the candidates of the highest scores in each group of its budget."""

    @abstractmethod
    def score(self, context: Context) -> Tensor:
        """`[N]`, or `[H, N]` at a cache if each key-value head chooses for itself."""

    def select(self, context: Context) -> Selection:
        scores = self.score(context)
        return Selection(top_per_group(scores, self.budget(context)), scores=scores)
