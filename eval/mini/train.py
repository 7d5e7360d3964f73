"""Train the mini video model: `python -m tokenprune.eval.mini.train tower`, and so on.

Three stages, each of which goes on from its checkpoint in the run folder: `tower` (per-token
targets), `language` (a curriculum on a bank of frame features) and `joint` (tower and language
model together on rendered videos). `export` writes the shipped folder; `--start` goes on from it
where the run folder is empty.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from tokenprune.eval.mini.curriculum import JOINT, train_language
from tokenprune.eval.mini.language import (
    Bank,
    align_lateness,
    align_words,
    balancing,
    build_bank,
)
from tokenprune.eval.mini.model import build_model, build_processor, save
from tokenprune.eval.mini.tower import encode_frames, train_tower
from tokenprune.eval.mini.videos import sampled_frames
from tokenprune.eval.mini.world import Story, stream

logger = logging.getLogger(__name__)
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Run = Annotated[Path, typer.Option(help="Folder of checkpoints.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial weights and of the videos.")]
Threads = Annotated[int, typer.Option(help="Processor threads.")]
Start = Annotated[
    Path | None, typer.Option(help="Exported folder to begin with, if the run folder is empty.")
]


def training_model(
    run: Path, seed: int, start: Path | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """The model with whatever the run folder has learned so far, attention set for training."""
    model = build_model(seed)
    if start is not None:
        learned = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        model.load_state_dict(learned.state_dict())
    model.model.visual.config._attn_implementation = "mini_by_frame"
    model.model.language_model.config._attn_implementation = "mini_by_question"
    for name in ("tower", "language", "joint"):  # later stages hold what earlier ones learned
        if (path := run / f"{name}.pt").exists():
            saved = torch.load(path)
            if "visual" in saved:
                model.model.visual.load_state_dict(saved["visual"])
            if "language" in saved:
                model.model.language_model.load_state_dict(saved["language"])
    return model


def set_up(run: Path, threads: int = 1) -> None:
    """Threads, logging, and the run folder."""
    torch.set_num_threads(threads)
    run.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )


@app.command()
def tower(run: Run = Path("runs/mini"), minutes: float = 12.5, seed: Seed = 0) -> None:
    """Train the vision tower with per-token targets."""
    set_up(run)
    model = training_model(run, seed)
    train_tower(model.model.visual, minutes=minutes, seed=seed, checkpoint=run / "tower.pt")


def load_bank(
    run: Path, model: Qwen2_5_VLForConditionalGeneration, seed: int, balanced: bool = False
) -> Bank:
    """The bank of the run folder, built on first use; a fresh tower is balanced for it."""
    path = run / "bank.pt"
    if not path.exists():
        bank = build_bank(model.model.visual, stream("train", 3, seed))
        if not balanced:
            change = balancing(bank)
            bank.data = (bank.data.float() @ change.T).half()
            last = model.model.visual.merger.mlp[2]
            with torch.no_grad():
                last.weight.copy_(change @ last.weight)
                last.bias.copy_(change @ last.bias)
        torch.save({"visual": model.model.visual.state_dict()}, run / "tower.pt")
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
    lateness: Annotated[
        bool, typer.Option(help="Give `last` its head with --start, too: the shipped model did.")
    ] = False,
) -> None:
    """Train the language model on the bank, short videos first."""
    set_up(run, threads)
    model = training_model(run, seed, start)
    bank = load_bank(run, model, seed, balanced=start is not None)
    tokenizer = build_processor().tokenizer
    if start is None:
        align_words(model, tokenizer, bank)  # a checkpoint overwrites it
    if start is None or lateness:
        align_lateness(model, tokenizer, bank, seed)
    train_language(
        model,
        tokenizer,
        bank,
        minutes=minutes,
        seed=seed,
        checkpoint=run / "language.pt",
    )


class Rendered:
    """Renders and encodes every frame anew, so that gradients reach the tower."""

    pairs = None
    nothing = None

    def __init__(self, visual: nn.Module) -> None:
        self.visual = visual

    def features(
        self, rng: np.random.Generator, story: Story, frames: int, phase: float
    ) -> torch.Tensor:
        pictures = sampled_frames(rng, story, frames=frames, phase=phase)
        with torch.autocast("cpu", torch.bfloat16):
            return encode_frames(self.visual, pictures).float()


@app.command()
def joint(
    run: Run = Path("runs/mini"),
    minutes: float = 20,
    seed: Seed = 0,
    threads: Threads = 1,
    start: Start = None,
) -> None:
    """Train tower and language model together on rendered videos."""
    set_up(run, threads)
    model = training_model(run, seed, start)
    train_language(
        model,
        build_processor().tokenizer,
        Rendered(model.model.visual),
        minutes=minutes,
        seed=seed + 1000,
        checkpoint=run / "joint.pt",
        peak=4e-4,
        tower=model.model.visual,
        stages=JOINT,
    )


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    run: Run = Path("runs/mini"),
) -> None:
    """Write weights in float16, configuration and processor."""
    save(training_model(run, 0), folder)


if __name__ == "__main__":
    app()
