"""`tokenprune sample`: a video to try things on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.errors import MediaError

__all__ = ["sample"]


def sample(
    out: Annotated[Path, typer.Argument(help="MP4 to write; questions go beside it as JSON.")],
    seconds: Annotated[float, typer.Option(help="Length.")] = 180.0,
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 7,
) -> None:
    """Write a generated video, with questions and true answers."""
    from tokenprune.eval.mini.sample import write_sample

    try:
        questions = write_sample(out, seconds=seconds, seed=seed)
    except (ValueError, OSError) as error:
        raise MediaError(f"cannot write a sample to {str(out)!r}: {error}") from error
    typer.echo(
        f"{out}: {seconds:g} seconds, {len(questions)} questions in {out.with_suffix('.json')}"
    )
