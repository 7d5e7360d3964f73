"""`tokenprune watch`: a video watched once and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.checks import check_frames, check_outputs, parse_recipe
from tokenprune.cli.options import Fps, Frames, Json, Model, RecipeText, Timeline
from tokenprune.cli.output import note_files, progress, show

__all__ = ["watch_video"]


def watch_video(
    video: Annotated[Path, typer.Argument(help="A video.")],
    save: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    model: Model = None,
    recipe: RecipeText = None,
    frames: Frames = None,
    fps: Fps = None,
    group: Annotated[int, typer.Option(help="Frames that are prefilled at once.")] = 8,
    timeline: Timeline = None,
    as_json: Json = False,
) -> None:
    """Watch a video once, without its sound, and save what is kept.

    `ask` answers questions about the file that is saved.
    """
    from tokenprune.media.local import check_source

    check_source(video)
    check_frames(frames, fps)
    from tokenprune.asking import default_recipe
    from tokenprune.models.load import load_model
    from tokenprune.session.file import check_path
    from tokenprune.session.session import Session

    check_path(save)
    check_outputs(timeline=timeline)
    chosen = parse_recipe(recipe, in_groups=True)
    with progress(quiet=as_json) as tell:
        tell("loading the model")
        loaded = load_model(model)
        chosen = default_recipe(loaded) if chosen is None else chosen
        name = loaded.name
        with Session(loaded.model, loaded.processor, chosen, group=group, name=name) as session:
            tell("watching")
            session.watch(video, frames=frames, fps=fps)
            tell("saving")
            session.save(save)
            if timeline is not None:
                session.timeline.save(timeline)
            show(session, as_json)
    note_files(saved=save, timeline=timeline)
