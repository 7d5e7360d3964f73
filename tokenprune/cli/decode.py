"""`tokenprune decode`: frames of a video as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.checks import check_frames
from tokenprune.cli.options import Fps, Frames, Json
from tokenprune.cli.output import show

__all__ = ["decode_video"]


def decode_video(
    file: Annotated[Path, typer.Argument(help="A video.")],
    frames: Frames = None,
    fps: Fps = None,
    start: Annotated[float | None, typer.Option(help="Seconds where to begin.")] = None,
    end: Annotated[float | None, typer.Option(help="Seconds where to end.")] = None,
    size: Annotated[str | None, typer.Option(help="Height and width, such as 224x384.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads.", show_default="all cores")] = None,
    stream: Annotated[
        int | None, typer.Option(help="Which video stream, from 0.", show_default="the main one")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="An .npy file, or a folder for PNGs.")] = None,
    as_json: Json = False,
) -> None:
    """Decode frames of a video, and write them."""
    from tokenprune.media.local import check_source

    check_source(file)
    check_frames(frames, fps)
    from tokenprune.media.sampling import parse_size

    wanted = None if size is None else parse_size(size)
    from tokenprune.media.reader import VideoReader
    from tokenprune.media.save import decode_to

    reader = VideoReader(file, workers=workers, stream=stream)
    show(decode_to(reader, out, frames=frames, fps=fps, start=start, end=end, size=wanted), as_json)
