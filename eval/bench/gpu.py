"""What pruning does on a card: models of 7B shape with random weights, in one short run.

    python -m tokenprune.eval.bench.gpu --budget 360
    python -m tokenprune.eval.bench.gpu --only llava-6k,decode
    python -m tokenprune.eval.bench.gpu --tiny --device cpu

Parts run by importance: answers by LLaVA-OneVision and Qwen2.5-VL in bfloat16 to prompts of about
6,000 and 24,000 media tokens with each attention kernel that is there; then decoding of a file
beside prefill, and alone. Each part may use its share of the time that is left, and what it does
not use is for those that follow. After `--budget` seconds nothing more is begun.

All recipes of a part run in turns, the unpruned model first in each round, after a warm-up that is
not counted; `random` and `uniform` keep as many tokens as each method did in that warm-up.
Figures are medians, ratios are medians of the ratios within rounds. A recipe or part that fails is
noted with its error, and the rest goes on. `gpu.json` and `gpu.md` are written after each round.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from tokenprune.eval.bench.gpu_answers import Group, kernels, why
from tokenprune.eval.bench.gpu_models import Case, Models, cases
from tokenprune.eval.bench.gpu_results import MEDIA, Cell, Results, describe, line

__all__ = ["PARTS", "Bench"]

PARTS = {"llava-6k": 2, "llava-24k": 3, "qwen-6k": 2, "qwen-24k": 4, "overlap": 3, "decode": 1}
"""By importance, with the shares of time."""
RESULTS = Path(__file__).parents[1] / "results"


@dataclass
class Bench:
    """Runs parts within a time.

    Attributes:
        device: Where models run.
        results: What was found.
        files: Folder for the video.
        end: After that, by `time.monotonic`, nothing more is begun.
        rounds: How many at most.
        tiny: Whether models are tiny.
        recipes: To measure beside "none"; None for all methods.
    """

    device: torch.device
    results: Results
    files: Path
    end: float
    rounds: int = 5
    tiny: bool = False
    recipes: list[str] | None = None

    def run(self, parts: list[str]) -> bool:
        """Run parts; returns whether all that was begun went well."""
        models, good = Models(self.device), True
        for number, part in enumerate(parts):
            begin = time.monotonic()
            if begin >= self.end:
                self.results.ended(part, state="no time left", seconds=0.0)
                typer.echo(f"{part}: no time left")
                continue
            shares = [PARTS[name] for name in parts[number:]]
            until = begin + (self.end - begin) * shares[0] / sum(shares)
            typer.echo(f"== {part}, {until - begin:.0f} s")
            error = self._part(part, models, until)
            how = {"state": "failed", "error": error} if error else {"state": "done"}
            self.results.ended(part, **how, seconds=time.monotonic() - begin)
            good = good and not error
            if error:
                typer.echo(f"{part}: {error}")
                models.drop()
        return good

    def _part(self, part: str, models: Models, until: float) -> str:
        """Run a part; returns what went wrong, if anything."""
        try:
            if part in MEDIA:
                self._media(part, models, until)
            else:
                self._answers(part, cases(self.tiny)[part], models, until)
        except Exception as error:  # the other parts shall run
            return why(error)
        failed = [
            cell
            for cell in self.results.cells
            if cell["part"] == part and not cell.get("error", "out of memory").startswith("out of")
        ]
        return f"{failed[0]['recipe']}: {failed[0]['error']}" if failed else ""

    def _media(self, part: str, models: Models, until: float) -> None:
        from tokenprune.eval.bench import gpu_media  # without PyAV the other parts run

        if part == "overlap":
            rounds = min(3, self.rounds)
            cells = gpu_media.overlap(models, self.files, rounds, until, self.tiny)
            self._keep(part, cells, "recipe")
        else:
            cells = gpu_media.decode(self.files, min(2, self.rounds), until, self.tiny)
            self._keep(part, cells, "frames", "workers", "worker_kind")

    def _keep(self, part: str, cells: Iterator[Cell], *key: str) -> None:
        for cell in cells:
            self.results.put(part, [cell], lambda one: tuple(one[name] for name in key))
            typer.echo(line(cell))

    def _answers(self, part: str, case: Case, models: Models, until: float) -> None:
        usable = [name for name, state in kernels().items() if state == "available"]
        for number, kernel in enumerate(usable):
            now = time.monotonic()
            share = now + (until - now) / (len(usable) - number)
            group = Group(case, models, kernel, 4 if self.tiny else 32, self.recipes)
            group.warm_up(self.end)
            for round_number in range(self.rounds):
                begin = time.monotonic()
                complete = group.round(self.end)
                found = group.cells()
                self.results.put(part, found, lambda one: (one["kernel"], one["recipe"]))
                now = time.monotonic()
                typer.echo(f"{part} {kernel}: round {round_number + 1}, {now - begin:.1f} s")
                # Another round that takes as long would go beyond the share.
                if not complete or 2 * now - begin > share:
                    break
            typer.echo("\n".join(map(line, found)))


def main(
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(PARTS)}, with commas.")] = "",
    budget: Annotated[float, typer.Option(help="Begin nothing after so many seconds.")] = 1e9,
    rounds: Annotated[int, typer.Option(help="Rounds of each part at most.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    files: Annotated[Path | None, typer.Option(help="Folder of the video.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Only these, beside none.")] = None,
    device: Annotated[str, typer.Option(help="Where models run.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Tiny models, to try the bench.")] = False,
) -> None:
    """Run the bench."""
    end = time.monotonic() + budget
    parts = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        raise typer.BadParameter(f"no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; try --device cpu --tiny")
    folder = out or Path(os.environ.get("OUT") or RESULTS)
    place = torch.device(device)
    results = Results(folder, {**describe(place), "kernels": kernels(), "tiny": tiny})
    typer.echo(results.table())
    files = files or Path(tempfile.gettempdir()) / "footage-veryfast"
    bench = Bench(place, results, files, end, rounds, tiny, recipe)
    good = bench.run([name for name in PARTS if name in parts])
    typer.echo(f"written to {folder}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    gc.freeze()  # garbage is looked for before each answer, and there is none among modules
    typer.run(main)
