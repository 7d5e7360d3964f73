"""Options that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Fps",
    "Frames",
    "Group",
    "Json",
    "Model",
    "RecipeText",
    "Recipes",
    "Sound",
    "Timeline",
    "With",
]

_RECIPE = "Such as 'vflowopt(keep=0.1) + plphp(keep=0.4)'; 'none' prunes nothing."

Model = Annotated[str | None, typer.Option(help="Hub name, folder, or built-in model.")]
RecipeText = Annotated[str | None, typer.Option("--recipe", help=_RECIPE)]
Recipes = Annotated[list[str] | None, typer.Option("--recipe", help=f"{_RECIPE} May be repeated.")]
Frames = Annotated[int | None, typer.Option(help="Frames, evenly spread.", show_default="64")]
Fps = Annotated[float | None, typer.Option(help="Frames per second, instead.")]
Group = Annotated[
    int | None, typer.Option(help="Frames to prefill at once, while the next ones are decoded.")
]
Sound = Annotated[
    bool, typer.Option(help="Hear a video's sound track, with a model that sees and hears.")
]
Timeline = Annotated[
    Path | None, typer.Option(help="Picture of when what was decoded and computed.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="MODULE",
        help="Import a module that adds methods or models, first. May be repeated.",
    ),
]
