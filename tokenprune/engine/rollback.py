"""Taking a pruned cache back to an earlier state."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.sequence import Sequence

__all__ = ["Bookmark"]


class Bookmark:
    """The state of a pruned cache of one sample, to go back to.

    Layers only ever append, so what was stored is found again at the front of their tensors, and
    nothing is copied. Three things are different: layers with a sliding window forget what going
    back needs, so their tensors are held; and so are all tensors where rows will be repeated
    (beams), or entries pruned.

    Args:
        cache: A pruned cache that holds something.
        margin: So many of the newest tokens will be taken back before others are appended.
        whole: Hold the tensors of all layers.
    """

    def __init__(self, cache: Cache, *, margin: int = 0, whole: bool = False) -> None:
        self._cache = cache
        self._sequence: Sequence = cache.layers[0].sequence
        self._snapshot = self._sequence.snapshot()
        self._layers = [_LayerBookmark(layer, margin, whole) for layer in cache.layers]

    def restore(self) -> None:
        """Make the cache what it was, whatever happened to it since."""
        self._sequence.restore(self._snapshot)
        for bookmark, layer in zip(self._layers, self._cache.layers, strict=True):
            bookmark.restore(layer)


class _LayerBookmark:
    def __init__(self, layer: PrunedLayer, margin: int, whole: bool) -> None:
        self._state = vars(layer).copy()
        self._held = whole or layer.window is not None
        if self._held:
            return
        self._stored = layer.keys.shape[2] - margin
        # A copy, for a view would keep all of it in memory.
        self._newest = {
            name: self._state.pop(name)[:, :, self._stored :].clone() for name in ("keys", "values")
        }

    def restore(self, layer: PrunedLayer) -> None:
        before = {name: getattr(layer, name) for name in ("keys", "values")}
        layer.__dict__.update(self._state)
        if self._held:
            return
        for name, newest in self._newest.items():
            front = before[name][:, :, : self._stored]
            setattr(layer, name, torch.cat([front, newest], dim=2) if newest.shape[2] else front)
