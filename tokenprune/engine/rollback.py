"""Taking a pruned cache back to an earlier state, and out of a process and into another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from tokenprune.engine.cache import PrunedLayer, adopt, new_cache
from tokenprune.engine.sequence import Sequence

__all__ = ["Bookmark", "cache_from_state", "cache_state"]


class Bookmark:
    """The state of a pruned cache of one sample, to go back to.

    Layers only ever append, so what was stored is found again at the front of their tensors, and
    nothing is copied. Two things are different: layers with a sliding window forget what going back
    needs, so their tensors are held; and so are all tensors where rows will be repeated (beams).

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


def cache_state(cache: Cache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What makes up a pruned cache between two forwards.

    Returns:
        Tensors by name ("0.keys", "0.values" and "0.index" for layer 0; "0.mass" and "joined"
        where entries were merged), and the rest as plain numbers and flags.
    """
    tensors: dict[str, Tensor] = {}
    plain = []
    joined = cache.layers[0].sequence.joined
    if joined is not None:
        tensors["joined"] = joined
    for number, layer in enumerate(cache.layers):
        tensors[f"{number}.keys"] = layer.keys
        tensors[f"{number}.values"] = layer.values
        tensors[f"{number}.index"] = layer.index.to(torch.int32)
        if layer.mass is not None:
            tensors[f"{number}.mass"] = layer.mass
        state = vars(layer).items()
        plain.append({name: value for name, value in state if type(value) in (int, bool)})
    return tensors, {"end": cache.layers[0].sequence.end, "layers": plain}


def cache_from_state(
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
    device: torch.device,
) -> Cache:
    """The cache whose state was taken.

    Args:
        config: Of the language model.
        tensors: As from `cache_state`.
        plain: As from `cache_state`.
        device: Where the model is.
    """
    cache = new_cache(config)
    sequence = adopt(cache, len(plain["layers"]))
    sequence.end = plain["end"]
    if "joined" in tensors:
        sequence.joined = tensors["joined"].to(device)
    for number, (layer, state) in enumerate(zip(cache.layers, plain["layers"], strict=True)):
        keys, values = (tensors[f"{number}.{name}"].to(device) for name in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layer.index = tensors[f"{number}.index"].to(device, torch.int64)
        if f"{number}.mass" in tensors:
            layer.mass = tensors[f"{number}.mass"].to(device)
        layer.__dict__.update(state)
    return cache
