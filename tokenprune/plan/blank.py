"""Stages on tokens without content: what they leave, and what is certain of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from tokenprune.core.context import Context
from tokenprune.core.layout import MODALITIES, Modality, TokenLayout
from tokenprune.core.selection import Selection
from tokenprune.core.selectors import uniform_per_group
from tokenprune.core.signal import Signal
from tokenprune.core.site import Site
from tokenprune.core.stage import Stage

__all__ = ["BlankStage", "Known"]


@dataclass
class Known:
    """What is certain of the media tokens that are left; shared by the stages of a recipe.

    Attributes:
        groups: `[S]` int64 by position in the sequence: how many tokens are left of each group is
            known. None while it is known which tokens these are.
        mixed: Whether tokens of several kinds of media are in one group.
        lost: Whether nothing is certain.
    """

    groups: Tensor | None = None
    mixed: bool = False
    lost: bool = False

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is learnt inside the `with` block is forgotten after it."""
        before = vars(self).copy()
        yield
        vars(self).update(before)

    def settles(self, layout: TokenLayout, groups: Tensor, modalities: int) -> bool:
        """Whether it is known how many candidates each group of a budget has.

        Args:
            layout: The `N` candidates.
            groups: `[N]` int64, of the budget.
            modalities: How many kinds of media the stage looks at.
        """
        if self.lost or (self.mixed and modalities < len(MODALITIES)):
            return False
        if self.groups is None or not len(groups):
            return True
        known = self._groups(layout)[layout.position]
        pairs = known * (int(groups.max()) + 1) + groups
        return len(torch.unique(pairs)) == len(torch.unique(known))

    def narrow(self, layout: TokenLayout, groups: Tensor) -> None:
        """Go on knowing only how many are left of each group of a budget, `[N]`."""
        self.groups = self._groups(layout).clone()
        self.groups[layout.position] = groups + int(self.groups.max()) + 1
        kinds = torch.unique(groups * (len(MODALITIES) + 1) + layout.modality)
        self.mixed = self.mixed or len(kinds) > len(torch.unique(groups))

    def _groups(self, layout: TokenLayout) -> Tensor:
        """`groups`, long enough for a layout; tokens that none narrowed are groups of their own."""
        known = torch.zeros(0, dtype=torch.int64) if self.groups is None else self.groups
        first, length = len(known), int(layout.position.max()) + 1
        unused = int(known.max()) + 1 if first else 0
        return torch.cat([known, torch.arange(unused, unused + max(0, length - first))])


@dataclass(eq=False)
class BlankStage(Stage):
    """Stands in for a stage where there is no content to look at.

    A stage that looks at nothing but the layout decides as it will. For any other, evenly spread
    tokens stand in, as many of each group as its budget says. It promises no count itself, so that
    every selection is made here.

    Attributes:
        stage: The stage.
        known: What earlier stages leave, updated as this one acts.
        kept: Tokens kept, each time it acted.
        exact: Whether all of these are certain.
    """

    stage: Stage
    known: Known
    kept: list[int] = field(default_factory=list)
    exact: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.stage.name)

    @property
    def site(self) -> Site:
        return self.stage.site

    @property
    def acts_on(self) -> frozenset[Modality]:
        return self.stage.acts_on

    @property
    def mean(self) -> float:
        """Tokens kept, averaged over the times it acted."""
        return round(sum(self.kept) / len(self.kept), 2) if self.kept else 0.0

    def select(self, context: Context) -> Selection:
        budget, layout = self.stage.budget(context), context.tokens
        groups = None
        if budget.exact:
            groups = budget.groups.reshape(-1, len(layout))[0]  # heads differ in nothing certain
        if groups is not None and not self.known.settles(layout, groups, len(self.acts_on)):
            groups = None
        self.exact = self.exact and groups is not None
        try:
            selection = self.stage.select(replace(context, collect=_absent))
            placed = self.known.groups is None
        except _NeedsContentError:
            selection = Selection(uniform_per_group(budget))
            placed = False
        if groups is None:
            self.known.lost = True
        elif selection.index.shape[-1] < len(layout) and not placed:
            self.known.narrow(layout, groups)
        self.kept.append(selection.index.shape[-1])
        return Selection(selection.index)


class _NeedsContentError(Exception):
    """A stage asked for what only a run can show."""


def _absent(signal: Signal[Any]) -> NoReturn:
    raise _NeedsContentError
