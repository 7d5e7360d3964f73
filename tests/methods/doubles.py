"""Stand-ins for what the engine hands to stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.context import Candidates, Context, EncoderView, Lifetime, ModelShape
from tokenprune.core.layout import AUDIO, IMAGE, VIDEO, TokenLayout
from tokenprune.core.signal import Attention, EncoderSignal, Hidden, Keys, Signal, Values

SHAPE = ModelShape(layers=28, heads=4, kv_heads=2, width=8, head_width=2)

State = dict[type[Any], Any]
"""What stages of one method hand to later ones, by kind."""


class DenseView(EncoderView):
    """The whole attention matrix, `[W, Nv, Nv]`; remembers how many rows it was asked for.

    Args:
        attention: It.
        class_row: `[W, Nv]`, this and the others where a test lets them be read.
        keys: `[W, Nv, d]`.
        class_key: `[W, d]`.
        grey: `[W, Nv, pixels]`.
    """

    def __init__(
        self,
        attention: Tensor,
        *,
        class_row: Tensor | None = None,
        keys: Tensor | None = None,
        class_key: Tensor | None = None,
        grey: Tensor | None = None,
    ) -> None:
        self.attention = attention
        self.views, self.tokens = attention.shape[:2]
        self.has_class = class_row is not None or class_key is not None
        self.rows_asked = 0
        self._given = {"class_row": class_row, "keys": keys, "class_key": class_key, "grey": grey}

    def received(self) -> Tensor:
        return self.attention.sum(dim=1)

    def rows(self, queries: Tensor) -> Tensor:
        self.rows_asked += queries.shape[1]
        return torch.stack([view[rows] for view, rows in zip(self.attention, queries, strict=True)])

    def class_row(self) -> Tensor:
        return self._read("class_row")

    def keys(self) -> Tensor:
        return self._read("keys")

    def class_key(self) -> Tensor:
        return self._read("class_key")

    def grey(self) -> Tensor:
        return self._read("grey")

    def _read(self, name: str) -> Tensor:
        found = self._given[name]
        if found is None:
            raise AssertionError(f"this view's {name} was not to be read")
        return found


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


def candidates(
    layout: TokenLayout,
    rows: Tensor | None = None,
    *,
    layer: int | None = None,
    heads: int | None = None,
    shape: ModelShape = SHAPE,
) -> Candidates:
    """What a stage may keep: all of a layout, or `rows` of it.

    Args:
        layout: The prompt's media tokens.
        rows: `[N]`, or `[H, N]` at a cache; None for all.
        layer: Decoder layer; None at the input.
        heads: Key-value heads of a cache that holds all, if `rows` is None.
        shape: Sizes of the language model.
    """
    if rows is None:
        rows = torch.arange(len(layout))
        rows = rows if heads is None else rows.expand(heads, -1)
    return Candidates(layout=layout, rows=rows, layer=layer, shape=shape)


def context_of(
    of: Candidates,
    signals: Mapping[Signal[Any], Any],
    importance: Tensor | None = None,
    state: State | None = None,
) -> Context:
    """What a stage sees of some candidates.

    Args:
        of: The candidates.
        signals: Values of the candidates.
        importance: `[P]` or `[P, C]` of the layout: the value of every encoder signal that
            `signals` does not have.
        state: What earlier stages of the method left; changed in place.
    """
    kept: State = {} if state is None else state

    def collect(signal: Signal[Any]) -> Any:
        if signal not in signals and isinstance(signal, EncoderSignal) and importance is not None:
            return importance[of.rows]
        return signals[signal]

    def make_state(kind: type[Any], lives: Lifetime) -> Any:
        return kept.setdefault(kind, kind())

    return Context(
        layout=of.layout,
        rows=of.rows,
        layer=of.layer,
        shape=of.shape,
        collect=collect,
        make_state=make_state,
    )


def input_context(
    layout: TokenLayout,
    importance: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    layer: int | None = None,
    signals: Mapping[Signal[Any], Any] | None = None,
    state: State | None = None,
    shape: ModelShape = SHAPE,
) -> Context:
    """What a stage sees at the input, or at a layer if `layer` is given.

    Args:
        layout: The prompt's media tokens.
        importance: As in `context_of`.
        rows: `[N]`, the candidates; None for all.
        layer: Decoder layer; None at the input.
        signals: Values of the candidates; features are the tokens' numbers, `[N, 1]`, without.
        state: As in `context_of`.
        shape: Sizes of the language model.
    """
    of = candidates(layout, rows, layer=layer, shape=shape)
    features = of.rows.to(torch.float32)[:, None]
    return context_of(of, {Hidden(): features, **(signals or {})}, importance, state)


def cache_context(
    layout: TokenLayout,
    attention: Tensor | None = None,
    *,
    heads: int = 2,
    rows: Tensor | None = None,
    layer: int = 0,
    signals: Mapping[Signal[Any], Any] | None = None,
    state: State | None = None,
) -> Context:
    """What a stage sees of a cache of `heads` key-value heads.

    Args:
        layout: The prompt's media tokens.
        attention: `[heads, N]`, of the last token of the prompt to the candidates.
        heads: Key-value heads, unless `rows` says how many.
        rows: `[H, N]`, the candidates; None for all.
        layer: Decoder layer.
        signals: Values of the candidates; keys and values are zero without.
        state: As in `context_of`.
    """
    kv_heads = heads if rows is None else len(rows)
    query_heads = SHAPE.heads if attention is None else len(attention)
    shape = ModelShape(
        layers=SHAPE.layers, heads=query_heads, kv_heads=kv_heads, width=8, head_width=2
    )
    of = candidates(layout, rows, layer=layer, heads=heads, shape=shape)
    stored = torch.zeros(*of.rows.shape, 2)
    known: dict[Signal[Any], Any] = {Keys(): stored, Values(): stored}
    if attention is not None:
        known[Attention()] = attention[:, None]
    return context_of(of, {**known, **(signals or {})}, state=state)
