"""What commands cost before they do anything: processor seconds of imports, help, lists and errors.

    python -m tokenprune.eval.bench.startup

Each command runs in a process of its own, in turns with the others; the median counts. Processor
time, user and system, says more than the clock here: it hardly depends on what else is running.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from typing import Annotated

import typer

from tokenprune.eval.mini.sample import write_sample

__all__ = ["VERBS", "Cost", "commands", "measure"]

ROOT = Path(__file__).parents[2]
VERBS = ("ask", "plan", "watch", "decode", "sample", "eval", "convert", "list", "demo")


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        command: As it would be typed.
        processor_seconds: User and system time, the median of all runs.
        clock_seconds: Time that went by, likewise.
        code: Its exit code.
    """

    command: str
    processor_seconds: float
    clock_seconds: float
    code: int


def commands(tree: Path, video: Path) -> dict[str, list[str]]:
    """What to measure: what is typed, and the arguments of the interpreter that do the same.

    Args:
        tree: A checkout, whose command is the one that its `pyproject.toml` names.
        video: A file to decode.
    """
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["tokenprune"].partition(":")
    program = f"from {module} import {function}; {function}()"
    typed = [["--help"], *([verb, "--help"] for verb in VERBS), ["list"]]
    typed += [[verb, "missing.mp4"] for verb in ("plan", "decode")]
    typed += [["ask", "missing.mp4", "?"], ["decode", str(video), "--frames", "1"]]
    return {
        **{f"python -c '{code}'": ["-c", code] for code in ("pass", "import torch")},
        "python -c 'import tokenprune'": ["-c", "import tokenprune"],
        **{" ".join(["tokenprune", *words]): ["-c", program, *words] for words in typed},
    }


def measure(runs: dict[str, list[str]], tree: Path, repeats: int) -> list[Cost]:
    """Run each command `repeats` times in turns, after once that is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {command: [] for command in runs}
    codes = {}
    for turn in range(repeats + 1):
        for command, arguments in runs.items():
            before, began = _processor_seconds(), time.perf_counter()
            ran = subprocess.run([sys.executable, *arguments], cwd=tree, capture_output=True)
            spent = _processor_seconds() - before, time.perf_counter() - began
            codes[command] = ran.returncode
            if turn:  # the first time compiles modules and fills the cache of files
                taken[command].append(spent)
    found = []
    for command, spans in taken.items():
        processor, clock = (median(one) for one in zip(*spans, strict=True))
        found.append(Cost(command, processor, clock, codes[command]))
    return found


def _processor_seconds() -> float:
    """Time of all children that have ended."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(
    repeats: Annotated[int, typer.Option(help="Runs of each command.")] = 5,
    tree: Annotated[Path, typer.Option(help="The checkout to measure.")] = ROOT,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure what commands cost before they do anything."""
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "sample.mp4"
        write_sample(video, seconds=3)
        found = measure(commands(tree, video), tree, repeats)
    if not as_json:
        typer.echo(f"{'processor':>9} {'clock':>8}  command")
    for one in found:
        shown = one.command.replace(str(video), video.name)
        line = f"{one.processor_seconds:7.3f} s {one.clock_seconds:6.3f} s  {shown}"
        typer.echo(json.dumps(asdict(one) | {"command": shown}) if as_json else line)


if __name__ == "__main__":
    typer.run(main)
