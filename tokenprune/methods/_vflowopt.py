"""The parts of VFlowOpt: the importance map, the round that recycles, and the later rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from tokenprune.core.context import Context, EncoderView
from tokenprune.core.layout import Modality, TokenLayout
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.selectors import top
from tokenprune.core.signal import EncoderSignal
from tokenprune.core.site import Input, Layer, Site
from tokenprune.core.stage import Budgeted, Scored
from tokenprune.errors import UnsupportedModelError

__all__ = ["Importance", "VFlowOptInput", "VFlowOptLayer"]

_VISION: Final = frozenset[Modality]({"image", "video"})
_NAME: Final = "vflowopt"
_ROWS_AT_A_TIME: Final = 64


@dataclass(frozen=True, kw_only=True)
class Importance(EncoderSignal):
    """The importance of each encoder token: what the anchors attend to, plus entropy.

    Args:
        t: Anchor threshold; None is 0.05 times the tokens of a view (our choice).
        alpha: Weight of the entropy.
        log_base: Base of its logarithm.
    """

    t: float | None = None
    alpha: float = 0.0
    log_base: float = 2.0

    def of(self, view: EncoderView) -> Tensor:
        threshold = 0.05 * view.tokens if self.t is None else self.t
        relevance = _relevance(view, threshold)  # [W, Nv]
        if self.alpha == 0:
            return relevance
        entropy = _entropy(view.grey(), self.log_base)
        return relevance + self.alpha * entropy.softmax(dim=-1).to(relevance)


def _relevance(view: EncoderView, threshold: float) -> Tensor:
    """Mean attention row of the anchors of each view; of all its tokens if none is one."""
    received = view.received()  # [W, Nv], sums to Nv
    # Fewer than Nv / t tokens can receive more than t, so these rows hold all anchors.
    most = min(view.tokens, math.floor(view.tokens / max(threshold, 1.0)))
    strongest = received.argsort(dim=-1, descending=True, stable=True)[:, :most]
    anchors = received.gather(-1, strongest) > threshold  # [W, R]
    total = torch.zeros_like(received)
    for start in range(0, most, _ROWS_AT_A_TIME):
        block = slice(start, start + _ROWS_AT_A_TIME)
        total += (view.rows(strongest[:, block]) * anchors[:, block, None]).sum(dim=1)
    number = anchors.sum(dim=-1, keepdim=True)
    return torch.where(number > 0, total / number.clamp(min=1), received / view.tokens)


def _entropy(grey: Tensor, base: float) -> Tensor:
    """Entropy of the grey levels of each patch: `[W, Nv, pixels]` 0..255 -> `[W, Nv]`."""
    levels = grey.round().clamp(0, 255).to(torch.int64)
    histogram = torch.zeros(*levels.shape[:-1], 256, device=grey.device)
    histogram.scatter_add_(-1, levels, torch.ones_like(levels, dtype=histogram.dtype))
    share = histogram / levels.shape[-1]
    entropy: Tensor = torch.special.entr(share).sum(dim=-1)
    return entropy / math.log(base)


@dataclass(frozen=True, kw_only=True)
class _Round(Budgeted):
    """A round that ranks tokens by their importance.

    Args:
        importance: The map.
    """

    importance: Importance

    name = _NAME
    modalities = _VISION

    @property
    def needs(self) -> tuple[Importance]:
        return (self.importance,)


@dataclass(frozen=True, kw_only=True)
class VFlowOptInput(_Round):
    """Round one: keep the most important tokens, some as merged remains of a grid cell.

    Args:
        importance: The map.
        keep: Share that leaves the round, recycled tokens included.
        per: Shares are of each item, or of the whole prompt.
        on: Modalities that are pruned; None for all that have a map.
        cell: Side of a grid cell in tokens; None is 0.55 of each canvas side, at least 2 (our
            choice).
        recycled: Largest share of the kept tokens that are recycled ones.

    Raises:
        UnsupportedModelError: The map holds nan, which merges would spread.
    """

    cell: float | None = None
    recycled: float = 0.25

    site = Input()

    def select(self, context: Context) -> Selection:
        scores = context[self.importance]
        # How many cells there are decides the sizes of tensors: on a device each would be a wait.
        importance, layout = scores.cpu(), context.tokens.to("cpu")
        if importance.isnan().any():
            raise UnsupportedModelError(
                "the importance map holds nan: this model's adapter reads no encoder for some of "
                "the tokens, or the encoder overflowed; load the model in bfloat16 or float32"
            )
        cells, area = _cells(layout, self.cell)
        budget = self.budget(context)
        groups = budget.groups.cpu()
        parts = []
        for group, keep in enumerate(budget.counts.tolist()):
            rows = (groups == group).nonzero()[:, 0]
            if not len(rows):
                continue
            grid = math.floor((1 / area[rows]).sum().item() + 1e-6)
            slots = min(grid, math.floor(self.recycled * keep + 1e-9))
            parts.append(_recycle(importance[rows], cells[rows], keep, slots).at(rows))
        columns = (torch.cat(column).to(scores.device) for column in zip(*parts, strict=True))
        kept, source, target, weight = columns
        merge = Merge(source, target, weight) if len(source) else None
        return Selection(kept.sort().values, merge, scores)


@dataclass(frozen=True, kw_only=True)
class VFlowOptLayer(Scored, _Round):
    """Rounds two and three: keep the most important tokens of those left.

    Args:
        importance: The map.
        layer: Decoder layer, from 0, that the kept tokens enter.
        keep: Share kept of what is left.
        per: Shares are of each item, or of the whole prompt.
        on: Modalities that are pruned; None for all that have a map.
    """

    layer: int

    @property
    def site(self) -> Site:
        return Layer(self.layer)

    def score(self, context: Context) -> Tensor:
        return context[self.importance]


def _cells(layout: TokenLayout, side: float | None) -> tuple[Tensor, Tensor]:
    """Grid cell of each token, `[N]` int64, and the area of the cells of its canvas, `[N]`."""
    canvas = torch.unique(layout.canvas, return_inverse=True)[1]
    key, area = canvas, torch.ones(len(layout), dtype=torch.float64)
    for place in (layout.row, layout.column):
        extent = torch.zeros_like(canvas).scatter_reduce(0, canvas, place + 1, "amax")[canvas]
        length = (0.55 * extent.to(torch.float64)).clamp(min=2.0)
        if side is not None:
            length = torch.full_like(length, side)
        key = key * 2**20 + (place / length).floor().to(torch.int64)
        area = area * length
    return key, area


class _Recycled(NamedTuple):
    kept: Tensor  # [K]
    source: Tensor  # [M], as in Merge
    target: Tensor
    weight: Tensor

    def at(self, rows: Tensor) -> _Recycled:
        """The same tokens, as rows of the table that these are rows of."""
        return self._replace(
            kept=rows[self.kept], source=rows[self.source], target=rows[self.target]
        )


def _recycle(importance: Tensor, cells: Tensor, keep: int, slots: int) -> _Recycled:
    """Choose the tokens of one item that stay, `slots` of them as merged cells.

    The strongest stay themselves; the others are grouped by cell. With more cells than slots the
    weaker cells are dropped; with fewer the strongest of the others stay themselves, too.

    Args:
        importance: `[n]`.
        cells: `[n]` int64.
        keep: Tokens that stay in all.
        slots: How many of these are reserved for cells.
    """
    order = importance.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    names, cells = torch.unique(cells, return_inverse=True)
    nothing = torch.zeros(len(names), dtype=torch.int64)
    weakest = nothing.scatter_reduce(0, cells, rank, "amax", include_self=False)
    # If d tokens stay themselves, the cells whose weakest rank is d or more hold others. Each
    # further token that stays empties at most one cell, so the sum below meets `keep`.
    direct = torch.arange(keep - slots, keep + 1)
    filled = len(names) - torch.searchsorted(weakest.sort().values, direct)
    stay = int(direct[direct + filled >= keep][0])
    low = rank >= stay
    weight = torch.where(low, importance.to(torch.float64).clamp(min=0.0), 0.0)
    strength = torch.zeros(len(names), dtype=torch.float64).index_add(0, cells, weight)
    chosen = top(torch.where(weakest >= stay, strength, -1.0), keep - stay)
    merged = torch.zeros(len(names), dtype=torch.bool).index_fill(0, chosen, True)[cells] & low
    best = torch.full_like(nothing, len(order)).scatter_reduce(
        0, cells[low], rank[low], "amin", include_self=True
    )
    size = nothing.index_add(0, cells[low], torch.ones_like(cells[low]))
    source = merged.nonzero()[:, 0]
    cell = cells[source]
    even = 1.0 / size[cell]
    weight = torch.where(strength[cell] > 0, weight[source] / strength[cell], even)
    kept = torch.cat([order[:stay], order[best[chosen]]])
    return _Recycled(kept, source, order[best[cell]], weight.to(torch.float32))
