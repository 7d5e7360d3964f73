"""Time, memory and truth of reading frames: our reader and others, in turns.

    python -m tokenprune.eval.bench.decode --files /var/tmp/footage --only-files
    python -m tokenprune.eval.bench.decode --files /var/tmp/footage --out runs/decode.jsonl
    python -m tokenprune.eval.bench.decode --out runs/decode.jsonl --table

Every run is a process of its own, forked from one that has the reader's libraries loaded, so that
loading is not timed. In each round of a cell its readers run once, in random order; figures are
medians over rounds, ratios are medians of the ratios within rounds. Files are in memory. A run is
one line of the output file, and a rerun skips what is there. Readers whose libraries are missing
are listed as missing; `--extra-path` names a folder to find them in. Frames are compared with the
numbers burnt into them; those repeat every minute, so that a frame whole minutes off would pass.
Peak memory is that of the process, without worker processes beyond the memory they share with it.

A reader that takes longer than `--slow-seconds` in a cell runs there `--slow-repeats` times only;
the table shows how often each ran.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

from tokenprune.eval.bench.footage import MINUTE, RATE, Footage, make
from tokenprune.eval.bench.readers import (
    BUSY_PROCESSES,
    BUSY_THREADS,
    OURS,
    READERS,
    STREAM,
    numbers_on,
)

SIZE = (448, 448)
TEN_250 = Footage("ten-minutes-1080p-g250", 1080, 1920, 250, 4000, 10)
TEN_30 = Footage("ten-minutes-1080p-g30", 1080, 1920, 30, 4000, 10)
HOUR = Footage("hour-360p-g250", 360, 640, 250, 550, 60)
MINUTE_720 = Footage("minute-720p-g250", 720, 1280, 250, 2000, 1)
FOOTAGE = (TEN_250, TEN_30, MINUTE_720, HOUR)
BUSY = [BUSY_THREADS, BUSY_PROCESSES]
READ = [name for name in READERS if name not in (STREAM, *BUSY)]

Run = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is read of a file, and by which readers."""

    title: str
    footage: Footage
    ranks: tuple[int, ...]
    readers: list[str]


def _spread(footage: Footage, count: int) -> tuple[int, ...]:
    last = footage.minutes * MINUTE - 1
    return tuple(int(rank) for rank in np.linspace(0, last, count).round())


CELLS: dict[str, Cell] = {
    "64-g250": Cell("64 frames of ten minutes, GOP 250", TEN_250, _spread(TEN_250, 64), READ),
    "256-g250": Cell("256 frames of ten minutes, GOP 250", TEN_250, _spread(TEN_250, 256), READ),
    "64-g30": Cell("64 frames of ten minutes, GOP 30", TEN_30, _spread(TEN_30, 64), READ),
    "256-g30": Cell("256 frames of ten minutes, GOP 30", TEN_30, _spread(TEN_30, 256), READ),
    "first-16": Cell("the first 16 frames of an hour", HOUR, tuple(range(16)), READ),
    "minute": Cell("every frame of a minute of 720p", MINUTE_720, tuple(range(MINUTE)), READ),
    "hour": Cell(
        "one frame a second of an hour of 360p", HOUR, tuple(range(0, 60 * MINUTE, RATE)), READ
    ),
    "hour-stream": Cell("the same, streamed", HOUR, tuple(range(0, 60 * MINUTE, RATE)), [STREAM]),
    "minute-stream": Cell(
        "every frame of a minute of 720p, streamed", MINUTE_720, tuple(range(MINUTE)), [STREAM]
    ),
    "busy": Cell(
        "64 frames of ten minutes, GOP 30, beside a busy interpreter",
        TEN_30,
        _spread(TEN_30, 64),
        [OURS, *BUSY],
    ),
    "1024-g250": Cell(
        "1,024 frames of ten minutes, GOP 250", TEN_250, _spread(TEN_250, 1024), READ
    ),
    "1024-g30": Cell("1,024 frames of ten minutes, GOP 30", TEN_30, _spread(TEN_30, 1024), READ),
}


class Server:
    """A process that has a reader's libraries loaded, and forks one more for each run."""

    def __init__(self, reader: str, extra_path: str) -> None:
        found = [extra_path, os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in found if p)}
        # Large pages may be lent out by a virtual machine, and then take longer than decoding.
        environment["NUMPY_MADVISE_HUGEPAGE"] = "0"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokenprune.eval.bench.decode", "--serve", reader],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.missing: str | None = self._answer()["missing"]

    def run(self, path: Path, ranks: tuple[int, ...], limit: int) -> Run:
        """One run; it is ended after `limit` seconds."""
        assert self._process.stdin
        job = {"path": str(path), "ranks": ranks, "limit": limit}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Run:
        assert self._process.stdout
        line = self._process.stdout.readline()
        crashed = {"missing": "its process ended", "error": "its process ended"}
        answer: Run = json.loads(line) if line else crashed
        return answer


