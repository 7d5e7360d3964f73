"""When what was done for each group of frames: decoding beside computing, on one clock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.errors import MediaError
from tokenprune.report.seconds import Phases

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Timeline"]


@dataclass(frozen=True)
class Timeline:
    """When each group of frames was decoded, processed, encoded and prefilled.

    Attributes:
        groups: The phases of each group, in order. Seconds count from when the session was made,
            or, where the frames went through at once, from when the first of them was worked on.
    """

    groups: tuple[Phases, ...] = ()

    def as_list(self) -> list[dict[str, list[list[float]]]]:
        """What `--json` prints: for each group and phase pairs of begin and end, in seconds."""
        return [
            {
                phase: [[round(t, 6) for t in span] for span in spans]
                for phase, spans in group.as_dict().items()
            }
            for group in self.groups
        ]

    def picture(self) -> Image:
        """A chart with a bar for each span.

        Raises:
            MediaError: Nothing was timed.
            MissingExtraError: matplotlib is not installed.
        """
        from tokenprune.report.pictures import chart

        if not any(group.spans for group in self.groups):
            raise MediaError("a timeline needs groups of frames, but nothing was timed")
        return chart(self)

    def save(self, path: str | Path) -> None:
        """Write the chart as a picture.

        Raises:
            MediaError: The path names no picture that can be written, or nothing was timed.
            MissingExtraError: matplotlib is not installed.
        """
        from tokenprune.report.pictures import check_picture, save_picture

        check_picture(path)
        save_picture(self.picture(), path)

    def from_start(self) -> Timeline:
        """The same with 0 where the first span begins."""
        begins = [begin for group in self.groups for begin, _ in group.spans]
        first = min(begins, default=0.0)
        return Timeline(tuple(group.shifted(-first) for group in self.groups))
