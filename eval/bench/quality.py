"""Accuracy against share kept: every method beside random and uniform selection.

    python -m tokenprune.eval.bench.quality --samples 500 --out runs/quality.jsonl
    python -m tokenprune.eval.bench.quality --task mini-story --frames 32 --samples 100 ...

Methods that prune the cache come to bear after an answer's first token: "mini-story" asks for
long answers, and measures those methods alone.

One line of JSON a recipe, written as it is done; a rerun skips what is there. Every method has a
random partner of its size: its media entries a layer may exceed the partner's by at most 0.1 %, or
the run fails.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tokenprune.core.recipe import Recipe
from tokenprune.errors import TokenPruneError
from tokenprune.eval.run import evaluate_recipes
from tokenprune.models.load import DEFAULT_MODEL, load_model

KEEPS = (0.5, 0.25, 0.1, 0.05)
SEEDS = (0, 1, 2)
HARD = ("after", "before", "count")
PART = 9
SLACK = 1.001  # how many more entries than its random partner a row may have


@dataclass(frozen=True)
class Row:
    """A recipe, the share it is listed under, and the random recipe of its size."""

    keep: float
    recipe: str
    partner: str | None = None


def methods(task: str) -> list[Row]:
    """What is measured."""
    names = ("plphp",) if task == "mini-story" else ("vflowopt", "plphp")
    rows = [Row(keep, f"{name}(keep={keep})") for name in names for keep in KEEPS]
    return [Row(1.0, "none"), *rows]


def with_partners(task: str, done: dict[str, dict[str, Any]]) -> list[Row]:
    """Every method after random and uniform selection of the size that it really kept.

    Methods round several times, or choose their size themselves, so a partner takes the method's
    mean media entries a layer, rounded up.
    """
    found = []
    for row in methods(task):
        size = math.ceil(done[row.recipe]["media_tokens"]["after"] - 1e-9)
        partners = []
        if row.recipe.startswith("vflowopt"):
            partners = [f"random(keep={size} seed={seed})" for seed in SEEDS]
            partners.append(f"uniform(keep={size})")
        elif row.recipe.startswith("plphp"):
            # Of short answers hardly more than the end of sentence reads the cache: one seed tells.
            seeds = SEEDS if task == "mini-story" else SEEDS[:1]
            partners = [f"random(keep={size} at=cache seed={seed})" for seed in seeds]
            partners.append(f"uniform(keep={size} at=cache)")
        found += [Row(row.keep, partner) for partner in partners]
        found.append(Row(row.keep, row.recipe, partners[0] if partners else None))
    return found


def main(
    out: Annotated[Path, typer.Option(help="JSON lines, appended.")] = Path("runs/quality.jsonl"),
    model: Annotated[str, typer.Option(help="Name or folder.")] = DEFAULT_MODEL,
    task: Annotated[str, typer.Option(help="mini-video or mini-story.")] = "mini-video",
    frames: Annotated[int, typer.Option()] = 64,
    samples: Annotated[int, typer.Option()] = 500,
    seed: Annotated[int, typer.Option()] = 1,
    threads: Annotated[int, typer.Option(help="Processor threads; 0 for all.")] = 0,
) -> None:
    """Run the bench and print its table."""
    if threads:
        torch.set_num_threads(threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    run = {"model": model, "task": task, "frames": frames, "samples": samples, "seed": seed}
    _run(methods(task), out, run)
    rows = with_partners(task, _read(out, run))
    _run(rows, out, run)
    done = _read(out, run)
    typer.echo(table(rows, done))
    check(rows, done)


def _run(rows: list[Row], out: Path, run: dict[str, Any]) -> None:
    done = _read(out, run)
    missing = [row.recipe for row in rows if row.recipe not in done]
    loaded = load_model(run["model"]) if missing else None
    settings = {name: value for name, value in run.items() if name != "model"}
    # Few recipes at a time: a cut loses little, and inputs are made once for each handful.
    for start in range(0, len(missing), PART):
        assert loaded is not None
        texts = missing[start : start + PART]
        found = evaluate_recipes(loaded, list(map(Recipe.parse, texts)), **settings)
        with out.open("a") as lines:
            for text, result in zip(texts, found, strict=True):
                entry = {**result.as_dict(), **run, "recipe": text, "scores": result.scores}
                lines.write(json.dumps(entry) + "\n")


def _read(path: Path, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        entry["recipe"]: entry
        for entry in entries
        if all(entry.get(name) == value for name, value in run.items())
    }


def table(rows: list[Row], done: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown: accuracy, then media entries of every layer's cache."""
    lines = [
        "| keep | recipe | accuracy | look-ups | order, counting | media entries a layer |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        entry = done[row.recipe]
        kinds = entry["by_kind"]
        hard = [share for kind, share in kinds.items() if kind in HARD]
        easy = [share for kind, share in kinds.items() if kind not in HARD]
        layers = " ".join(f"{n:g}" for n in entry["media_tokens"]["per_layer"])
        lines.append(
            f"| {row.keep:g} | `{row.recipe}` | {entry['accuracy']:.3f} | "
            f"{_mean(easy)} | {_mean(hard)} | {layers} |"
        )
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "-"


def check(rows: list[Row], done: dict[str, dict[str, Any]]) -> None:
    """Hold every row to the size of its random partner.

    Raises:
        TokenPruneError: A row kept more.
    """
    for row in rows:
        if row.partner is None:
            continue
        mine = done[row.recipe]["media_tokens"]["after"]
        theirs = done[row.partner]["media_tokens"]["after"]
        if mine > theirs * SLACK:
            raise TokenPruneError(
                f"{row.recipe} kept {mine:.2f} media entries a layer, its partner {row.partner} "
                f"kept {theirs:.2f}: not a fair comparison"
            )


if __name__ == "__main__":
    typer.run(main)
