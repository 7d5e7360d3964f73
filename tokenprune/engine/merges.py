"""Merges at caches: entries that absorb others, and how many each one stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core.selection import Merge, Selection
from tokenprune.core.stage import Stage
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.deepstack import absorb_
from tokenprune.errors import RecipeError

__all__ = ["absorb_entries", "check_merge", "real_pairs", "translate"]


def check_merge(stage: Stage, selection: Selection, heads: int | None, total: int) -> None:
    """Check the merge of a selection, before anything is changed.

    Args:
        stage: Whose it is.
        selection: What it decided.
        heads: Key-value heads, at a cache; None elsewhere.
        total: Its candidates.

    Raises:
        RecipeError: It is not what can be merged there.
    """
    merge = selection.merge
    if merge is None:
        return
    if heads is None:
        if merge.source.ndim != 1 or merge.value_weight is not None or merge.mass:
            raise RecipeError(
                f"{stage.name} at {stage.site} must merge [M] pairs with a weight each; pairs for "
                "each head, value_weight and mass are for caches"
            )
        return
    if merge.source.ndim == 2 and len(merge.source) != heads:
        raise RecipeError(
            f"{stage.name} at {stage.site} must merge [M] or [{heads}, M] pairs, got "
            f"{tuple(merge.source.shape)}"
        )
    weights = [merge.weight, merge.weight if merge.value_weight is None else merge.value_weight]
    both = torch.stack([merge.source, merge.target])
    if bool(((both < 0) | (both >= total)).any()):
        raise RecipeError(f"{stage.name} at {stage.site} merges others than its {total} candidates")
    if not all(bool(one.isfinite().all()) for one in weights):
        raise RecipeError(f"{stage.name} at {stage.site} merges with weights that are not finite")
    kept = torch.zeros(heads, total, dtype=torch.bool, device=selection.index.device)
    kept.scatter_(1, selection.index.expand(heads, -1), True)  # [H, N]
    target = merge.target.to(kept.device).expand(heads, -1)  # [H, M]
    if not bool((kept.gather(1, target) | ~real_pairs(merge).to(kept.device)).all()):
        raise RecipeError(f"{stage.name} at {stage.site} merges into tokens that it does not keep")


def real_pairs(merge: Merge) -> Tensor:
    """`[M]` or `[H, M]` bool: which pairs merge anything, and are no filling."""
    real = merge.weight != 0
    return real if merge.value_weight is None else real | (merge.value_weight != 0)


def translate(merge: Merge | None, names: Tensor) -> Merge | None:
    """A merge between other names of the same tokens.

    Args:
        merge: Counts along `names`.
        names: `[N]`; or `[H, N]` at a cache, where the merge becomes one of `[H, M]`, which are
            one row expanded if all heads agree.
    """
    if merge is None:
        return None

    def named(rows: Tensor) -> Tensor:
        if names.ndim == 1:
            return names[rows]
        if names.stride(0) == 0 and rows.ndim == 1:
            return names[0][rows].expand(len(names), -1)
        return names.gather(1, rows.expand(len(names), -1))

    shape = () if names.ndim == 1 else (len(names), -1)
    weight, value_weight = merge.weight, merge.value_weight
    if shape:
        weight = weight.expand(shape)
        value_weight = None if value_weight is None else value_weight.expand(shape)
    return Merge(named(merge.source), named(merge.target), weight, value_weight, merge.mass)


def absorb_entries(
    layer: PrunedLayer, sample: int, source: Tensor, target: Tensor, merge: Merge
) -> None:
    """Replace keys and values of targets by weighted sums of their sources.

    Args:
        layer: The cache of a layer.
        sample: Row of the batch.
        source: `[H, M]`, columns that give.
        target: `[H, M]`, columns that receive.
        merge: `[H, M]`, with the weights.
    """
    real = real_pairs(merge).to(source.device)
    if not bool(real.any()):
        return
    layer.own()
    heads, stored = layer.keys.shape[1], layer.keys.shape[2]
    ahead = torch.arange(heads, device=source.device)[:, None] * stored  # heads one after another
    pairs = (source + ahead)[real], (target + ahead)[real]
    value_weight = merge.weight if merge.value_weight is None else merge.value_weight
    for entries, weight in ((layer.keys, merge.weight), (layer.values, value_weight)):
        absorb_(entries[sample].view(heads * stored, -1), *pairs, weight.to(real.device)[real])
    if not merge.mass:
        return
    mass = layer.mass
    if mass is None:
        mass = torch.ones(len(layer.keys), 1, stored, device=layer.index.device)
    alike = mass.shape[1] == 1 and all(one.stride(0) == 0 for one in (merge.source, merge.weight))
    heads = 1 if alike else heads
    mass = mass.expand(-1, heads, -1).clone()  # [B, 1 or H, S]
    pairs = (source + ahead)[:heads][real[:heads]], (target + ahead)[:heads][real[:heads]]
    absorb_(mass[sample].view(-1, 1), *pairs, torch.ones(len(pairs[0])))
    layer.mass = mass
