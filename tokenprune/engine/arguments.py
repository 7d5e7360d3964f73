"""What decoder layers are told, cut down or numbered anew as tokens leave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.core.indices import take
from tokenprune.engine.flight import Flight
from tokenprune.engine.masks import padding_of
from tokenprune.engine.sequence import Sequence
from tokenprune.errors import RecipeError

__all__ = ["ArgumentCut", "compact_positions"]


class ArgumentCut:
    """Cuts what the model's loop passes to its layers down to the rows in flight.

    Args:
        flight: Whose rows they are, until others leave.
    """

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._known: dict[int, Any] = {}

    def cut(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments of a layer, of which hidden states are short already."""
        source, length = self._flight.source, self._flight.length
        if source is None:
            return args, kwargs
        kwargs = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = self._short(kwargs["position_ids"], source, -1)
        if kwargs.get("position_embeddings") is not None:
            # [B, N, d]; older releases keep those of time, row and column apart: [3, B, N, d].
            embeddings = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = self._short(embeddings, source, -2)
        rest = tuple(
            self._short(one, source, 1)
            if isinstance(one, Tensor) and one.ndim > 1 and one.shape[1] == length
            else one
            for one in args[1:]
        )
        return (*args[:1], *rest), kwargs

    def _short(self, value: Any, source: Tensor, dim: int) -> Any:
        if id(value) not in self._known:  # once a narrowing, not once a layer
            several = value if isinstance(value, tuple) else (value,)
            short = tuple(take(one, source, dim % one.ndim) for one in several)
            self._known[id(value)] = (value, short if several is value else short[0])
        return self._known[id(value)][1]


def compact_positions(
    kwargs: dict[str, Any],
    flight: Flight,
    sequence: Sequence,
    tokens: list[Tensor] | None,
    compact: bool,
) -> None:
    """Number what is left without gaps, if positions are compact.

    Args:
        kwargs: Of the language model; `position_ids` are replaced.
        flight: The tokens in flight.
        sequence: What they go on.
        tokens: For each sample those that stay, `[K]` indices into the input; None for all.
        compact: Whether positions are.

    Raises:
        RecipeError: Positions are not one-dimensional.
    """
    if not compact:
        return
    batch, length = flight.rows.shape
    device = flight.rows.device
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = flight.rows
    if positions.ndim != 2:
        raise RecipeError(
            "positions='compact' needs one-dimensional positions; use positions='original'"
        )
    if sequence.shift is None:
        sequence.shift = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    positions = positions.to(device).expand(batch, length) - sequence.shift
    if tokens is not None:
        gone = torch.ones(batch, length, dtype=torch.int64, device=device)
        for number, kept in enumerate(tokens):
            gone[number, kept] = 0
        real = padding_of(kwargs.get("attention_mask"))
        if real is not None:  # padding never counted
            gone = gone * real[:, flight.past : flight.past + length].to(device)
        positions = positions - (gone.cumsum(1) - gone)  # [B, S]
        sequence.shift = sequence.shift + gone.sum(1, keepdim=True)
    kwargs["position_ids"] = positions
