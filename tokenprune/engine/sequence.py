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


class Sequence:
    """A sequence that a pruned cache holds, shared by the cache's layers.

    Attributes:
        end: Logical length; in a forward, that after it.
        shift: `[B, 1]`, how far positions lag behind logical indices (compact positions only).
        prompts: Those with media, in order. Which of their tokens are still stored, each layer's
            index says.
        state: What stages keep as long as the sequence.
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
        return Snapshot(self.end, self.shift, tuple(self.prompts), copy.deepcopy(self.state))

    def restore(self, snapshot: Snapshot) -> None:
        """Make it what it was."""
        self.end, self.shift = snapshot.end, snapshot.shift
        self.prompts = list(snapshot.prompts)
        self.state = copy.deepcopy(snapshot.state)
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

    def crop(self, length: int) -> None:
        """Forget what lies beyond a logical length."""
        self.end = length
        self.prompts = [one for one in self.prompts if one.start < length]

    def stop(self) -> None:
        """Let nothing be stored until the next forward, which compilers find as it was before."""
        self.rows = self._extended = None
