"""`tokenprune convert`: checkpoints that transformers does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    family: Annotated[str, typer.Argument(help="What the checkpoint is of: longva.")],
    folder: Annotated[Path, typer.Argument(help="Its original checkpoint.")],
    out: Annotated[Path | None, typer.Argument(help="Folder to write [FOLDER-converted].")] = None,
    tower: Annotated[Path | None, typer.Option(help="Checkpoint of its vision tower.")] = None,
) -> None:
    """Convert a checkpoint that transformers does not know."""
    from tokenprune.models.convert import find_converter

    convert = find_converter(family)
    out = folder.with_name(f"{folder.resolve().name}-converted") if out is None else out
    convert(folder, out, tower)
    typer.echo(f"{out}: use it with --model {out}")
