"""How decoding would scale to more cores: a SIMULATION from measured costs.

    python -m tokenprune.eval.bench.cores --files /var/tmp/footage

The units of the plan for many workers are decoded one by one by one worker; what is taken is
processor time, so that other work on the machine does not count. Then they are handed, in order, to
as many workers as there are cores, each taking the next when it is done, as the reader does. One
core has a plan of its own, whose units are not cut, and which decodes no picture twice. The index
is made by one core before all else; it is measured, too. What is not modelled: cores that slow each
other down, the interpreter's lock, the opening of the file by each worker, and codec threads where
units are few.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tokenprune.eval.bench.decode import CELLS, SIZE
from tokenprune.eval.bench.footage import make
from tokenprune.media.decode.plan import plan_units
from tokenprune.media.decode.rows import Rows
from tokenprune.media.decode.worker import UnitDecoder
from tokenprune.media.index.build import index_video

MOST_CORES = 64


@dataclass(frozen=True)
class Costs:
    """What was measured of a file.

    Attributes:
        index: processor seconds to index it.
        units: processor seconds to decode each unit, in order.
    """

    index: float
    units: list[float]

    def seconds(self, cores: int) -> float:
        """The time that this many workers would take."""
        free = [0.0] * cores
        for unit in self.units:
            heapq.heapreplace(free, free[0] + unit)
        return self.index + max(free)


def measure(path: Path, wanted: tuple[int, ...], workers: int) -> Costs:
    """Decode all units of the plan for so many workers, one after the other."""
    begin = time.thread_time()
    index = index_video(path)
    index_seconds = time.thread_time() - begin
    ranks = np.array(wanted)
    rows = Rows(np.array([0, len(ranks)]), SIZE, len(ranks))
    worker = UnitDecoder(index, SIZE, 1, rows, np.zeros(2, np.int64))
    seconds = []
    for unit in plan_units(index, ranks, workers):
        begin = time.thread_time()
        worker.decode(unit)
        seconds.append(time.thread_time() - begin)
    worker.close()
    return Costs(index_seconds, seconds)


def main(
    files: Annotated[Path, typer.Option(help="Folder of the videos.")] = Path("runs/footage"),
    cells: Annotated[str, typer.Option(help="Of the decoder's bench.")] = (
        "64-g250,256-g250,64-g30,256-g30,minute,hour"
    ),
) -> None:
    """Measure, simulate, and print a Markdown table."""
    typer.echo("| read | units | longest s | 1 core s | speed-up on 2 | 4 | 16 | 64 cores |")
    typer.echo("|---|---|---|---|---|---|---|---|")
    for name in cells.split(","):
        cell = CELLS[name]
        path = make(cell.footage, files)
        alone = measure(path, cell.ranks, 1).seconds(1)
        costs = measure(path, cell.ranks, MOST_CORES)
        gains = " | ".join(f"{alone / costs.seconds(cores):.1f}" for cores in (2, 4, 16, 64))
        longest = max(costs.units)
        typer.echo(f"| {cell.title} | {len(costs.units)} | {longest:.2f} | {alone:.2f} | {gains} |")


if __name__ == "__main__":
    typer.run(main)
