"""Prefilling a prompt part by part, within one call of the language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.flight import Flight
from tokenprune.engine.laid import LaidPrompt
from tokenprune.engine.prompt import Given
from tokenprune.engine.schedule import Schedule
from tokenprune.engine.sequence import Prefilled, Sequence
from tokenprune.errors import RecipeError
from tokenprune.report.report import Call

__all__ = ["PartedPrompt", "PartsDone", "check_parted", "cut_call", "with_hidden"]


@dataclass(frozen=True)
class Part:
    """A part of a prompt.

    Attributes:
        start: Where it begins in the unpruned sequence, and
        stop: where it ends.
        laid: Its media tokens.
        schedule: Which stages act on it.
        given: What the caller knows, and whether other parts follow.
    """

    start: int
    stop: int
    laid: LaidPrompt
    schedule: Schedule
    given: Given


@dataclass(frozen=True)
class PartedPrompt:
    """A prompt, and where its parts begin and end in the unpruned sequence."""

    laid: LaidPrompt
    bounds: list[tuple[int, int]]

    def parts(self, schedule: Schedule, given: Given) -> Iterator[Part]:
        """Its parts, in order.

        Args:
            schedule: Of the whole.
            given: What the caller knows of the whole.
        """
        for number, (start, stop) in enumerate(self.bounds):
            more = given.more or number + 1 < len(self.bounds)
            yield Part(
                start=start,
                stop=stop,
                laid=self.laid.part(start, stop, number),
                schedule=schedule.before_question if more else schedule.with_question,
                given=replace(given, continues=given.continues or number > 0, more=more),
            )

    def groups(self) -> list[Tensor]:
        """For each sample `[P]`, the part of each media token."""
        ends = torch.tensor([stop for _, stop in self.bounds])
        return [torch.bucketize(one.position, ends, right=True) for one in self.laid.layouts]


def check_parted(kwargs: dict[str, Any], cached: bool) -> None:
    """Check that a call of the language model can be made in parts.

    Raises:
        RecipeError: It asks for what only a whole prompt gives.
    """
    asked = [name for name in ("output_attentions", "output_hidden_states") if kwargs.get(name)]
    if not cached:
        asked = ["use_cache=False", *asked]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4:
        asked.append("a 4-D attention_mask")
    if asked:
        raise RecipeError(
            f"a prompt that is prefilled in groups keeps its earlier groups in the cache alone: "
            f"leave out {' and '.join(asked)}, or use a recipe without groups"
        )


def cut_call(kwargs: dict[str, Any], start: int, stop: int, past: int) -> dict[str, Any]:
    """The arguments of the language model for the tokens from `start` to `stop`.

    Args:
        kwargs: For the whole prompt.
        start: In the unpruned sequence, as
        stop: is.
        past: Logical length before the prompt.
    """
    first, last = start - past, stop - past
    cut = dict(kwargs)
    cut["inputs_embeds"] = kwargs["inputs_embeds"][:, first:last]
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is not None:
        cut["position_ids"] = positions[..., first:last]
    if isinstance(mask, Tensor):
        cut["attention_mask"] = mask[:, :stop]
    if kwargs.get("cache_position") is not None:  # of older releases
        cut["cache_position"] = kwargs["cache_position"][first:last]
    where, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if where is not None:
        row = (where.flatten().cumsum(0) - 1).view_as(where)[:, first:last]
        cut["visual_pos_masks"] = here = where[:, first:last]
        cut["deepstack_visual_embeds"] = [one[row[here].to(one.device)] for one in features or ()]
    return cut


class PartsDone:
    """What the parts that have been prefilled leave.

    Args:
        parted: The prompt.
        sequence: What its cache holds.
        wanted: Rows of logits that the caller wants of its end; 0 for all.
    """

    def __init__(self, parted: PartedPrompt, sequence: Sequence, wanted: int) -> None:
        self._parted = parted
        self._sequence = sequence
        self._wanted = wanted
        self._before = len(sequence.prompts)
        self._calls: list[Call] = []
        self._left: list[tuple[Flight, Tensor]] = []  # of those whose rows are wanted

    def add(self, call: Call | None, flight: Flight, hidden: Tensor) -> None:
        """A part was prefilled: its hidden states `[B, Q, D]` came out of the model."""
        assert call is not None, "every part is one of a prompt with media"
        self._calls.append(call)
        self._left.append((flight, hidden))
        while self._wanted and len(self._left) > 1:
            if sum(one.shape[1] for _, one in self._left[1:]) < self._wanted:
                break
            del self._left[0]

    def hidden(self) -> Tensor:
        """`[B, Q, D]` of all parts whose rows are wanted."""
        return torch.cat([hidden for _, hidden in self._left], dim=1)

    def flight(self) -> Flight:
        """Which tokens of the prompt these are."""
        first, last = self._parted.bounds[0][0], self._parted.bounds[-1][1]
        rows = torch.cat([flight.rows for flight, _ in self._left], dim=1)
        flight = Flight(len(rows), first, last - first, rows.device)
        whole = rows.shape[1] == last - first and not bool((rows < 0).any())
        flight.rows = rows
        flight.source = None if whole else torch.where(rows >= 0, rows - first, -1)
        flight.holes = bool((rows < 0).any())
        return flight

    def join(self, continues: bool) -> Call:
        """One record of all parts, which the sequence holds in place of theirs."""
        sequence, calls = self._sequence, self._calls
        call = Call(
            layouts=list(self._parted.laid.layouts),
            length=calls[-1].length,
            decisions=[decision for one in calls for decision in one.decisions],
            kv_bytes_before=calls[-1].kv_bytes_before,
            kv_bytes_after=calls[-1].kv_bytes_after,
            warnings=list(dict.fromkeys(line for one in calls for line in one.warnings)),
            groups=self._parted.groups(),
        )
        entries = [one.media_entries for one in calls if one.media_entries is not None]
        call.media_entries = torch.stack(entries).sum(dim=0, dtype=torch.int32)
        parts = sequence.prompts[self._before :]
        alive = [torch.cat(masks) for masks in zip(*(one.alive for one in parts), strict=True)]
        joined = Prefilled(parts[0].start, call, alive, continues)
        sequence.prompts[self._before :] = [joined]
        sequence.settled = min(sequence.settled, len(sequence.prompts))
        return call

    def abandon(self) -> None:
        """A part failed: nothing of the prompt is held."""
        del self._sequence.prompts[self._before :]


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What the language model returned, with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output
