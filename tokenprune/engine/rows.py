"""Attention rows of some queries, in blocks: never as large as the whole attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.signal import Attention, Reduce
from tokenprune.engine.masks import query_mask
from tokenprune.errors import RecipeError

__all__ = ["Attended", "attention_rows"]

_BLOCK_ELEMENTS = 1 << 23
"""Scores of one block of queries are held at a time: in float32, 32 MiB."""

_MOST_ELEMENTS = 1 << 27
"""Of one sample's unreduced rows: in float32, 512 MiB."""


@dataclass(frozen=True)
class Attended:
    """What a decoder layer attends with.

    Attributes:
        query: `[B, heads, Q, d]`.
        keys: `[B, H, S, d]`, all that is stored, this forward's included: they come last.
        values: `[B, H, S, d]`.
        mask: What the model made of its mask.
        rows: `[B, Q]` logical index of each query, -1 for holes.
        index: `[B, 1 or H, S]` logical index of each key, -1 for holes.
        arguments: Of the attention function: `scaling` and `softcap` count.
        mass: `[B, 1 or H, S]`, for how many entries each key stands; None if each is one.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Any
    rows: Tensor
    index: Tensor
    arguments: dict[str, Any]
    mass: Tensor | None = None


def attention_rows(
    attended: Attended,
    queries: list[Tensor],
    columns: list[Tensor],
    signal: Attention,
    grouped: bool,
) -> list[Tensor]:
    """Softmaxed attention of some queries to some keys.

    Args:
        attended: Of the layer.
        queries: For each sample `[R]`, which of its hidden states in flight ask.
        columns: For each sample `[N]`, or `[H, N]`, which keys are looked at.
        signal: What is reduced.
        grouped: Whether heads are reduced within each key-value head.

    Returns:
        For each sample as `Attention` says.
    """
    kv_heads = attended.keys.shape[1]
    sums = [
        _Rows(signal, kv_heads if grouped else 1, attended.query.shape[1], len(q), c.shape[-1])
        for q, c in zip(queries, columns, strict=True)
    ]
    columns = [one.to(attended.keys.device) for one in columns]
    for first, block in _blocks(attended, queries):  # [B, heads, r, S]
        for number, (rows, where) in enumerate(zip(queries, columns, strict=True)):
            ahead = max(0, _longest(queries) - len(rows) - first)  # holes on the left
            if ahead < block.shape[2]:
                sums[number].add(_pick(block[number, :, ahead:], where))
    return [one.result() for one in sums]


def _pick(block: Tensor, where: Tensor) -> Tensor:
    """Of rows `[heads, r, S]` some columns, `[N]`, or `[H, N]` for each key-value head."""
    if where.ndim == 1:
        return block.index_select(-1, where)
    heads = where.repeat_interleave(len(block) // len(where), dim=0)
    return block.gather(-1, heads[:, None].expand(-1, block.shape[1], -1))


class _Rows:
    """The rows of one sample, reduced as they come."""

    def __init__(self, signal: Attention, groups: int, heads: int, rows: int, tokens: int) -> None:
        self._signal, self._groups, self._rows = signal, groups, rows
        self._parts: list[Tensor] = []
        heads = heads if signal.heads is None else groups
        size = heads * tokens * (rows if signal.reduce is None else 1)
        if size > _MOST_ELEMENTS:
            raise RecipeError(
                f"the attention of {rows} queries of {heads} heads to {tokens} tokens takes "
                f"{size * 4 / 2**20:,.0f} MiB, more than {_MOST_ELEMENTS * 4 // 2**20}; reduce it: "
                'Attention(reduce="mean") over queries, or heads="mean"'
            )

    def add(self, block: Tensor) -> None:
        """Add some rows, `[heads, r, N]`."""
        if self._signal.heads is not None:
            each = len(block) // self._groups  # told, for there may be no columns
            block = block.reshape(self._groups, each, *block.shape[1:])
            block = _reduce(block, 1, self._signal.heads)
        if self._signal.reduce is None:
            self._parts.append(block)
            return
        kind: Reduce = "max" if self._signal.reduce == "max" else "sum"
        block = _reduce(block, 1, kind)
        if self._parts:
            before = self._parts[0]
            block = torch.maximum(before, block) if kind == "max" else before + block
        self._parts = [block]

    def result(self) -> Tensor:
        found = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)
        if self._signal.reduce == "mean":
            found = found / self._rows
        alone = self._signal.heads is not None and self._groups == 1
        return found[0] if alone else found


def _reduce(values: Tensor, dim: int, kind: Reduce) -> Tensor:
    if kind == "max":
        return values.amax(dim)
    return values.mean(dim) if kind == "mean" else values.sum(dim)


def _longest(queries: list[Tensor]) -> int:
    return max(map(len, queries))


def _blocks(attended: Attended, queries: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Softmaxed rows, `[B, heads, r, S]` float32, with the number of the first; holes are left."""
    query, keys = attended.query, attended.keys
    batch, heads, _, width = query.shape
    groups, stored = heads // keys.shape[1], keys.shape[2]
    longest = _longest(queries)
    padded = [torch.nn.functional.pad(q, (longest - len(q), 0), value=-1) for q in queries]
    asking = torch.stack(padded).to(query.device)  # [B, R]
    visible = query_mask(attended.mask, attended.rows, attended.index)
    scaling = attended.arguments.get("scaling")
    scaling = width**-0.5 if scaling is None else scaling
    softcap = attended.arguments.get("softcap")
    turned = keys.transpose(2, 3)  # [B, H, d, S]
    step = max(1, _BLOCK_ELEMENTS // (batch * heads * stored))
    for first in range(0, longest, step):
        part = asking[:, first : first + step]  # [B, r]
        where = part.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, width)
        rows = query.gather(2, where).view(batch, keys.shape[1], groups * part.shape[1], width)
        scores = (rows @ turned).float() * scaling  # [B, H, groups * r, S]
        scores = scores.view(batch, heads, part.shape[1], stored)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if attended.mass is not None:
            added = attended.mass.to(scores.device).log()[:, :, None]  # [B, 1 or H, 1, S]
            scores = scores + added.repeat_interleave(heads // added.shape[1], dim=1)
        mask = visible(part)
        if mask is not None:
            if mask.shape[1] not in (1, heads):
                mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
            scores = scores.masked_fill_(~mask.to(scores.device), -torch.inf)
        yield first, scores.softmax(dim=-1)
