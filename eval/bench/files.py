"""Accuracy through written files, beside the same questions' kinds on rendered frames.

    python -m tokenprune.eval.bench.files --questions 200

Frames that went through a video file have been resized, coded and decoded: the accuracy on them
should be that of `tokenprune eval`. Accuracies are means over kinds of questions, since files
and held-out videos hold them in different numbers.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from tokenprune.asking import answer
from tokenprune.core.recipe import Recipe
from tokenprune.eval.mini.sample import write_sample
from tokenprune.eval.run import evaluate_recipes
from tokenprune.eval.tasks.mini_video import score
from tokenprune.inputs import read_media
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel


def through_files(
    loaded: LoadedModel, recipe: Recipe, questions: int, frames: int, seed: int
) -> dict[str, list[float]]:
    """Scores by kind of `questions` questions on as many files as that takes."""
    scores: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=questions, unit="q") as bar:
        while bar.n < questions:
            path = Path(folder) / "sample.mp4"
            told = write_sample(path, seed=seed)
            media = read_media(path, loaded, frames=frames)
            for one in told[: questions - bar.n]:
                found = answer(loaded, media, one["question"], recipe)
                scores[one["kind"]].append(score(found.answer, one["answer"]))
                bar.update()
            seed += 1
    return scores


def main(
    questions: Annotated[int, typer.Option(help="Through files, and as many without.")] = 200,
    model: Annotated[str | None, typer.Option(help="Name or folder.")] = None,
    recipe: Annotated[str, typer.Option(help="What to prune.")] = "none",
    frames: int = 64,
    seed: Annotated[int, typer.Option(help="Of the first file.")] = 100,
    threads: Annotated[int, typer.Option(help="Processor threads; 0 for all.")] = 0,
) -> None:
    """Ask through files and through the task, and print both accuracies by kind."""
    if threads:
        torch.set_num_threads(threads)
    loaded, parsed = load_model(model), Recipe.parse(recipe)
    scores = through_files(loaded, parsed, questions, frames, seed)
    by_file = {kind: sum(found) / len(found) for kind, found in sorted(scores.items())}
    [held_out] = evaluate_recipes(loaded, [parsed], frames=frames, samples=questions)
    by_task = held_out.by_kind()
    for name, kinds in (("files", by_file), ("rendered", by_task)):
        listed = "  ".join(f"{kind} {share:.3f}" for kind, share in kinds.items())
        typer.echo(f"{name:<9} {sum(kinds.values()) / len(kinds):.3f}  {listed}")


if __name__ == "__main__":
    typer.run(main)
