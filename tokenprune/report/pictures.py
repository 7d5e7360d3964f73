"""Pictures of what was kept, and of where the time went."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tokenprune.core.layout import AUDIO, TokenLayout
from tokenprune.errors import MediaError, MissingExtraError
from tokenprune.report.seconds import Phases, Span
from tokenprune.report.timeline import Timeline

__all__ = ["chart", "check_chart", "check_picture", "overlay", "save_picture"]

_GAP = 4
_LARGEST = 1600  # pixels that a side of the whole picture may have
_MOST_FRAMES = 64
_CELL_WIDTH = 200  # pixels that a small frame is enlarged to
_DARK = 0.16  # brightness of what is gone
_BAR = 0.8  # height of the bars of a line


def overlay(
    layout: TokenLayout, presence: Tensor, frames: Any, columns: int | None = None
) -> Image.Image:
    """Draw frames side by side, dark where tokens were dropped.

    The brightness of a cell is the share of layers and heads that still hold its token. Of a
    tiled image the first canvas is drawn, unless each canvas has a picture; of long videos every
    n-th frame.

    Args:
        layout: `N` media tokens of one sample.
        presence: `[N]` in [0, 1].
        frames: `[F, 3, H, W]` uint8, or a sequence of PIL images or `[H, W, 3]` arrays: one for
            each frame or image, or one for each canvas.
        columns: Frames side by side; by default about as wide as high.

    Raises:
        MediaError: There are no frames, or no visual tokens, to draw.
    """
    pictures = _pictures(frames)
    canvases = _canvases(layout, len(pictures))
    if not pictures or not canvases:
        raise MediaError(
            f"an overlay needs frames and visual tokens, got {len(pictures)} frames and "
            f"{len(canvases)} canvases"
        )
    step = math.ceil(len(pictures) / _MOST_FRAMES)
    drawn = []
    for number in range(0, len(pictures), step):
        # Several frames may share one canvas: Qwen-VL folds two into a temporal patch.
        rows = canvases[number * len(canvases) // len(pictures)]
        drawn.append(_shade(pictures[number], layout, presence, rows))
    return _tile(drawn, columns)


def check_picture(path: str | Path) -> None:
    """Check that a picture can be written to a path.

    Raises:
        MediaError: The suffix names no format, or the folder is missing or not writable.
    """
    path = Path(path)
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise MediaError(
            f"cannot write a picture to {str(path)!r}: the suffix must name a format; "
            "use .png, .jpg or .webp"
        )
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise MediaError(
            f"cannot write a picture to {str(path)!r}: give a file in a folder that exists and "
            "may be written to"
        )


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture.

    Raises:
        MediaError: As `check_picture`.
    """
    check_picture(path)
    try:
        picture.save(path)
    except OSError as error:
        raise MediaError(f"cannot write a picture to {str(path)!r}: {error}") from error


def _pictures(frames: Any) -> list[Image.Image]:
    if isinstance(frames, Image.Image):
        return [frames.convert("RGB")]
    if isinstance(frames, Tensor):
        frames = frames.detach().cpu().permute(0, 2, 3, 1).numpy()
    return [
        frame.convert("RGB") if isinstance(frame, Image.Image) else Image.fromarray(frame)
        for frame in (frames if isinstance(frames, Sequence) else np.asarray(frames))
    ]


def _canvases(layout: TokenLayout, pictures: int) -> list[Tensor]:
    """Rows of the layout that lie on each canvas to draw, in order."""
    found: dict[tuple[int, int], Tensor] = {}
    visual = layout.modality != AUDIO
    numbers = sorted(set(layout.canvas[visual].tolist()))
    if len(numbers) == pictures:
        return [((layout.canvas == number) & visual).nonzero()[:, 0] for number in numbers]
    for canvas in numbers:
        rows = ((layout.canvas == canvas) & visual).nonzero()[:, 0]
        place = int(layout.item[rows[0]]), int(layout.frame[rows[0]])
        found.setdefault(place, rows)
    return list(found.values())


