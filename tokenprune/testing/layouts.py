"""What all layouts have in common, whatever the family."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core.layout import AUDIO, IMAGE, MODALITIES, VIDEO, Modality, TokenLayout
from tokenprune.testing.outcomes import hold, some

__all__ = ["check_layout"]


def check_layout(layout: TokenLayout) -> None:
    """Hold the columns of a layout to each other.

    Raises:
        AssertionError: They do not fit.
    """
    for what in ("item", "canvas"):
        numbers = _distinct(getattr(layout, what))
        counted = list(range(len(numbers)))
        hold(numbers == counted, f"{what} numbers are {some(numbers)}, not {some(counted)}")
    hold(bool((layout.position.diff() > 0).all()), "positions do not increase")
    for canvas in _distinct(layout.canvas):
        on = layout[layout.canvas == canvas]
        where = f"canvas {canvas}"
        for what in ("item", "modality", *([] if int(on.modality[0]) == AUDIO else ["frame"])):
            values = _distinct(getattr(on, what))
            hold(len(values) == 1, f"{where} has more than one {what}: {some(values)}")
        places = list(zip(on.row.tolist(), on.column.tolist(), strict=True))
        hold(len(set(places)) == len(places), f"two tokens of {where} are in one place")
        hold(_row_by_row(places), f"tokens of {where} do not go row by row: {some(places)}")
    for item in _distinct(layout.item):
        on = layout[layout.item == item]
        modality: Modality = next(m for m, code in MODALITIES.items() if code == on.modality[0])
        where = f"item {item}, {modality},"
        for what, without in (("frame", IMAGE), ("row", AUDIO)):
            values = getattr(on, what)
            if MODALITIES[modality] == without:
                hold(bool((values == -1).all()), f"{where} must have -1 as {what}")
            else:
                hold(bool((values >= 0).all()), f"{where} has a {what} below 0")
        if MODALITIES[modality] == VIDEO:
            frames = _distinct(on.frame)
            hold(frames == list(range(len(frames))), f"{where} has frames {some(frames)}")
            hold(bool((on.frame.diff() >= 0).all()), f"{where} has frames that go backwards")
        seconds = on.seconds[~on.seconds.isnan()]
        hold(bool((seconds.diff() >= 0).all()), f"{where} has seconds that go backwards")


def _row_by_row(places: list[tuple[int, int]]) -> bool:
    """Whether tokens go along rows, those of each tile of a canvas by themselves."""
    first = [column for row, column in places if row == places[0][0]]
    starts = len(first) < 2 or places[1] == (places[0][0], first[1])
    by_row: dict[int, int] = {}
    by_column: dict[int, int] = {}
    for row, column in places:
        if by_row.get(row, -1) >= column or by_column.get(column, -2) >= row:
            return False
        by_row[row], by_column[column] = column, row
    return starts


def _distinct(values: Tensor) -> list[int]:
    return sorted(set(values.tolist()))
