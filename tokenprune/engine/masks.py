"""Masks of attention over pruned rows and keys, evaluated at logical indices."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "LazyMask",
    "base_attention",
    "mask_for_kernel",
    "padding_of",
    "query_mask",
    "weighted_mask",
]

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_PARTS = 8
"""In how many parts a mask is evaluated, one after the other."""


class LazyMask:
    """A mask that is still a function of indices, to be evaluated where rows and keys are known.

    transformers builds its masks from functions `f(batch, head, query, key) -> bool`. Evaluated at
    the logical indices of what pruning left, they are right for any pattern: causal, padding,
    sliding window, image blocks.

    Attributes:
        function: The mask function, without padding.
        padding: `[B, N]` bool over the logical sequence, False at padding; None if there is none.
        plain: Whether the mask is causal and nothing else.
    """

    def __init__(self, function: MaskFunction, padding: Tensor | None) -> None:
        self.function = function
        # transformers looks at the whole padding mask once a forward too, to skip it if it can.
        self.padding = None if padding is None or bool(padding.all()) else padding.bool()
        self.causal = function is causal_mask_function
        self.plain = self.causal and self.padding is None
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Evaluate the mask.

        Args:
            queries: `[B, Q]` logical indices, -1 for holes.
            keys: `[B, H, S]` logical indices, H is 1 if all heads agree, -1 for holes.

        Returns:
            `[B, H, Q, S]` bool, True where a query may look.
        """
        if self._last is not None and self._last[0] is queries and self._last[1] is keys:
            return self._last[2]
        self._last = None  # two at a time would be one too many
        # Functions make several tensors as large as their result on the way: only ever of a part.
        step = -(-queries.shape[1] // _PARTS)
        shape = (len(queries), keys.shape[1], queries.shape[1], keys.shape[2])
        mask = torch.empty(shape, dtype=torch.bool, device=queries.device)
        for start in range(0, queries.shape[1], step):
            mask[:, :, start : start + step] = self.rows(queries[:, start : start + step], keys)
        self._last = (queries, keys, mask)
        return mask

    def rows(self, queries: Tensor, keys: Tensor) -> Tensor:
        """As a call, but at once, and not remembered: for a few queries."""
        batch = torch.arange(queries.shape[0], device=queries.device).view(-1, 1, 1, 1)
        query = queries.clamp_min(0)[:, None, :, None]
        key = keys.clamp_min(0)[:, :, None, :]
        mask = self.function(batch, torch.zeros_like(batch[:1]), query, key)
        if self.padding is not None:
            mask = mask & self.padding[batch, key]
        return mask & (keys >= 0)[:, :, None, :]


def base_attention(name: str, module: nn.Module) -> AttentionFunction:
    """The attention function that the model would have called itself."""
    if name == "eager":
        # Model files have variants of their own (soft caps, sinks), some even two of them.
        used = inspect.unwrap(type(module).forward).__code__.co_names
        own = [name for name in used if name.endswith("eager_attention_forward")]
        file = sys.modules[type(module).__module__]
        function: AttentionFunction = getattr(file, own[0] if own else "eager_attention_forward")
        return function
    return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]


def mask_for_kernel(
    mask: LazyMask | Tensor | None,
    name: str,
    query: Tensor,
    rows: Tensor,
    keys: Tensor,
    holes: bool,
) -> tuple[str, Tensor | None]:
    """The mask in the form that an attention kernel wants, in physical coordinates.

    Args:
        mask: What the model made of the mask interface, or a user's ready `[B, 1 or H, Q, S]` mask
            over the logical sequence.
        name: The attention implementation.
        query: `[B, heads, Q, d]`.
        rows: `[B, Q]` logical indices of the queries.
        keys: `[B, 1 or H, S]` logical indices of the keys.
        holes: Whether rows or keys have holes.

    Returns:
        The implementation to use, which is SDPA where flash kernels cannot express the mask, and
        the mask: None, `[B, S]` for flash kernels, else `[B, 1 or heads, Q, S]`.
    """
    queries, stored = query.shape[2], keys.shape[-1]
    if isinstance(mask, LazyMask):
        if mask.causal and not holes:
            # What heads hold of the past is older than every query: they differ in nothing hidden.
            keys = keys[:, :1] if keys.shape[1] > 1 else keys
        if "flash" in name:
            # Flash kernels know which keys are valid and that queries are the last of them.
            if mask.causal and (keys.shape[1] == 1 or not holes):
                if not holes and mask.padding is None:
                    return name, None
                return name, _valid_keys(mask, keys).to(query.device)
            name = "sdpa"
        # Without a mask SDPA is causal and eager is not, so eager only goes without for one query.
        square = queries == stored and name != "eager"
        if mask.plain and not holes and (queries == 1 or square):
            return name, None
        dense = mask(rows, keys)
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        dense = _gather_dense(mask, rows, keys)
    else:
        return name, mask
    return name, _for_heads(dense, name, query)