def serve(name: str) -> None:
    """Be such a process: answer a line for each line on stdin."""
    with _stdout_kept() as answers:
        missing = None
        try:
            READERS[name].load()
        except Exception as error:  # whatever a missing or broken library raises
            missing = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(json.dumps({"missing": missing}), file=answers, flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                _run_and_exit(name, job, writing)
            os.close(writing)
            with os.fdopen(reading) as pipe:
                said = pipe.read()
            status = os.waitpid(child, 0)[1]
            if not said:
                why = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "exit"
                said = json.dumps({"error": f"ended by {why}"})
            print(said, file=answers, flush=True)


def _run_and_exit(name: str, job: Run, writing: int) -> None:
    try:
        signal.alarm(job["limit"])
        found = measure(name, job["path"], job["ranks"])
        os.write(writing, json.dumps(found).encode())
    except BaseException:
        last = traceback.format_exc().strip().splitlines()[-1]
        os.write(writing, json.dumps({"error": last}).encode())
    finally:
        os._exit(0)


@contextmanager
def _stdout_kept() -> Iterator[Any]:
    """Gives what was stdout; what libraries print goes to stderr meanwhile."""
    with os.fdopen(os.dup(1), "w") as kept:
        os.dup2(2, 1)
        yield kept


def measure(name: str, path: str, ranks: list[int]) -> Run:
    """Read once, and check the frames.

    Returns:
        `wall` and `cpu` in seconds, `peak` in bytes beyond what the caller holds (all frames; of a
        stream two groups) and what the process held before, `right` frames of `frames`.
    """
    reader = READERS[name]
    held = (reader.held or len(ranks)) * 3 * SIZE[0] * SIZE[1]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = _resident("VmRSS")
    wall, cpu = time.perf_counter(), _cpu_seconds()
    frames = reader.read(path, ranks, SIZE)
    wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    peak = _resident("VmHWM") - before - held
    seen, due = numbers_on(frames), np.array(ranks) % MINUTE
    right = int((seen == due).sum()) if len(seen) == len(due) else 0
    return {"wall": wall, "cpu": cpu, "peak": peak, "right": right, "frames": len(ranks)}


def _resident(name: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _cpu_seconds() -> float:
    """Of this process, all its threads, and the processes it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Bench:
    """Runs what is not yet in a file of results.

    Attributes:
        runs: those done, of any session, in order.
        missing: readers that cannot run, and why.
    """

    def __init__(self, out: Path, folder: Path, extra_path: str) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self._out, self._folder, self._extra_path = out, folder, extra_path
        self._servers: dict[str, Server] = {}
        self.runs: list[Run] = read_runs(out)
        self.missing: dict[str, str] = {}

    def close(self) -> None:
        """End all servers."""
        for server in self._servers.values():
            server.close()

    def round(self, name: str, number: int, methods: list[str], limit: int, until: float) -> None:
        """One round of a cell: each method once, in random order, as long as there is time."""
        cell = CELLS[name]
        path = make(cell.footage, self._folder)
        done = {run["method"] for run in self.runs if (run["cell"], run["round"]) == (name, number)}
        due = [method for method in methods if method not in done]
        random.Random(f"{name} {number}").shuffle(due)
        for method in due:
            if time.monotonic() > until:
                return
            server = self._server(method)
            if server.missing:
                self.missing[method] = server.missing
                continue
            _warm(path)
            found = server.run(path, cell.ranks, limit)
            self._add({"cell": name, "method": method, "round": number, **found})

    def _server(self, method: str) -> Server:
        if method not in self._servers:
            self._servers[method] = Server(method, self._extra_path)
        return self._servers[method]

    def _add(self, run: Run) -> None:
        self.runs.append(run)
        with self._out.open("a") as file:
            file.write(json.dumps(run) + "\n")
        told = run.get("error") or f"{run['wall']:.2f} s, {run['right']} of {run['frames']} right"
        tqdm.write(f"{run['cell']:<14} {run['method']:<24} {told}", file=sys.stderr)


def _warm(path: Path) -> None:
    """Have the file in memory: disks are not measured."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def read_runs(path: Path) -> list[Run]:
    """The runs in a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def methods_due(
    runs: list[Run], name: str, number: int, slow_seconds: float, slow_repeats: int
) -> list[str]:
    """The methods of a cell that have a round of this number: slow ones have few."""
    slow = {
        run["method"]
        for run in runs
        if run["cell"] == name and ("error" in run or run["wall"] > slow_seconds)
    }
    return [m for m in CELLS[name].readers if number < slow_repeats or m not in slow]


def table(runs: list[Run], missing: dict[str, str]) -> str:
    """All results, a Markdown table for each cell; readers without a run are named, too."""
    lines: list[str] = []
    for name, cell in CELLS.items():
        found = {
            m: [r for r in runs if (r["cell"], r["method"]) == (name, m)] for m in cell.readers
        }
        if not any(found.values()):
            continue
        lines += [
            f"**{cell.title}** ({len(cell.ranks):,} frames)",
            "",
            "| reader | runs | wall s | times ours | CPU s | peak MiB | right |",
            "|---|---|---|---|---|---|---|",
        ]
        good = {m: [r for r in of_one if "error" not in r] for m, of_one in found.items()}
        for method in sorted(good, key=lambda m: _median(good[m], "wall")):
            why = (
                found[method][0].get("error", "")
                if found[method]
                else missing.get(method, "not run")
            )
            failed = len(found[method]) - len(good[method])
            lines.append(_row(method, good[method], failed, good.get(OURS, []), why))
        whole = {m: runs for m, runs in good.items() if len(runs) == len(found[m])}
        lines += ["", _verdict(whole, name), ""]
    return "\n".join(lines)


def _row(method: str, good: list[Run], failed: int, ours: list[Run], why: str) -> str:
    if not good:
        return f"| {method} | 0 | {why} | | | | |"
    ratio = f"{_ratio(good, ours):.2f}" if ours else ""
    peak = _median(good, "peak") / 2**20
    right = min(run["right"] for run in good)
    count = f"{len(good)}, {failed} failed" if failed else f"{len(good)}"
    return (
        f"| {method} | {count} | {_median(good, 'wall'):.2f} | {ratio}"
        f" | {_median(good, 'cpu'):.2f} | {peak:.0f} | {right} |"
    )


def _verdict(good: dict[str, list[Run]], name: str) -> str:
    """Our time against the best other reader that got every frame right in every run."""
    ours = good.get(OURS, [])
    count = len(CELLS[name].ranks)
    others = {
        method: _ratio(ours, found)
        for method, found in good.items()
        if not method.startswith("tokenprune")
        and found
        and all(run["right"] == count for run in found)
    }
    if not ours or not others:
        return ""
    best = min(others, key=lambda method: _median(good[method], "wall"))
    return f"Ours takes {others[best]:.2f} times what the best other reader ({best}) takes."


def _ratio(of: list[Run], to: list[Run]) -> float:
    """The median of the ratios of wall time within rounds."""
    base = {run["round"]: run["wall"] for run in to}
    ratios = [run["wall"] / base[run["round"]] for run in of if run["round"] in base]
    return statistics.median(ratios) if ratios else float("nan")


def _median(runs: list[Run], key: str) -> float:
    return statistics.median(run[key] for run in runs) if runs else float("inf")


def main(
    out: Annotated[Path, typer.Option(help="Results, a line for each run.")] = Path(
        "runs/decode.jsonl"
    ),
    files: Annotated[Path, typer.Option(help="Folder of the videos.")] = Path("runs/footage"),
    cells: Annotated[str, typer.Option(help="Some of the cells, with commas.")] = "",
    readers: Annotated[str, typer.Option(help="Some of the readers, with commas.")] = "",
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 5,
    slow_seconds: Annotated[float, typer.Option(help="What is slow in a cell.")] = 20.0,
    slow_repeats: Annotated[int, typer.Option(help="Rounds of what is slow.")] = 2,
    limit: Annotated[int, typer.Option(help="Seconds after which a run is ended.")] = 240,
    minutes: Annotated[float, typer.Option(help="Begin no run after so long.")] = 1e6,
    extra_path: Annotated[str, typer.Option(help="Folder of further libraries.")] = "",
    only_files: Annotated[bool, typer.Option(help="Make the videos, and end.")] = False,
    show: Annotated[bool, typer.Option("--table", help="Print what is there, and end.")] = False,
    server: Annotated[str, typer.Option("--serve", hidden=True)] = "",
) -> None:
    """Run the bench."""
    if server:
        serve(server)
        return
    if only_files:
        for footage in FOOTAGE:
            typer.echo(make(footage, files))
        return
    names = _chosen(cells, list(CELLS), "cell")
    chosen = _chosen(readers, list(READERS), "reader")
    until = time.monotonic() + 60 * minutes
    bench = Bench(out, files, extra_path)
    try:
        for number in range(0 if show else repeats):
            for name in names:
                due = methods_due(bench.runs, name, number, slow_seconds, slow_repeats)
                due = [method for method in due if method in chosen]
                bench.round(name, number, due, limit, until)
    finally:
        bench.close()
    typer.echo(table(bench.runs, bench.missing))


def _chosen(text: str, known: list[str], what: str) -> list[str]:
    """Names from text with commas, or all that are known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = set(names) - set(known)
    if unknown:
        raise typer.BadParameter(f"no {what} {min(unknown)!r}; there are {', '.join(known)}")
    return names or known


if __name__ == "__main__":
    typer.run(main)
