"""Stages that only tests have: one that looks at everything, and ones that go to extremes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.budget import Budget, allocate
from tokenprune.core.context import Candidates, Context, EncoderView
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.signal import Attention, EncoderSignal, Signal
from tokenprune.core.site import Cache, Input, Site
from tokenprune.core.stage import Scored, Selective, Stage


@dataclass(frozen=True, eq=False)
class Spy(Stage):
    """Keeps everything, and notes what it was shown.

    Attributes:
        site: Where.
        needs: What it asks for.
        asking: Which of its candidates ask, by number, for signals with queries of its own.
        seen: Each context, with the value of each signal and the tokens that were there.
    """

    site: Site = Input()
    needs: tuple[Signal[Any], ...] = ()
    asking: tuple[int, ...] = ()
    seen: list[tuple[Context, dict[Signal[Any], Any]]] = field(default_factory=list)

    name = "spy"

    def queries(self, candidates: Candidates) -> Tensor:
        return candidates.rows.reshape(-1, len(candidates))[0][torch.tensor(self.asking)]

    def select(self, context: Context) -> Selection:
        self.seen.append((context, {signal: context[signal] for signal in self.needs}))
        return Selection(torch.arange(len(context)))


@dataclass(frozen=True)
class Viewed(EncoderSignal):
    """Notes nothing: what each token receives, two rows, keys and the view's number."""

    what: str = "received"

    def of(self, view: EncoderView) -> Tensor:
        if self.what == "keys":
            return view.keys()
        if self.what == "class":
            return view.class_row()
        if self.what == "rows":
            ends = torch.tensor([[0, view.tokens - 1]]).expand(view.views, 2)
            return view.rows(ends).mT
        return view.received()


@dataclass(frozen=True, kw_only=True)
class Nothing(Selective):
    """Keeps no token at all."""

    at: Site = Input()

    name = "nothing"

    @property
    def site(self) -> Site:
        return self.at

    def select(self, context: Context) -> Selection:
        return Selection(torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True, kw_only=True)
class Absorb(Selective):
    """Keeps every third token, which absorbs itself and the tokens after it up to the next.

    Weights are any numbers: negative ones too, and their sum is not 1.
    """

    at: Site = Input()

    name = "absorb"

    @property
    def site(self) -> Site:
        return self.at

    def budget(self, candidates: Candidates) -> Budget:
        kept = -(-len(candidates) // 3)
        groups = torch.zeros_like(candidates.rows)
        return Budget.of(groups, groups.new_full((*groups.shape[:-1], 1), kept))

    def select(self, context: Context) -> Selection:
        source = torch.arange(len(context))
        weight = torch.tensor([1.25, 0.5, -0.25])[source % 3]
        return Selection(source[::3], Merge(source, source - source % 3, weight))


@dataclass(frozen=True, kw_only=True)
class Half(Scored, Selective):
    """Keeps half of the entries of each key-value head: those that a signal, or their keys, favour.

    Attributes:
        at: Which caches, and when.
        signal: What is looked at; None for the sum of the keys.
    """

    at: Cache = Cache()
    signal: Attention | None = None

    name = "half"

    @property
    def site(self) -> Cache:
        return self.at

    @property
    def needs(self) -> tuple[Signal[Any], ...]:
        return () if self.signal is None else (self.signal,)

    def budget(self, candidates: Candidates) -> Budget:
        return allocate(0.5, "prompt", candidates)

    def score(self, context: Context) -> Tensor:
        if self.signal is None:
            return context.keys.float().sum(dim=-1)
        return context[self.signal]


@dataclass(frozen=True, kw_only=True)
class Clean(Stage):
    """Keeps of each layer's cache what went through all layers."""

    name = "clean"
    site = Cache(after="prefill")

    def select(self, context: Context) -> Selection:
        assert context.alive is not None
        return Selection(context.alive[context.rows[0]].nonzero()[:, 0])


@dataclass(frozen=True, kw_only=True)
class Fold(Selective):
    """Keeps every third entry of a cache, which absorbs those around it.

    Weights are as those of `Absorb`. Where heads differ, each begins at another entry, the odd ones
    absorb less than the others, and pairs of weight 0 fill them up.

    Attributes:
        mass: Whether what is kept stands for as many as it absorbed.
        per_head: Whether heads differ.
        apart: Whether values have weights of their own.
    """

    at: Cache = Cache()
    mass: bool = False
    per_head: bool = False
    apart: bool = False

    name = "fold"

    @property
    def site(self) -> Site:
        return self.at

    def budget(self, candidates: Candidates) -> Budget:
        kept = -(-len(candidates) // 3)
        groups = torch.zeros_like(candidates.rows)
        return Budget.of(groups, groups.new_full((*groups.shape[:-1], 1), kept))

    def select(self, context: Context) -> Selection:
        total, heads = len(context), len(context.rows)
        source = torch.arange(total)
        first = source - source % 3
        if self.per_head:
            shift = torch.arange(heads)[:, None] % 3  # [H, 1]
            source = source.expand(heads, -1)
            target = (first + shift).clamp_max(total - 1)
            index = (torch.arange(0, total, 3) + shift).clamp_max(total - 1)
        else:
            target, index = first, source[::3]
        weight = torch.tensor([1.25, 0.5, -0.25])[source % 3]
        value_weight = torch.tensor([0.375, 0.75, 0.5])[source % 3] if self.apart else None
        if self.per_head:
            less = (torch.arange(heads)[:, None] % 2 == 1) & (source % 3 == 2)
            weight = weight.masked_fill(less, 0)
            value_weight = None if value_weight is None else value_weight.masked_fill(less, 0)
            target = torch.where(less, 0, target)  # any will do, kept or not
        merge = Merge(source, target, weight, value_weight, self.mass)
        return Selection(index, merge)
