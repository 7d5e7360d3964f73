"""How long each part of the work took, and when it was under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Phases", "Seconds", "Span"]

Span = tuple[float, float]
"""Seconds at which something began and ended."""


@dataclass(frozen=True)
class Seconds:
    """How long each part of the work took; None where that was not measured.

    Attributes:
        index: Building the packet index of a file.
        decode: Decoding and resizing; in a session, waiting for the frames of a group.
        process: The processor.
        encode: The encoders.
        prefill: The language model, pruning included.
        per_token: The mean step of decoding words.
    """

    index: float | None = None
    decode: float | None = None
    process: float | None = None
    encode: float | None = None
    prefill: float | None = None
    per_token: float | None = None

    @classmethod
    def zero(cls) -> Seconds:
        """What every answer tells, with nothing spent yet; the processor is left out."""
        return cls(index=0.0, decode=0.0, encode=0.0, prefill=0.0, per_token=0.0)

    def __add__(self, other: Seconds) -> Seconds:
        """The sum, part by part; a part that neither measured stays None."""
        mine, theirs = self.as_dict(), other.as_dict()
        names = mine | theirs
        return Seconds(**{name: mine.get(name, 0.0) + theirs.get(name, 0.0) for name in names})

    def as_dict(self) -> dict[str, float]:
        """What was measured, by name and in order: what `--json` prints."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Phases:
    """When each part of the work on a group of frames was under way.

    Attributes:
        decode: Work of the reader's workers, whose spans may overlap.
        process: The processor.
        encode: The encoders.
        prefill: The language model.
    """

    decode: tuple[Span, ...] = ()
    process: tuple[Span, ...] = ()
    encode: tuple[Span, ...] = ()
    prefill: tuple[Span, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans of all phases."""
        return self.decode + self.process + self.encode + self.prefill

    def shifted(self, seconds: float) -> Phases:
        """The same so many seconds later."""
        return Phases(
            **{
                phase: tuple((begin + seconds, end + seconds) for begin, end in spans)
                for phase, spans in self.as_dict().items()
            }
        )

    def as_dict(self) -> dict[str, tuple[Span, ...]]:
        """The spans by phase, in order."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Sequence[Sequence[float]]]) -> Phases:
        """The phases that `as_dict` told, also after they were JSON."""
        return cls(
            **{phase: tuple((begin, end) for begin, end in spans) for phase, spans in plain.items()}
        )
