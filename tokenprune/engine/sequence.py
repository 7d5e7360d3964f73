"""What outlives a forward: the record of a sequence, beside its cache."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError
from tokenprune.report.report import Call

__all__ = ["Prefilled", "Sequence", "Snapshot", "StateKey"]

StateKey = tuple[int, type[Any], int]
"""Of state: the number of the recipe's step, the kind, and the row of the batch."""


class Prefilled(NamedTuple):
    """A prompt with media that the sequence holds.

    Attributes:
        start: Logical length before it.
        call: Its layouts, and what was decided.
    """

    start: int
    call: Call


class Snapshot(NamedTuple):
    """A sequence between two forwards, to go back to; its fields are those of `Sequence`."""

    end: int
    shift: Tensor | None
    prompts: tuple[Prefilled, ...]
    state: dict[StateKey, Any]
    joined: Tensor | None = None


class Sequence:
    """A sequence that a pruned cache holds, shared by the cache's layers.

    Attributes:
        end: Logical length; in a forward, that after it.
        shift: `[B, 1]`, how far positions lag behind logical indices (compact positions only).
        prompts: Those with media, in order. Which of their tokens are still stored, each layer's
            index says.
        state: What stages keep as long as the sequence.
        joined: `[n]` bool by logical length: whether a sequence cut to it would hold a part of
            what was merged in a cache; False beyond its end. None if nothing was.
        rows: `[B, Q]` logical index of each hidden state in flight, -1 for holes; None between
            forwards, when nothing may be stored.
        holes: Whether `rows` has any.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.restore(Snapshot(0, None, (), {}))

    def snapshot(self) -> Snapshot:
        """What it is now, whatever happens to it later."""
        state = copy.deepcopy(self.state)
        return Snapshot(self.end, self.shift, tuple(self.prompts), state, self.joined)

    def restore(self, snapshot: Snapshot) -> None:
        """Make it what it was."""
        self.end, self.shift = snapshot.end, snapshot.shift
        self.prompts = list(snapshot.prompts)
        self.state = copy.deepcopy(snapshot.state)
        self.joined = snapshot.joined
        self.rows: Tensor | None = None
        self.holes = False
        self._extended: tuple[Tensor, Tensor, Tensor] | None = None

    def extend(self, index: Tensor, empty: bool) -> Tensor:
        """Append the rows in flight to a layer's index `[B, H, S]`.

        Layers with one and the same index get one and the same result, so that masks built from
        it are built once.

        Args:
            index: What the layer stores.
            empty: Whether that is nothing.
        """
        if self.rows is None:
            raise UnsupportedModelError(
                "this cache was pruned: its stored tokens are not the whole sequence; "
                "go on inside `with prune(model, ...)`, or start with a fresh cache"
            )
        if self._extended is not None:
            old, rows, new = self._extended
            if old is index and rows is self.rows:
                return new
        if empty:
            new = self.rows[:, None]
        else:
            new = torch.cat([index, self.rows[:, None].expand(-1, index.shape[1], -1)], dim=-1)
        self._extended = (index, self.rows, new)
        return new

    def join(self, source: Tensor, target: Tensor) -> None:
        """Note that entries were merged: which tokens gave, and which received, pair by pair."""
        first, last = torch.minimum(source, target), torch.maximum(source, target)
        steps = torch.zeros(self.end + 1, dtype=torch.int64, device=first.device)
        one = torch.ones_like(first.flatten())
        steps.index_add_(0, first.flatten() + 1, one).index_add_(0, last.flatten() + 1, -one)
        joined = steps.cumsum(0) > 0  # first < length <= last for some pair
        if self.joined is not None:
            joined[: len(self.joined)] |= self.joined.to(joined.device)
        self.joined = joined

    def check_crop(self, length: int) -> None:
        """Check that what lies beyond a logical length can be forgotten.

        Raises:
            UnsupportedModelError: Tokens from before it and beyond it were merged into one entry.
        """
        if self.joined is not None and length < len(self.joined) and bool(self.joined[length]):
            raise UnsupportedModelError(
                f"cannot take the cache back to {length} tokens: some from before and some beyond "
                "were merged into one entry; take back less, or all of that prompt's media, or "
                "start with a fresh cache"
            )

    def crop(self, length: int) -> None:
        """Forget what lies beyond a logical length."""
        self.end = length
        self.prompts = [one for one in self.prompts if one.start < length]
        self.joined = None if self.joined is None else self.joined[:length]

    def stop(self) -> None:
        """Let nothing be stored until the next forward, which compilers find as it was before."""
        self.rows = self._extended = None
