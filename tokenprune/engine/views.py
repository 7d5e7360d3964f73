"""Reading the attention of a vision tower while it runs, without ever storing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tokenprune.core.context import EncoderView

__all__ = ["AttentionTap", "StreamedView", "split_views"]

_BLOCK_ELEMENTS = 1 << 23
"""Scores of one block of query rows are held at a time: in float32, 32 MiB."""

_BLOCK_ELEMENTS_CPU = 1 << 20
"""Four times as fast on a processor, whose cache holds the smaller block."""

_GROUPS = 16
"""At least so many groups of views follow each other: what one takes is little beside the tower."""


class StreamedView(EncoderView):
    """Attention of some views, computed from queries and keys in blocks of rows.

    Args:
        query: `[W, heads, P + Nv, d]`, with `P` leading tokens that are no patches.
        key: `[W, heads, P + Nv, d]`.
        scaling: Factor on the scores; None for `d ** -0.5`.
        prefix_tokens: `P`.
        padding: `[W, Nv]` bool, True at patches that no other attends to; they attend to nothing
            that counts. None: there are none.
        bias: `[W, heads, P + Nv, P + Nv]`, added to the scores; any dimension but the last two may
            be 1. None: nothing is.
        grey: Gives the pixels below each token, `[W, Nv, pixels]`.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        scaling: float | None,
        prefix_tokens: int = 0,
        padding: Tensor | None = None,
        bias: Tensor | None = None,
        grey: Callable[[], Tensor] | None = None,
    ) -> None:
        self._query = query[:, :, prefix_tokens:]
        self._prefix_query = query[:, :, :prefix_tokens]
        self._grey = grey
        self._key = key
        self._scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._prefix = prefix_tokens
        self.has_class = prefix_tokens > 0
        self._padding = None if padding is None else padding.to(query.device)
        self.views, _, self.tokens, _ = self._query.shape
        whole = None if bias is None else bias.expand(*query.shape[:2], -1, -1)
        self._bias = None if whole is None else whole[:, :, prefix_tokens:]
        self._prefix_bias = None if whole is None else whole[:, :, :prefix_tokens]

    def received(self) -> Tensor:
        total = torch.zeros(self.views, self.tokens, device=self._query.device)
        for views in self._groups(self.tokens):
            query = self._query[views]
            bias = None if self._bias is None else self._bias[views]
            if self._padding is not None:  # a group is one view, then
                real = ~self._padding[views.start]
                query = query[:, :, real]
                bias = None if bias is None else bias[:, :, real]
            for attention in self._blocks(query, views, bias):
                total[views] += attention.sum(dim=1)
        return total

    def rows(self, queries: Tensor) -> Tensor:
        index = queries[:, None, :, None].expand(-1, self._query.shape[1], -1, self._query.shape[3])
        picked = self._query.gather(2, index)  # [W, heads, R, d]
        bias = self._bias
        if bias is not None:
            wide = queries[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3])
            bias = bias.gather(2, wide)  # [W, heads, R, P + Nv]
        return self._rows(picked, bias)

    def class_row(self) -> Tensor:
        end = self._check_class()
        bias = None if self._prefix_bias is None else self._prefix_bias[:, :, :end]
        return self._rows(self._prefix_query[:, :, :end], bias)[:, 0]

    def keys(self) -> Tensor:
        return self._key[:, :, self._prefix :].float().mean(dim=1)

    def class_key(self) -> Tensor:
        return self._key[:, :, self._check_class() - 1].float().mean(dim=1)

    def grey(self) -> Tensor:
        if self._grey is None:
            raise TypeError("this view was made without pixels")
        return self._grey()

    def _check_class(self) -> int:
        """1, the end of the first token, if it is a class token."""
        if not self.has_class:
            raise TypeError(
                "this tower has no class token; a signal that must have one says so "
                "(class_token = True), others look at view.has_class"
            )
        return 1

    def _rows(self, query: Tensor, bias: Tensor | None) -> Tensor:
        """`[W, R, Nv]`: attention of some queries `[W, heads, R, d]`, with their rows of `bias`."""
        rows = []
        for views in self._groups(query.shape[2]):
            blocks = self._blocks(query[views], views, None if bias is None else bias[views])
            rows.append(torch.cat(list(blocks), dim=1))
        return torch.cat(rows)

    def _groups(self, rows: int) -> Iterator[slice]:
        """Views that are worked on at once: as many as fit into a block with all their rows."""
        several = self._limit() // max(1, rows * self._key.shape[1] * self._key.shape[2])
        several = min(several, self.views // _GROUPS)
        step = 1 if self._padding is not None else max(1, several)
        for start in range(0, self.views, step):
            yield slice(start, start + step)

    def _limit(self) -> int:
        return _BLOCK_ELEMENTS_CPU if self._key.device.type == "cpu" else _BLOCK_ELEMENTS

    def _blocks(self, query: Tensor, views: slice, bias: Tensor | None) -> Iterator[Tensor]:
        """Attention in some views, averaged over heads, in blocks of rows.

        Args:
            query: `[V, heads, R, d]`.
            views: Which `V` views.
            bias: `[V, heads, R, P + Nv]`.

        Yields:
            `[V, rows, Nv]` float32.
        """
        key = self._key[views].transpose(2, 3).flatten(0, 1)  # [V * heads, d, P + Nv]
        several, heads, rows, _ = query.shape
        step = max(1, self._limit() // (len(key) * key.shape[2]))
        for start in range(0, rows, step):
            block = query[:, :, start : start + step].flatten(0, 1)  # [V * heads, rows, d]
            # One pass for the product and its scaling: what is added counts for nothing.
            nothing = key.new_zeros(()).expand(len(key), block.shape[1], key.shape[2])
            scores = torch.baddbmm(nothing, block, key, beta=0, alpha=self._scaling)
            if self._padding is not None:
                scores[..., self._prefix :].masked_fill_(self._padding[views.start], -torch.inf)
            scores = scores.view(several, heads, *scores.shape[1:])
            if bias is not None:
                scores = scores + bias[:, :, start : start + step]
            attention = scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)
            if self._prefix:
                # A class token takes its share of the softmax, but is no patch to be kept.
                attention = attention[..., self._prefix :]
                attention = attention / attention.sum(dim=-1, keepdim=True)
            yield attention


def split_views(
    query: Tensor, key: Tensor, lengths: list[int] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of separate views.

    Towers for pictures of one size batch their views; towers for any size put all views into one
    sequence (whole, where a mask or a kernel keeps them apart) or cut it themselves.

    Args:
        lengths: Tokens of each view in the sequence; None if it is cut already.
    """
    if lengths is None:
        yield query, key
        return
    queries, keys = torch.split(query, lengths, dim=2), torch.split(key, lengths, dim=2)
    yield from zip(queries, keys, strict=True)


class AttentionTap(TorchFunctionMode):
    """Shows queries and keys of torch's own attention, for towers without a registry of kernels.

    Args:
        show: Called with queries and keys `[W, heads, P + Nv, d]`, the factor on the scores, and
            the mask.

    Attributes:
        calls: How often it was called.
    """

    def __init__(self, show: Callable[[Tensor, Tensor, float | None, Tensor | None], None]) -> None:
        super().__init__()
        self._show = show
        self.calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            self.calls += 1
            query, key = (args[n] if len(args) > n else kwargs[name] for n, name in _OPERANDS)
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self._show(query, key, kwargs.get("scale"), mask)
        return function(*args, **kwargs)


_OPERANDS = (0, "query"), (1, "key")
