"""Train a mini video model: `python -m tokenprune.eval.mini.train tower`, and so on.

Three stages, each of which goes on from its checkpoint in the run folder: `tower` (per-token
targets), `language` (a curriculum on a bank of frame features) and `joint` (tower and language
model together on rendered videos). `export` writes the shipped folder; `--start` goes on from it
where the run folder is empty. `--architecture llava` trains the second model, in a run folder of
its own.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoModelForImageTextToText

from tokenprune.eval.mini.architecture import Architecture
from tokenprune.eval.mini.curriculum import JOINT, train_language
from tokenprune.eval.mini.language import (
    Bank,
    align_lateness,
    align_words,
    balancing,
    build_bank,
    soften,
)
from tokenprune.eval.mini.llava import Llava
from tokenprune.eval.mini.model import Qwen
from tokenprune.eval.mini.tower import train_tower
from tokenprune.eval.mini.videos import resized, sampled_frames
from tokenprune.eval.mini.world import Story, stream

logger = logging.getLogger(__name__)
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


class Name(StrEnum):
    """The architectures."""

    qwen = "qwen"
    llava = "llava"


ARCHITECTURES: dict[Name, type[Architecture]] = {Name.qwen: Qwen, Name.llava: Llava}

Kind = Annotated[Name, typer.Option("--architecture", help="Which of the models.")]
Run = Annotated[Path, typer.Option(help="Folder of checkpoints.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial weights and of the videos.")]
Threads = Annotated[int, typer.Option(help="Processor threads.")]
Start = Annotated[
    Path | None, typer.Option(help="Exported folder to begin with, if the run folder is empty.")
]


def training_model(
    architecture: Name, run: Path, seed: int, start: Path | None = None
) -> Architecture:
    """The model with whatever the run folder has learned so far, attention set for training."""
    mini = ARCHITECTURES[architecture].fresh(seed)
    if start is not None:
        learned = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
        mini.model.load_state_dict(learned.state_dict())
    for name in ("tower", "language", "joint"):  # later stages hold what earlier ones learned
        if (path := run / f"{name}.pt").exists():
            saved = torch.load(path)
            if "visual" in saved:
                mini.visual.load_state_dict(saved["visual"])
            if "language" in saved:
                mini.language.load_state_dict(saved["language"])
    return mini


def set_up(run: Path, threads: int = 1) -> None:
    """Threads, logging, and the run folder."""
    torch.set_num_threads(threads)
    run.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )


@app.command()
def tower(
    run: Run = Path("runs/mini"),
    minutes: float = 12.5,
    seed: Seed = 0,
    architecture: Kind = Name.qwen,
) -> None:
    """Train the vision tower with per-token targets."""
    set_up(run)
    mini = training_model(architecture, run, seed)
    train_tower(mini, minutes=minutes, seed=seed, checkpoint=run / "tower.pt")


def load_bank(run: Path, mini: Architecture, seed: int, balanced: bool = False) -> Bank:
    """The bank of the run folder, built on first use; a fresh tower is balanced for it."""
    path = run / "bank.pt"
    if not path.exists():
        bank = build_bank(mini, stream("train", 3, seed))
        if not balanced:
            change = balancing(bank)
            bank.data = (bank.data.float() @ change.T).half()
            last = mini.feature_layer
            with torch.no_grad():
                last.weight.copy_(change @ last.weight)
                last.bias.copy_(change @ last.bias)
        torch.save({"visual": mini.visual.state_dict()}, run / "tower.pt")
        things = [[(t.shape, t.color) for t in shown] for shown in bank.things]
        torch.save({"data": bank.data, "things": things}, path)
        logger.info("bank of %d clips, deviation %.3f", len(bank.data), bank.data.float().std())
    return Bank.load(path)


@app.command()
def language(
    run: Run = Path("runs/mini"),
    minutes: float = 95,
    seed: Seed = 0,
    threads: Threads = 1,
    start: Start = None,
    architecture: Kind = Name.qwen,
    lateness: Annotated[
        bool, typer.Option(help="Give `last` its head with --start, too: the shipped model did.")
    ] = False,
    softened: Annotated[
        bool, typer.Option("--soften", help="Make attention less sharp at the start: `llava` did.")
    ] = False,
    peak: Annotated[float, typer.Option(help="The highest learning rate.")] = 1.2e-3,
) -> None:
    """Train the language model on the bank, short videos first."""
    set_up(run, threads)
    mini = training_model(architecture, run, seed, start)
    bank = load_bank(run, mini, seed, balanced=start is not None)
    if start is None:
        align_words(mini, bank)  # a checkpoint overwrites it
    if not mini.text_follows and (start is None or lateness):
        align_lateness(mini, bank, seed)
    if softened:
        soften(mini)
    train_language(
        mini,
        bank,
        minutes=minutes,
        seed=seed,
        checkpoint=run / "language.pt",
        peak=peak,
    )


class Rendered:
    """Renders and encodes every frame anew, so that gradients reach the tower."""

    pairs = None
    nothing = None

    def __init__(self, mini: Architecture) -> None:
        self.mini = mini

    def features(
        self, rng: np.random.Generator, story: Story, frames: int, phase: float
    ) -> torch.Tensor:
        sizes = self.mini.source_sizes
        size = sizes[rng.integers(len(sizes))] if len(sizes) > 1 else sizes[0]
        pictures = sampled_frames(rng, story, frames=frames, phase=phase, size=size)
        with torch.autocast("cpu", torch.bfloat16):
            return self.mini.encode(resized(pictures, self.mini.frame_size)).float()


@app.command()
def joint(
    run: Run = Path("runs/mini"),
    minutes: float = 20,
    seed: Seed = 0,
    threads: Threads = 1,
    start: Start = None,
    architecture: Kind = Name.qwen,
) -> None:
    """Train tower and language model together on rendered videos."""
    set_up(run, threads)
    mini = training_model(architecture, run, seed, start)
    train_language(
        mini,
        Rendered(mini),
        minutes=minutes,
        seed=seed + 1000,
        checkpoint=run / "joint.pt",
        peak=4e-4,
        tower=mini.visual,
        stages=JOINT,
    )


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    run: Run = Path("runs/mini"),
    architecture: Kind = Name.qwen,
) -> None:
    """Write weights in float16, configuration and processor."""
    training_model(architecture, run, 0).save(folder)


if __name__ == "__main__":
    app()
