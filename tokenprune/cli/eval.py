"""`tokenprune eval`: accuracy under recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenprune.cli.options import Json, Model, Recipes
from tokenprune.cli.output import show

__all__ = ["evaluate"]


def evaluate(
    task: Annotated[str, typer.Option(help="What to measure on.")] = "mini-video",
    frames: Annotated[int, typer.Option(help="Frames of each video.")] = 64,
    samples: Annotated[int, typer.Option(help="Questions.")] = 500,
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 1,
    recipe: Recipes = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy under recipes, on held-out questions."""
    from tokenprune.core.recipe import Recipe
    from tokenprune.eval.run import check_run, evaluate_recipes
    from tokenprune.models.load import load_model

    recipes = [Recipe.parse(text) for text in recipe or ["none"]]
    check_run(task, frames=frames, samples=samples, seed=seed)
    loaded = load_model(model)
    for result in evaluate_recipes(
        loaded, recipes, task=task, frames=frames, samples=samples, seed=seed
    ):
        show(result, as_json)