def weighted_mask(
    mask: LazyMask | Tensor | None,
    name: str,
    query: Tensor,
    rows: Tensor,
    keys: Tensor,
    mass: Tensor,
) -> tuple[str, Tensor]:
    """As `mask_for_kernel`, where keys stand for several.

    Args:
        mass: `[B, 1 or H, S]`, for how many each key stands.

    Returns:
        The implementation, which is never a flash kernel, and the mask `[B, 1 or heads, Q, S]` to
        be added to attention logits: the logarithm of the mass where a query may look.
    """
    if "flash" in name:
        name = "sdpa"
    mask = LazyMask(causal_mask_function, None) if mask is None else mask
    # Said to have holes, since a kernel that goes without a mask would go without the mass.
    name, dense = mask_for_kernel(mask, name, query, rows, keys, True)
    assert dense is not None
    added = _for_heads(mass.log().to(query.dtype)[:, :, None], "", query)  # [B, 1 or heads, 1, S]
    if dense.dtype != torch.bool:
        return name, dense + added
    return name, torch.where(dense, added, torch.finfo(query.dtype).min)


def _valid_keys(mask: LazyMask, keys: Tensor) -> Tensor:
    valid = keys[:, 0] >= 0
    if mask.padding is not None:
        valid = valid & mask.padding.gather(1, keys[:, 0].clamp_min(0))
    return valid


def _gather_dense(mask: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """Pick the rows and columns of a ready mask; its rows are the newest of the sequence."""
    rows, keys = rows.to(mask.device), keys.to(mask.device)
    batch, heads = rows.shape[0], max(mask.shape[1], keys.shape[1])
    mask = mask.expand(batch, heads, -1, -1)
    first = mask.shape[3] - mask.shape[2]
    row = (rows - first).clamp_min(0)[:, None, :, None]
    mask = mask.gather(2, row.expand(-1, heads, -1, mask.shape[3]))
    column = keys.clamp_min(0)[:, :, None, :]
    mask = mask.gather(3, column.expand(-1, heads, mask.shape[2], -1))
    valid = (keys >= 0)[:, :, None, :]
    if mask.dtype == torch.bool:
        return mask & valid
    return mask.masked_fill(~valid, torch.finfo(mask.dtype).min)


def _for_heads(mask: Tensor, name: str, query: Tensor) -> Tensor:
    """Repeat a mask of key-value heads for query heads; make it additive for eager kernels."""
    mask = mask.to(query.device)
    if mask.shape[1] not in (1, query.shape[1]):
        mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
    if name == "eager" and mask.dtype == torch.bool:
        none = torch.zeros((), dtype=query.dtype, device=mask.device)
        return torch.where(mask, none, torch.finfo(query.dtype).min)
    return mask


def query_mask(mask: Any, rows: Tensor, keys: Tensor) -> Callable[[Tensor], Tensor | None]:
    """The mask of some queries, to be evaluated in parts.

    Args:
        mask: As `mask_for_kernel` takes it.
        rows: `[B, Q]` logical indices of the queries in flight.
        keys: `[B, 1 or H, S]` logical indices of the keys.

    Returns:
        A function of queries `[B, R]`, places among those in flight, -1 for holes: it returns
        `[B, 1 or H, R, S]` bool; None if they see every key.
    """
    if not isinstance(mask, LazyMask) and not (isinstance(mask, Tensor) and mask.ndim == 4):
        every = None if bool((keys >= 0).all()) else (keys >= 0)[:, :, None, :]
        return lambda places: every

    def visible(places: Tensor) -> Tensor:
        places = places.to(rows.device)
        asking = torch.where(places >= 0, rows.gather(1, places.clamp_min(0)), -1)
        if isinstance(mask, LazyMask):
            return mask.rows(asking, keys)
        dense = _gather_dense(mask, asking, keys)
        return dense if dense.dtype == torch.bool else dense > torch.finfo(dense.dtype).min / 2

    return visible


def padding_of(mask: Any) -> Tensor | None:
    """`[B, N]` bool, False at padding, from what a model is given as its attention mask."""
    if isinstance(mask, dict):
        mask = next((one for one in mask.values() if isinstance(one, LazyMask)), None)
    if isinstance(mask, LazyMask):
        return mask.padding
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return None if bool(mask.all()) else mask.bool()
    return None
