"""`Answer`: what a model said about a file, and what that cost; tables of answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenprune.report.change import Change, MediaTokens
from tokenprune.report.report import Report
from tokenprune.report.seconds import Seconds
from tokenprune.report.timeline import Timeline

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Answer", "numbers", "table"]


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    Attributes:
        answer: The model's words.
        media_tokens: Counts before and after pruning, and what each site let through.
        seconds: How long each part took; the processor is left out.
        kv_bytes: Bytes of the cache at the end of prefill, unpruned and measured.
        frames: Frames that the model was given.
        recipe: The recipe, as text.
        model: Name of the model.
        report: The full report.
        pictures: `[F, 3, H, W]` uint8, the frames as far as the model saw them; or tiles of an
            image, if it saw nothing else.
        timeline: When each group of frames was decoded, processed, encoded and prefilled; all
            frames are one group, unless they were watched in several.
        pictures_decoded: Pictures that came out of decoders: the frames, and those they are built
            on; 0 if it is no video.
        bytes_read: Bytes of video packets that were read for them.
        columns: How many `pictures` lie side by side, if they are tiles.
    """

    answer: str
    media_tokens: MediaTokens
    seconds: Seconds
    kv_bytes: Change[int]
    frames: int
    recipe: str
    model: str
    report: Report = field(repr=False, compare=False)
    pictures: Tensor = field(repr=False, compare=False)
    timeline: Timeline = field(repr=False, compare=False)
    pictures_decoded: int
    bytes_read: int
    columns: int | None = None

    def overlay(self) -> Image:
        """A picture of what the model saw, in which dropped tokens are dark.

        Raises:
            MediaError: It saw nothing, or the frames are no more at hand.
        """
        return self.report.overlay(self.pictures, columns=self.columns)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "answer": self.answer,
            "media_tokens": self.media_tokens.as_dict(),
            "seconds": self.seconds.as_dict(),
            "kv_bytes": self.kv_bytes.as_dict(),
            "frames": self.frames,
            "pictures_decoded": self.pictures_decoded,
            "bytes_read": self.bytes_read,
            "recipe": self.recipe,
            "model": self.model,
            "timeline": self.timeline.as_list(),
        }


def numbers(answers: Sequence[Answer]) -> list[tuple[str, list[str]]]:
    """What answers cost, row by row: its name, and a cell for each answer."""
    sites = list(dict.fromkeys(site for one in answers for site in one.media_tokens.per_site))
    spent = [one.seconds.as_dict() for one in answers]
    decoded = [
        ("  decoded", [f"{one.pictures_decoded} pictures" for one in answers]),
        ("  read", [_size(one.bytes_read) for one in answers]),
    ]
    return [
        ("frames", [str(one.frames) for one in answers]),
        *(decoded if any(one.bytes_read for one in answers) else []),
        ("media tokens", [str(one.media_tokens.before) for one in answers]),
        *(
            (f"  after {site}", [_left(one.media_tokens.per_site.get(site)) for one in answers])
            for site in sites
        ),
        ("  in the cache", [str(one.media_tokens.after) for one in answers]),
        ("KV cache", [_size(one.kv_bytes.after) for one in answers]),
        *(
            (f"{name.replace('_', ' ')} seconds", [_spent(one.get(name)) for one in spent])
            for name in dict.fromkeys(name for one in spent for name in one)
        ),
    ]


def table(answers: list[Answer]) -> str:
    """Answers beside each other, as text of at most 100 columns; long cells are folded."""
    rows = [
        ("recipe", [one.recipe for one in answers]),
        ("answer", [one.answer for one in answers]),
        *numbers(answers),
    ]
    longest = max(len(cell) for _, cells in rows for cell in cells)
    width = min(longest, (100 - 18) // len(answers) - 2)
    lines = []
    for name, cells in rows:
        folded = [textwrap.wrap(cell, width) for cell in cells]
        for parts in list(zip_longest(*folded, fillvalue="")) or [()]:
            line = f"{name:<18}" + "  ".join(f"{part:<{width}}" for part in parts)
            lines.append(line.rstrip())
            name = ""
    return "\n".join(lines)


def _left(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens:g}"


def _spent(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}"


def _size(count: int) -> str:
    return f"{count / 2**10:.0f} KiB" if count < 10 * 2**20 else f"{count / 2**20:.1f} MiB"
