"""What verbs print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import typer

__all__ = ["Result", "note_files", "progress", "show"]


class Result(Protocol):
    """Something that can be printed as text and as JSON."""

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""


def show(result: Result, as_json: bool) -> None:
    """Print a result as text, or as one line of JSON."""
    typer.echo(json.dumps(result.as_dict()) if as_json else str(result))


def note_files(**written: Path | None) -> None:
    """Say on stderr which files were written; None is one that nobody wanted."""
    for what, path in written.items():
        if path is not None:
            typer.echo(f"{what.replace('_', ' ')}: {path}", err=True)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that tells what is being done, and is gone in the end.

    Yields:
        What writes the line.
    """
    from tqdm import tqdm

    with tqdm(total=3, bar_format="{desc}", leave=False, disable=quiet) as bar:
        yield bar.set_description_str
