"""`tokenprune plan`: what a recipe will save on a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.checks import check_frames, check_group
from tokenprune.cli.options import Fps, Frames, Group, Json, Model, RecipeText, Sound
from tokenprune.cli.output import show

__all__ = ["plan_file"]


def plan_file(
    file: Annotated[Path, typer.Argument(help="A video, an image, or a sound.")],
    model: Model = None,
    recipe: RecipeText = None,
    frames: Frames = None,
    fps: Fps = None,
    group: Group = None,
    sound: Sound = True,
    question: Annotated[str, typer.Option(help="What will be asked.")] = "What happens?",
    as_json: Json = False,
) -> None:
    """Say what a recipe will save on a file, without loading weights."""
    from tokenprune.media.local import check_source

    check_source(file)
    check_frames(frames, fps)
    check_group(group)
    from tokenprune.plan.planning import plan

    planned = plan(
        file,
        model,
        recipe=recipe,
        question=question,
        frames=frames,
        fps=fps,
        group=group,
        sound=sound,
    )
    show(planned, as_json)
