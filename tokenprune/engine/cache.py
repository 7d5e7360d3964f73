"""The cache behind a pruned model: stores the tokens kept, and counts the tokens seen.

Everything outside the decoder layers goes on in logical coordinates, those of the unpruned
sequence. Only this module knows the cache classes of transformers.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from tokenprune.core.indices import pack_mask
from tokenprune.engine.sequence import Sequence
from tokenprune.errors import UnsupportedModelError

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "PrunedLayer",
    "adopt",
    "cache_among",
    "cache_bytes",
    "check_cache",
    "full_cache_bytes",
    "new_cache",
]

CACHE_NAMES: Final = ("cache", "past_key_values")
"""What releases of transformers call the cache, in models, `generate` and outputs: newest first."""

CACHE_NAME: Final = next(
    name for name in CACHE_NAMES if name in {one.name for one in fields(BaseModelOutputWithPast)}
)
"""What the release at hand calls it."""

# A sliding layer remembers this many tokens beyond its window, so that tokens can be taken back,
# and forgets in steps as large, so that decoding does not rebuild its tensors at each token.
_SLACK = 64

_NO_INDEX: Final = torch.zeros(1, 1, 0, dtype=torch.int64)
"""The index of every layer that stores nothing: one object, so that layers know theirs is equal."""


class PrunedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one decoder layer, with the logical index of each.

    Attributes:
        index: `[B, H, S]`, or `[B, 1, S]` while all heads hold the same; -1 for holes.
        shown: The end of `index`: what the newest queries are given, without what lies outside
            the windows of all of them.
        holes: Whether `index` has any.
        mass: `[B, H, S]` float32, or `[B, 1, S]` while all heads agree: how many entries each one
            stands for; None while each stands for itself.
        seen: Logical length: tokens that went by, kept or not.
        window: How far back queries look; None for full attention.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, sequence: Sequence, window: int | None = None) -> None:
        super().__init__()
        self.sequence = sequence
        self.window = window
        self._clear()

    def _clear(self) -> None:
        self.index: Tensor = _NO_INDEX
        self.shown: Tensor = _NO_INDEX
        self.holes = False
        self.mass: Tensor | None = None
        self.seen = 0
        self._shared = True  # whether others may hold the very tensors that are stored
        self._tail = 0  # columns appended since the last selection: the same tokens in all heads
        self._forgotten = -1  # the last token that the window has left behind for good

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.index = self.shown = self.sequence.extend(self.index, self.index is _NO_INDEX)
        self.holes = self.holes or self.sequence.holes
        fresh, self.seen = self.sequence.end - self.seen, self.sequence.end
        self._tail += keys.shape[-2]
        self._shared = True
        if self.mass is not None:
            self.mass = pad(self.mass, (0, keys.shape[-2]), value=1.0)
        if self.is_initialized and self.keys.device != keys.device:  # as read from a file
            self.keys, self.values = self.keys.to(keys.device), self.values.to(keys.device)
        keys, values = super().update(keys, values, *args, **kwargs)
        if self.window is None or keys.shape[-2] < self.window + fresh:
            return keys, values
        # As an unpruned cache does: with masked keys in front, sums would round differently.
        first = 1 - self.window - fresh
        self.shown = self.index[..., first:]
        return keys[..., first:, :], values[..., first:, :]

    def get_seq_length(self) -> int:
        """Logical length. Positions, masks and turns all rest on it."""
        return self.seen

    def select(self, columns: Tensor) -> None:
        """Keep some stored entries and free the others.

        Args:
            columns: `[B, 1 or H, K]`, -1 for holes.
        """
        batch, heads = self.keys.shape[:2]
        safe = columns.clamp_min(0)
        gather = safe.expand(batch, heads, -1)[..., None].to(self.keys.device)
        self.keys = self.keys.gather(2, gather.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, gather.expand(-1, -1, -1, self.values.shape[-1]))
        kept_heads = max(columns.shape[1], self.index.shape[1])
        index = self.index.expand(-1, kept_heads, -1).gather(2, safe.expand(-1, kept_heads, -1))
        self.index = torch.where(columns >= 0, index, -1)
        if self.mass is not None:
            heads = max(columns.shape[1], self.mass.shape[1])
            mass = self.mass.expand(-1, heads, -1).gather(2, safe.expand(-1, heads, -1))
            self.mass = torch.where(columns >= 0, mass, 1.0)
        self._tail = 0

    def own(self) -> None:
        """Store tensors that nobody else holds, to be changed in place until the next update."""
        if self._shared:
            self.keys = self.keys.clone(memory_format=torch.contiguous_format)
            self.values = self.values.clone(memory_format=torch.contiguous_format)
            self._shared = False

    def evict(self) -> bool:
        """Forget what no later query can see. Called after the attention that still needed it.

        Returns:
            Whether anything was forgotten: this is done in steps.
        """
        if self.window is None or self.sequence.rows is None:
            return False
        if self.index.shape[-1] < self.window + 2 * _SLACK:
            return False
        last = int(self.sequence.rows.max(dim=1).values.min())
        self._forgotten = max(self._forgotten, last + 1 - self.window - _SLACK)
        self.select(pack_mask(self.index > self._forgotten))
        self.holes = bool((self.index < 0).any())
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Args:
            tokens_to_remove: Negative: how many to forget. Positive: the logical length to keep.
        """
        if not self.is_initialized:
            return
        length = tokens_to_remove if tokens_to_remove > 0 else self.seen + tokens_to_remove
        removed = self.seen - max(0, length)
        if removed <= 0:
            return
        if self.window is not None and 0 <= self._forgotten > length - self.window:
            raise UnsupportedModelError(
                f"cannot take back {removed} tokens: layers with a sliding window of {self.window} "
                f"remember {_SLACK} tokens beyond it; roll back less, or start with a fresh cache"
            )
        self.sequence.check_crop(max(0, length))
        self.seen = max(0, length)
        self.sequence.crop(self.seen)
        if removed <= self._tail:
            stay = self.keys.shape[-2] - removed
            tail = self._tail - removed
            self.keys, self.values = self.keys[:, :, :stay], self.values[:, :, :stay]
            self.index, self._tail = self.index[..., :stay], tail
            self.mass = None if self.mass is None else self.mass[..., :stay]
            return
        kept = (self.index >= 0) & (self.index < self.seen)
        self.select(pack_mask(kept))
        self.holes = bool((self.index < 0).any())

    def reset(self) -> None:
        super().reset()
        self._clear()
        self.sequence.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.sequence.decides:
            raise UnsupportedModelError(
                "cannot exchange beams: stages that act while decoding have decided for each row; "
                "use num_beams=1, or a recipe without such stages"
            )
        self._on_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._on_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._on_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def _on_batch(self, change: Any) -> None:
        if self.index is not _NO_INDEX:
            self.keys, self.values = change(self.keys), change(self.values)
            self.index = change(self.index)
            self.mass = None if self.mass is None else change(self.mass)


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache that a model makes for itself when it is given none."""
    return DynamicCache(config=config)


def cache_among(arguments: dict[str, Any]) -> Cache | None:
    """The cache that a model or `generate` is given, by its name of today or an older one."""
    found = (arguments.get(name) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None), None)


def check_cache(cache: Cache) -> None:
    """Check that a cache can be pruned.

    Raises:
        UnsupportedModelError: It is of another kind, or filled by others.
    """
    if _is_pruned(cache):
        return
    if type(cache) is not DynamicCache or not all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    ):
        kinds = sorted({type(layer).__name__ for layer in cache.layers}) or ["no layers"]
        raise UnsupportedModelError(
            f"cannot prune a {type(cache).__name__} of {', '.join(kinds)}: pruning needs a "
            "DynamicCache; drop `cache_implementation` and pass no other cache"
        )
    if cache.get_seq_length():
        raise UnsupportedModelError(
            f"the cache already holds {cache.get_seq_length()} tokens from outside this "
            "`with prune(...)`; start with a fresh cache"
        )
    if getattr(cache, "offloading", False):
        raise UnsupportedModelError(
            "cannot prune an offloaded cache; drop `cache_implementation` to use a DynamicCache"
        )


def _is_pruned(cache: Cache) -> bool:
    return bool(cache.layers) and all(isinstance(layer, PrunedLayer) for layer in cache.layers)


def adopt(cache: Cache, layers: int) -> Sequence:
    """Make an empty dynamic cache a pruned one, in place, since `generate` keeps its reference.

    Raises:
        UnsupportedModelError: As `check_cache`.
    """
    check_cache(cache)
    if _is_pruned(cache):
        known: Sequence = cache.layers[0].sequence
        return known
    sequence = Sequence()
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers] or [None] * layers
    cache.layers = [PrunedLayer(sequence, window) for window in windows]
    cache.layer_class_to_replicate = None
    return sequence


def cache_bytes(cache: Cache) -> int:
    """Bytes that the keys and values really take."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for layer in cache.layers
        if layer.is_initialized
        for storage in (layer.keys.untyped_storage(), layer.values.untyped_storage())
    }
    return sum(storages.values())


def full_cache_bytes(cache: Cache) -> int:
    """Bytes that an unpruned cache of the same logical length takes."""
    total = 0
    for layer in cache.layers:
        if layer.is_initialized:
            length = min(layer.seen, layer.window or layer.seen)
            per_token = sum(
                tensor.shape[0] * tensor.shape[1] * tensor.shape[3] * tensor.element_size()
                for tensor in (layer.keys, layer.values)
            )
            total += length * per_token
    return total
