"""What the bench on a card has found so far, as JSON and as Markdown, both up to date on disk."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tokenprune._version import __version__

__all__ = ["MEDIA", "Cell", "Results", "describe", "line"]

Cell = dict[str, Any]

PACKAGES = ("accelerate", "av", "flash-attn", "numpy", "torchvision", "transformers", "triton")
MEDIA = ("overlap", "decode")
"""Parts whose tables show what the cells hold."""
HIDDEN = ("part", "runs")
FIGURES: tuple[tuple[str, str, str, float, int], ...] = (
    # Title, name and unit in a cell, factor, digits.
    ("first token s", "first_token", "seconds", 1.0, 3),
    ("encode s", "encode", "seconds", 1.0, 3),
    ("prefill s", "prefill", "seconds", 1.0, 3),
    ("per token ms", "per_token", "seconds", 1e3, 1),
    ("peak MiB", "peak", "bytes", 2.0**-20, 0),
    ("KV MiB", "kv", "bytes", 2.0**-20, 1),
)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, and what is installed on it."""
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "device": str(device)}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "memory_bytes": card.total_memory,
            "compute_capability": f"{card.major}.{card.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions |= {name: _version(name) for name in PACKAGES}
    return found | {"versions": {**versions, "tokenprune": __version__}}


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Results:
    """Cells by part, and how each part ended.

    Args:
        folder: Where `gpu.json` and `gpu.md` are written after each change.
        about: What else the file says: the machine, the kernels.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._about = folder, about
        self.parts: dict[str, dict[str, Any]] = {}
        self.cells: list[Cell] = []

    def put(self, part: str, cells: list[Cell], key: Callable[[Cell], object]) -> None:
        """Add cells to a part, in place of those with the same key."""
        known = {key(cell) for cell in cells}
        kept = [c for c in self.cells if c["part"] != part or key(c) not in known]
        self.cells = kept + [{"part": part, **cell} for cell in cells]
        self.save()

    def ended(self, part: str, **how: Any) -> None:
        """Note how a part ended."""
        self.parts[part] = how
        self.save()

    def save(self) -> None:
        """Write both files, each at once."""
        data = {**self._about, "parts": self.parts, "cells": self.cells}
        for name, text in (("gpu.json", json.dumps(data, indent=1)), ("gpu.md", self.table())):
            part = self._folder / f".{name}.part"
            part.write_text(text + "\n")
            part.replace(self._folder / name)

    def table(self) -> str:
        """A table for each group of cells."""
        about = self._about
        versions = [f"{name} {found}" for name, found in about["versions"].items() if found]
        card = about.get("card", about["device"])
        driver = f", driver {about['driver']}, CUDA {about['cuda']}" if "driver" in about else ""
        lines = [
            f"# {card}{driver}, {about['cores']} processor cores",
            "",
            ", ".join(versions) + ".",
            "",
            "Attention: " + ", ".join(f"{k} {v}" for k, v in about["kernels"].items()) + ".",
            "Figures are medians of rounds; in brackets are ratios to the unpruned model, medians",
            "of those within rounds. SDPA kernels: those of prefill / of one step of decoding.",
        ]
        groups: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in self.cells:
            heading = tuple(cell.get(name) for name in ("part", "model", "prompt_tokens", "kernel"))
            groups.setdefault(heading, []).append(cell)
        for (part, model, tokens, kernel), cells in groups.items():
            if part in MEDIA:
                lines += ["", f"**{part}**", "", *_plain_table(cells)]
            else:
                title = f"**{model}, {tokens:,} prompt tokens, {kernel}**"
                lines += ["", title, "", *_answer_table(cells)]
        ends = []
        for part, how in self.parts.items():
            state = f"{how['state']}: {how['error']}" if "error" in how else how["state"]
            ends.append([part, state, f"{how['seconds']:.0f}"])
        return "\n".join([*lines, "", *_table(["part", "ended", "seconds"], ends)])


TITLES = (
    "recipe",
    "media tokens kept",
    "rounds",
    *(title for title, *_ in FIGURES),
    "SDPA kernels",
)


def _answer_table(cells: list[Cell]) -> list[str]:
    return _table(TITLES, [_answer_row(cell) for cell in cells])


def _answer_row(cell: Cell) -> list[str]:
    start = [f"`{cell['recipe']}`", str(cell.get("media_tokens_kept", "all")), str(cell["rounds"])]
    error = cell.get("error", "" if cell["rounds"] else "no time")
    figures = [
        _figure(cell, name, unit, factor, digits) if cell["rounds"] else ""
        for _, name, unit, factor, digits in FIGURES
    ]
    return [*start, *figures, " ".join([cell.get("sdpa_backends", ""), error]).strip()]


def _figure(cell: Cell, name: str, unit: str, factor: float, digits: int) -> str:
    ratio = cell.get(f"{name}_ratio")
    shown = "" if ratio is None or cell["recipe"] == "none" else f" ({ratio:.2f})"
    return f"{cell[f'{name}_{unit}'] * factor:,.{digits}f}{shown}"


def _plain_table(cells: list[Cell]) -> list[str]:
    names = dict.fromkeys(name for cell in cells for name in cell if name not in HIDDEN)
    rows = [[_shown(cell.get(name, "")) for name in names] for cell in cells]
    return _table([name.replace("_", " ") for name in names], rows)


def _table(titles: Iterable[str], rows: list[list[str]]) -> list[str]:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(text.replace("|", "/") for text in one) + " |" for one in lines]


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def line(cell: Cell) -> str:
    """A cell in one line, to be read while more are measured."""
    if "kernel" in cell:
        return ", ".join(
            f"{title} {text}" if title != "recipe" else text
            for title, text in zip(TITLES, _answer_row(cell), strict=True)
            if text
        )
    return ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in cell.items())
