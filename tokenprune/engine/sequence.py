"""What outlives a forward: the record of a sequence, beside its cache."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.report.report import Call

__all__ = ["Asked", "Prefilled", "Sequence", "Snapshot", "StateKey"]

T = TypeVar("T")

StateKey = tuple[int, type[Any], int]
"""Of state: the number of the recipe's step, the kind, and the row of the batch."""


class Prefilled(NamedTuple):
    """A prompt with media that the sequence holds.

    Attributes:
        start: Logical length before it.
        call: Its layouts, and what was decided.
        alive: For each sample `[P]` bool, which tokens went through all layers.
        continues: Whether its first clip goes on with the last one of the prompt before.
    """

    start: int
    call: Call
    alive: list[Tensor]
    continues: bool = False


class Asked(NamedTuple):
    """The query of a decode step in one layer.

    Attributes:
        query: `[B, heads, 1, d]`.
        rows: `[B, 1]`, its logical index.
    """

    query: Tensor
    rows: Tensor


class Snapshot(NamedTuple):
    """A sequence between two forwards, to go back to; its fields are those of `Sequence`."""

    end: int
    shift: Tensor | None
    prompts: tuple[Prefilled, ...]
    settled: int
    state: dict[StateKey, Any]
    joined: Tensor | None = None


class Sequence:
    """A sequence that a pruned cache holds, shared by the cache's layers.

    Attributes:
        end: Logical length; in a forward, that after it.
        shift: `[B, 1]`, how far positions lag behind logical indices (compact positions only).
        prompts: Those with media, in order. Which of their tokens are still stored, each layer's
            index says.
        settled: So many of them have been through the stages after prefill.
        decoded: Tokens generated since the last of them.
        asked: By layer, the queries since the last decision of stages that decode.
        decides: Whether stages act while tokens are generated.
        state: What stages keep as long as the sequence.
        saved: Fields of state that was read from a file, until a stage asks for it by its kind.
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
        self.restore(Snapshot(0, None, (), 0, {}))

    def snapshot(self) -> Snapshot:
        """What it is now, whatever happens to it later."""
        state = copy.deepcopy(self.state)
        return Snapshot(self.end, self.shift, tuple(self.prompts), self.settled, state, self.joined)

    def restore(self, snapshot: Snapshot) -> None:
        """Make it what it was."""
        self.end, self.shift = snapshot.end, snapshot.shift
        self.prompts = list(snapshot.prompts)
        self.settled, self.decoded = snapshot.settled, 0
        self.asked: dict[int, list[Asked]] = {}
        self.decides = False
        self.state = copy.deepcopy(snapshot.state)
        if not snapshot.prompts:
            self.saved: dict[tuple[int, str, int], dict[str, Any]] = {}
        self.joined = snapshot.joined
        self.rows: Tensor | None = None
        self.holes = False
        self._extended: tuple[Tensor, Tensor, Tensor] | None = None

    def branch(self, rows: int) -> list[Call]:
        """Go on with copies of the prompts' records, which what follows may add to.

        Args:
            rows: Rows that a sequence of one row becomes.

        Returns:
            The copies.
        """
        self.prompts = [
            one._replace(
                call=replace(
                    one.call, layouts=one.call.layouts * rows, decisions=list(one.call.decisions)
                ),
                alive=one.alive * rows,
            )
            for one in self.prompts
        ]
        for (step, kind, _), state in list(self.state.items()):
            for row in range(1, rows):
                self.state[step, kind, row] = copy.deepcopy(state)
        return [one.call for one in self.prompts]

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

    def state_of(self, step: int, kind: type[T], sample: int) -> T:
        """The state of a step's stages for a row of the batch; made where there is none."""
        key = step, kind, sample
        if key not in self.state:
            saved = self.saved.get((step, _path(kind), sample))
            self.state[key] = kind() if saved is None else kind(**saved)
        state: T = self.state[key]
        return state

    def plain_state(self) -> dict[tuple[int, str, int], dict[str, Any]]:
        """The fields of each state, by step, path of its kind, and row of the batch.

        Raises:
            TokenPruneError: A kind is no dataclass.
        """
        found = dict(self.saved)
        for (step, kind, sample), state in self.state.items():
            if not is_dataclass(state):
                raise TokenPruneError(
                    f"{_path(kind)} is no dataclass, so the state of step {step} cannot be saved"
                )
            named = {one.name: getattr(state, one.name) for one in fields(state)}
            found[step, _path(kind), sample] = named
        return found

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
        """Forget what lies beyond a logical length.

        Raises:
            UnsupportedModelError: What was decided while decoding rests on it.
        """
        if self.decides and self.decoded:
            raise UnsupportedModelError(
                "cannot take back generated tokens: stages that act while decoding have decided by "
                "them; use a recipe without such stages, or decode without an assistant"
            )
        self.end = length
        self.prompts = [one for one in self.prompts if one.start < length]
        self.settled = min(self.settled, len(self.prompts))
        self.asked = {}
        self.joined = None if self.joined is None else self.joined[:length]

    def stop(self) -> None:
        """Let nothing be stored until the next forward, which compilers find as it was before."""
        self.rows = self._extended = None


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