def _shade(
    picture: Image.Image, layout: TokenLayout, presence: Tensor, rows: Tensor
) -> Image.Image:
    height, width = int(layout.row[rows].max()) + 1, int(layout.column[rows].max()) + 1
    light = torch.full((height, width), _DARK)
    light[layout.row[rows], layout.column[rows]] = _DARK + (1 - _DARK) * presence[rows].float()
    scale = max(1, round(_CELL_WIDTH / picture.width))
    picture = picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
    )
    mask = Image.fromarray((light.numpy() * 255).astype(np.uint8)).resize(
        picture.size, Image.Resampling.NEAREST
    )
    shaded = Image.composite(picture, Image.new("RGB", picture.size), mask)
    _grid(shaded, height, width)
    return shaded


def _grid(picture: Image.Image, height: int, width: int) -> None:
    """Thin lines between the cells."""
    draw = ImageDraw.Draw(picture)
    for row in range(1, height):
        y = row * picture.height // height
        draw.line([(0, y), (picture.width, y)], fill=(70, 70, 70))
    for column in range(1, width):
        x = column * picture.width // width
        draw.line([(x, 0), (x, picture.height)], fill=(70, 70, 70))


def _tile(pictures: list[Image.Image], columns: int | None) -> Image.Image:
    wide, high = max(p.width for p in pictures), max(p.height for p in pictures)
    if columns is None:
        columns = max(1, round(math.sqrt(len(pictures) * high / wide)))
    rows = math.ceil(len(pictures) / columns)
    size = columns * (wide + _GAP) - _GAP, rows * (high + _GAP) - _GAP
    whole = Image.new("RGB", size, (255, 255, 255))
    for number, picture in enumerate(pictures):
        x, y = number % columns * (wide + _GAP), number // columns * (high + _GAP)
        whole.paste(picture, (x, y))
    factor = _LARGEST / max(whole.size)
    if factor < 1:
        whole = whole.resize((int(whole.width * factor), int(whole.height * factor)))
    return whole


def chart(timeline: Timeline) -> Image.Image:
    """Draw a timeline: a line for each phase, a bar for each span, a colour for each group.

    Spans of one phase that overlap, as those of several decoding workers, lie above each other.

    Args:
        timeline: With at least one span.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check_chart()
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]  # of listed maps only
    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    last = max(end for group in timeline.groups for _, end in group.spans)
    phases = tuple(Phases().as_dict())
    for line, phase in enumerate(phases):
        spans = [
            (span, number)
            for number, group in enumerate(timeline.groups)
            for span in group.as_dict()[phase]
        ]
        lanes = _lanes([span for span, _ in spans])
        height = _BAR / (max(lanes, default=0) + 1)
        for ((begin, end), number), lane in zip(spans, lanes, strict=True):
            top = line - _BAR / 2 + lane * height
            colour = colours[number % len(colours)]
            axes.broken_barh([(begin, end - begin)], (top, height), facecolors=colour)
            if end - begin > last / 50:
                middle = (begin + end) / 2, top + height / 2
                axes.text(*middle, str(number), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(phases)), phases)
    axes.set_ylim(len(phases) - 0.5, -0.5)
    axes.set_xlim(0, last)
    axes.set_xlabel("seconds")
    axes.set_title(f"{len(timeline.groups)} groups of frames, by number", fontsize=10)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def check_chart() -> None:
    """Check that timelines can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
    except Exception as error:  # broken installations raise more than ImportError
        raise MissingExtraError(
            'timelines need matplotlib: pip install "tokenprune-mm[plot]"'
        ) from error


def _lanes(spans: Sequence[Span]) -> list[int]:
    """For each span the first lane in which nothing lies beside it."""
    ends: list[float] = []
    lanes = [0] * len(spans)
    for number in sorted(range(len(spans)), key=lambda one: spans[one]):
        begin, end = spans[number]
        free = (lane for lane, until in enumerate(ends) if until <= begin)
        lane = next(free, len(ends))
        ends[lane : lane + 1] = [end]
        lanes[number] = lane
    return lanes
