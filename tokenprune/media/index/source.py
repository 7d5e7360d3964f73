"""What of a file is read, and how its frames are to look: settings of a reader."""

from dataclasses import dataclass
from typing import Literal, get_args

from tokenprune.errors import MediaError
from tokenprune.media.index.geometry import Aspect

__all__ = ["References", "Rendering", "Source", "check_allowed"]

References = Literal["folder"]
"""Which other files a file may refer to: those in its folder, and in folders below that."""


@dataclass(frozen=True)
class Rendering:
    """How coded frames are rendered to pictures; without arguments, as they are meant to be seen.

    Attributes:
        aspect: "displayed" widens frames whose pixels are not square; "stored" leaves them.
        deinterlace: whether frames that are flagged as interlaced, which hold the lines of two
            moments, are made to show one; their number and ranks stay.
        tone_map: whether frames of high dynamic range (PQ, HLG) are brought to that of BT.709,
            which models know; as they are, they look grey and flat.

    Raises:
        MediaError: a value that is none of these.
    """

    aspect: Aspect = "displayed"
    deinterlace: bool = True
    tone_map: bool = True

    def __post_init__(self) -> None:
        if self.aspect not in get_args(Aspect):
            raise MediaError(f'aspect must be "displayed" or "stored", got {self.aspect!r}')
        for name in ("deinterlace", "tone_map"):
            if not isinstance(getattr(self, name), bool):
                raise MediaError(f"{name} must be True or False, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Source:
    """Which stream of a file is read, and how.

    Attributes:
        stream: number of the video stream among the file's video streams; None for the one that
            players take.
        references: which other files it may refer to; None for none.
        rendering: how its frames are to look.
    """

    stream: int | None = None
    references: References | None = None
    rendering: Rendering = Rendering()

    def __post_init__(self) -> None:
        check_allowed(self.references)
        number = self.stream
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise MediaError(f"stream must be the number of a video stream, from 0, got {number!r}")


def check_allowed(references: object) -> None:
    """Check a setting of which other files a file may refer to.

    Raises:
        MediaError: there is no such setting.
    """
    if references not in (None, *get_args(References)):
        raise MediaError(f'references must be "folder" or None, got {references!r}')
