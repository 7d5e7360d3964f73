"""Stand-ins for what the engine hands to stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.core.context import (
    CacheContext,
    Context,
    EncoderView,
    LayerContext,
    ModelShape,
)
from tokenprune.core.layout import AUDIO, IMAGE, VIDEO, TokenLayout

SHAPE = ModelShape(layers=28, heads=4, kv_heads=2, width=8, head_width=2)


class DenseView(EncoderView):
    """The whole attention matrix, `[W, Nv, Nv]`; remembers how many rows it was asked for."""

    def __init__(self, attention: Tensor) -> None:
        self.attention = attention
        self.views, self.tokens = attention.shape[:2]
        self.rows_asked = 0

    def received(self) -> Tensor:
        return self.attention.sum(dim=1)

    def rows(self, queries: Tensor) -> Tensor:
        self.rows_asked += queries.shape[1]
        return torch.stack([view[rows] for view, rows in zip(self.attention, queries, strict=True)])


def grid(
    rows: int, columns: int, frames: int = 1, *, video: bool = False, start: int = 5
) -> TokenLayout:
    """One image of some tiles, or one video of one frame a second."""
    frame, row, column = torch.meshgrid(
        torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij"
    )
    frame = frame.flatten()
    n = len(frame)
    return TokenLayout(
        position=torch.arange(start, start + n),
        modality=torch.full((n,), VIDEO if video else IMAGE),
        item=torch.zeros(n, dtype=torch.int64),
        canvas=frame,
        frame=frame if video else torch.full((n,), -1),
        row=row.flatten(),
        column=column.flatten(),
        seconds=frame.double() if video else torch.full((n,), torch.nan, dtype=torch.float64),
    )


def sound(tokens: int, start: int = 5) -> TokenLayout:
    """One sound of four tokens a second."""
    index = torch.arange(tokens)
    return TokenLayout(
        position=index + start,
        modality=torch.full_like(index, AUDIO),
        item=torch.zeros_like(index),
        canvas=torch.zeros_like(index),
        frame=index,
        row=torch.full_like(index, -1),
        column=index,
        seconds=index.double() / 4,
    )


def join(*layouts: TokenLayout, gap: int = 3) -> TokenLayout:
    """Several items in one prompt, with some text between them."""
    columns: list[dict[str, Tensor]] = []
    position = items = canvases = 0
    for layout in layouts:
        column = {name: getattr(layout, name) for name in TokenLayout.__dataclass_fields__}
        column["position"] = torch.arange(position, position + len(layout))
        column["item"] = layout.item + items
        column["canvas"] = layout.canvas + canvases
        position += len(layout) + gap
        items += int(layout.item.max()) + 1
        canvases += int(layout.canvas.max()) + 1
        columns.append(column)
    return TokenLayout(**{name: torch.cat([c[name] for c in columns]) for name in columns[0]})


def input_context(
    layout: TokenLayout, importance: Tensor | None = None, **more: Any
) -> Context | LayerContext:
    """What a stage sees at the input, or at a layer if `layer` is given."""
    common: dict[str, Any] = {
        "layout": layout,
        "features": torch.arange(float(len(layout)))[:, None],
        "shape": SHAPE,
        "memory": {},
        "encoder_map": lambda name: {"vflowopt": importance}[name],
        **more,
    }
    return LayerContext(**common) if "layer" in more else Context(**common)


def cache_context(
    layout: TokenLayout,
    attention: Tensor | None = None,
    *,
    heads: int = 2,
    rows: Tensor | None = None,
    layer: int = 0,
    memory: dict[str, Any] | None = None,
) -> CacheContext:
    """What a stage sees of a cache of `heads` key-value heads."""
    rows = torch.arange(len(layout)).expand(heads, -1) if rows is None else rows
    stored = torch.zeros(*rows.shape, 2)
    return CacheContext(
        layer=layer,
        layout=layout,
        rows=rows,
        keys=stored,
        values=stored,
        attention=attention,
        shape=SHAPE,
        memory={} if memory is None else memory,
    )
