"""The tokens of one forward that are still in flight."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core.indices import pad_left

__all__ = ["Flight"]


class Flight:
    """Which tokens of one forward are in flight, sample by sample.

    Attributes:
        past: Logical length before this forward.
        length: Tokens that the language model was called with.
        rows: `[B, Q]` logical index of each hidden state, -1 for holes.
        source: `[B, Q]` index of each into the language model's input, -1 for holes; None while
            all of it is in flight.
        holes: Whether `rows` has any.
    """

    def __init__(self, batch: int, past: int, length: int, device: torch.device) -> None:
        self.past = past
        self.length = length
        self.rows = torch.arange(past, past + length, device=device).expand(batch, length)
        self.source: Tensor | None = None
        self.holes = False
        self._tokens: list[Tensor] | None = None

    def locate(self, sample: int, tokens: Tensor) -> Tensor:
        """Where tokens of a sample, `[K]` indices into the input, are among its hidden states."""
        if self._tokens is None:
            return tokens
        present = self._tokens[sample]
        holes = self.rows.shape[1] - len(present)
        return torch.searchsorted(present, tokens) + holes

    def narrow(self, tokens: list[Tensor]) -> Tensor:
        """Go on with some tokens only.

        Args:
            tokens: For each sample the indices `[K]` into the input that go on, increasing.

        Returns:
            `[B, Q']`, where each new hidden state is among the present ones; -1 for holes.
        """
        # No layer can be called with nothing: a hole goes on where no token does.
        gather = pad_left([self.locate(b, kept) for b, kept in enumerate(tokens)], least=1)
        self.source = pad_left(tokens, least=1)
        self.rows = torch.where(self.source >= 0, self.source + self.past, -1)
        self.holes = len({len(kept) for kept in tokens} | {self.rows.shape[1]}) > 1
        self._tokens = tokens
        return gather
