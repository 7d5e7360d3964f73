"""Layouts: what each placeholder of a prompt stands for, from encoder calls and the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.adapters.base import Adapter, Item, MediaCall
from tokenprune.core.layout import MODALITIES, Modality, TokenLayout
from tokenprune.errors import MediaError, UnsupportedModelError

__all__ = ["lay_out"]


def lay_out(
    adapter: Adapter,
    input_ids: Tensor,
    calls: list[MediaCall],
    prompt: dict[str, Any],
    offset: int = 0,
    frame_seconds: Sequence[Tensor] | None = None,
) -> list[tuple[TokenLayout, list[tuple[int, int]]]]:
    """Lay out the media tokens of every row of a batch.

    With beams or several return sequences a sample fills adjacent rows but was encoded once.

    Args:
        adapter: Of the model.
        input_ids: `[B, S]` with placeholders.
        calls: The encoder calls since the last prompt; their `items` are filled in.
        prompt: As in `Adapter.items`.
        offset: Index of the first token of `input_ids` in the logical sequence.
        frame_seconds: For each clip `[F]` float64, when its pictures are shown; for each image
            in a family that knows no video. They count where the model is not told.

    Returns:
        For each row its layout, on the CPU, and its items as (call, item of the call) pairs:
        `layout.item` counts them.

    Raises:
        UnsupportedModelError: Placeholders and encoded items do not fit together.
        MediaError: `frame_seconds` does not fit the clips.
    """
    ids = input_ids.cpu()
    for call in calls:
        call.items = adapter.items(call, prompt)
    if frame_seconds is not None:
        _set_seconds(adapter, ids, calls, frame_seconds)
    queues: dict[Modality, list[_Encoded]] = {name: [] for name in adapter.modalities}
    for number, call in enumerate(calls):
        for place, item in enumerate(call.items):
            queues[call.modality].append(_Encoded(call.modality, number, place, item))
    rows: list[list[_Placed]] = [[] for _ in ids]
    types = prompt.get("mm_token_type_ids")
    types = types.cpu() if types is not None and types.shape == ids.shape else None
    for modality, placeholders in adapter.placeholders(ids, types).items():
        # With beams, pictures were encoded once a sample, but audio may be encoded once a row.
        repeats = _rows_per_sample(placeholders, modality, queues[modality])
        for b, row in enumerate(placeholders):  # [S]
            if b % repeats == 0:
                placed = _place(row.nonzero()[:, 0], queues[modality])
            rows[b] += placed
    return [_layout(placed, offset) for placed in rows]


class _Encoded(NamedTuple):
    """An item that waits for its placeholders, and the encoder call that it is of."""

    modality: Modality
    call: int
    place: int
    item: Item


class _Placed(NamedTuple):
    """An item and the indices `[P]` of its placeholders in a row."""

    encoded: _Encoded
    where: Tensor


def _set_seconds(
    adapter: Adapter, ids: Tensor, calls: list[MediaCall], clips: Sequence[Tensor]
) -> None:
    """Give items the times of their frames where the model is not told."""
    kind = "video" if "video" in adapter.modalities else "image"
    shown = [call for call in calls if call.modality == kind]
    count = sum(len(call.items) for call in shown)
    # Older releases of transformers encode clips once a beam, in adjacent rows.
    repeats = count // len(clips) if clips else 0
    beams = ids[::repeats].repeat_interleave(repeats, dim=0) if repeats > 1 else ids
    if count != repeats * len(clips) or not torch.equal(beams, ids):
        raise MediaError(
            f"frame_seconds has the times of {len(clips)} {kind}s, but the prompt has {count}; "
            f"give one list for each {kind}, in the order of the prompt"
        )
    given = (clip for clip in clips for _ in range(repeats))
    for call in shown:
        call.items = [
            _with_seconds(adapter, item, seconds)
            for item, seconds in zip(call.items, given, strict=False)
        ]


def _with_seconds(adapter: Adapter, item: Item, seconds: Tensor) -> Item:
    """An item with the times of its frames, where the model has none.

    Args:
        adapter: Of the model.
        item: A clip.
        seconds: `[F]`, those of the pictures that the processor was given.
    """
    times, frame = adapter.frame_times(seconds), item.frame.clamp_min(0)  # [T], [N]
    if len(times) != int(frame.max()) + 1:
        raise MediaError(
            f"frame_seconds has {len(seconds)} times for a clip that the model sees as "
            f"{int(frame.max()) + 1} frames; give one time for each picture that the processor "
            "was given"
        )
    return replace(item, seconds=torch.where(item.seconds.isnan(), times[frame], item.seconds))


def _rows_per_sample(placeholders: Tensor, modality: Modality, queue: list[_Encoded]) -> int:
    """How many adjacent rows share one sample.

    Args:
        placeholders: `[B, S]` bool, where they stand.
        modality: Of them.
        queue: What was encoded of it.
    """
    count = int(placeholders.sum())
    encoded = sum(len(one.item.real) for one in queue)
    if count in (0, encoded):  # what is left of an earlier prompt is no part of this one
        return 1
    repeats = count // max(1, encoded)
    if repeats and count == encoded * repeats and len(placeholders) % repeats == 0:
        return repeats
    raise UnsupportedModelError(
        f"the prompt holds {count} {modality} placeholders, but {encoded} {modality} "
        "tokens were encoded; let the model's processor expand the placeholders, give media as "
        "pixels or sound, not as features, and all in one prefill (prefill_chunk_size=None)"
    )


def _place(where: Tensor, queue: list[_Encoded]) -> list[_Placed]:
    """Take the items of one row, whose placeholders lie at `where`, off the queue."""
    placed = []
    while len(where):
        length = len(queue[0].item.real) if queue else 0
        if not 0 < length <= len(where):
            raise UnsupportedModelError(
                "the placeholders of a row of the batch do not hold whole images, clips or "
                "sounds; give media in the order of the rows"
            )
        placed.append(_Placed(queue.pop(0), where[:length]))
        where = where[length:]
    return placed


def _layout(placed: list[_Placed], offset: int) -> tuple[TokenLayout, list[tuple[int, int]]]:
    """The layout of one row, and its items in the order of the prompt."""
    placed = sorted(placed, key=lambda one: int(one.where[0]))
    columns: list[list[Tensor]] = [[] for _ in range(8)]
    canvases = 0
    for number, (encoded, where) in enumerate(placed):
        item = encoded.item
        position = where[item.real] + offset  # [N]
        parts = (
            position,
            torch.full_like(position, MODALITIES[encoded.modality]),
            torch.full_like(position, number),
            item.canvas + canvases,
            item.frame,
            item.row,
            item.column,
            item.seconds,
        )
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
        canvases += int(item.canvas.max()) + 1 if len(item.canvas) else 0
    if not placed:
        none = torch.zeros(0, dtype=torch.int64)
        return TokenLayout(*[none] * 7 + [none.to(torch.float64)]), []
    layout = TokenLayout(*(torch.cat(column) for column in columns))
    # Audio inside a video interleaves two items.
    layout = layout[layout.position.argsort()]
    return layout, [(encoded.call, encoded.place) for encoded, _ in placed]
