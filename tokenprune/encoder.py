"""Reading the attention of a vision tower while it runs, without ever storing it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenprune.stage import EncoderView

__all__ = ["StreamedView", "split_views"]

# Scores of one block of query rows are held at a time: 2**23 floats are 32 MiB.
_BLOCK_ELEMENTS = 1 << 23


class StreamedView(EncoderView):
    """Attention of some views, computed from queries and keys in blocks of rows.

    Args:
        query: `[W, heads, P + Nv, d]`, with `P` leading tokens that are no patches.
        key: `[W, heads, P + Nv, d]`.
        scaling: Factor on the scores; None for `d ** -0.5`.
        prefix_tokens: `P`.
    """

    def __init__(
        self, query: Tensor, key: Tensor, scaling: float | None, prefix_tokens: int = 0
    ) -> None:
        self._query = query[:, :, prefix_tokens:]
        self._key = key
        self._scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._prefix = prefix_tokens
        self.views, _, self.tokens, _ = self._query.shape

    def received(self) -> Tensor:
        total = torch.zeros(self.views, self.tokens, device=self._query.device)
        for view in range(self.views):
            every = self._query[view : view + 1]
            for attention in self._blocks(every, self._key[view : view + 1]):
                total[view] += attention[0].sum(dim=0)
        return total

    def rows(self, queries: Tensor) -> Tensor:
        index = queries[:, None, :, None].expand(-1, self._query.shape[1], -1, self._query.shape[3])
        picked = self._query.gather(2, index)  # [W, heads, R, d]
        return torch.cat(
            [
                torch.cat(list(self._blocks(picked[w : w + 1], self._key[w : w + 1])), dim=1)
                for w in range(self.views)
            ]
        )

    def _blocks(self, query: Tensor, key: Tensor) -> Iterator[Tensor]:
        """Attention averaged over heads, `[1, rows, Nv]` float32, for blocks of rows."""
        _, heads, rows, _ = query.shape
        step = max(1, _BLOCK_ELEMENTS // (heads * key.shape[2]))
        for start in range(0, rows, step):
            block = query[:, :, start : start + step]
            scores = (block @ key.transpose(2, 3)).float() * self._scaling
            attention = scores.softmax(dim=-1).mean(dim=1)  # [1, step, P + Nv]
            if self._prefix:
                # A class token takes its share of the softmax, but is no patch to be kept.
                attention = attention[..., self._prefix :]
                attention = attention / attention.sum(dim=-1, keepdim=True)
            yield attention


def split_views(
    query: Tensor, key: Tensor, boundaries: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of separate views.

    Towers for pictures of one size batch their views; towers for any size put all views into one
    sequence, whole with `boundaries` (`cu_seqlens`, for flash kernels) or cut already.
    """
    if boundaries is None:
        yield query, key
        return
    lengths = (boundaries[1:] - boundaries[:-1]).tolist()
    queries, keys = torch.split(query, lengths, dim=2), torch.split(key, lengths, dim=2)
    yield from zip(queries, keys, strict=True)
