"""Train the mini video model: `python -m tokenprune.eval.mini.train all`.

Three stages, each of which can be run alone and goes on from its checkpoint in the run folder:
`tower` (per-token targets), `language` (a curriculum on a bank of frame features) and `joint`
(tower and language model together on rendered videos). `export` writes the shipped folder.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import Qwen2_5_VLForConditionalGeneration

from tokenprune.eval.mini.curriculum import train_language
from tokenprune.eval.mini.language import Bank, build_bank
from tokenprune.eval.mini.model import build_model, build_processor, save
from tokenprune.eval.mini.tower import train_tower
from tokenprune.eval.mini.world import stream

logger = logging.getLogger(__name__)
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Run = Annotated[Path, typer.Option(help="Folder of checkpoints.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial weights and of the videos.")]
FEATURE_SCALE = 0.3  # standard deviation of tower features, beside embeddings of 0.08


def training_model(run: Path, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model with whatever the run folder has learned so far, attention set for training."""
    model = build_model(seed)
    model.model.visual.config._attn_implementation = "mini_by_frame"
    model.model.language_model.config._attn_implementation = "mini_by_question"
    if (run / "joint.pt").exists():
        model.load_state_dict(torch.load(run / "joint.pt")["model"])
        return model
    if (run / "tower.pt").exists():
        model.model.visual.load_state_dict(torch.load(run / "tower.pt")["visual"])
    if (run / "language.pt").exists():
        model.model.language_model.load_state_dict(torch.load(run / "language.pt")["language"])
    return model


def set_up(run: Path) -> None:
    """One thread, logging, and the run folder."""
    torch.set_num_threads(1)
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


def load_bank(run: Path, model: Qwen2_5_VLForConditionalGeneration, seed: int) -> Bank:
    """The bank of the run folder, built on first use; the tower is rescaled for it."""
    path = run / "bank.pt"
    if not path.exists():
        scale_features(model, seed)
        checkpoint = torch.load(run / "tower.pt")
        torch.save(checkpoint | {"visual": model.model.visual.state_dict()}, run / "tower.pt")
        bank = build_bank(model.model.visual, stream("train", 3, seed))
        things = [[(t.shape, t.color) for t in shown] for shown in bank.things]
        torch.save({"data": bank.data, "things": things}, path)
        logger.info("bank of %d clips, deviation %.3f", len(bank.data), bank.data.float().std())
    return Bank.load(path)


def scale_features(model: Qwen2_5_VLForConditionalGeneration, seed: int) -> None:
    """Fold into the tower's last layer what brings its features to FEATURE_SCALE."""
    probe = build_bank(model.model.visual, stream("train", 4, seed), clips=1, pairs=0)
    factor = FEATURE_SCALE / probe.data.float().std()
    with torch.no_grad():
        for parameter in model.model.visual.merger.mlp[2].parameters():
            parameter.mul_(factor)


@app.command()
def language(run: Run = Path("runs/mini"), minutes: float = 95, seed: Seed = 0) -> None:
    """Train the language model on the bank, short videos first."""
    set_up(run)
    model = training_model(run, seed)
    bank = load_bank(run, model, seed)
    train_language(
        model,
        build_processor().tokenizer,
        bank,
        minutes=minutes,
        seed=seed,
        checkpoint=run / "language.pt",
        muon=True,
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
