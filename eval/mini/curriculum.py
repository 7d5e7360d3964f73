"""The training loop of the language model: a curriculum of lengths that moves on by accuracy."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tokenprune.eval.mini.architecture import Architecture
from tokenprune.eval.mini.language import (
    ContextHeads,
    FrameSource,
    Tally,
    draw_batch,
    forward,
    forward_with_hidden,
    loss_of,
    thin,
)
from tokenprune.eval.mini.tower import busy_seconds
from tokenprune.eval.mini.world import stream

__all__ = ["JOINT", "STAGES", "Progress", "Stage", "evaluate", "train_language"]

logger = logging.getLogger(__name__)

THINNED = 0.6  # of the batches leave out media tokens


@dataclass(frozen=True)
class Stage:
    """Lengths `low` to `high` in frames; done at accuracy `gate` or after `minutes`."""

    low: int
    high: int
    videos: int
    questions: int
    gate: float
    minutes: float


STAGES = (
    Stage(2, 5, 24, 12, 0.93, 9),
    Stage(3, 8, 20, 14, 0.91, 10),
    Stage(6, 20, 12, 18, 0.90, 10),
    Stage(12, 64, 8, 32, 2.0, 600),
)
JOINT = (Stage(8, 64, 6, 24, 2.0, 600),)


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    stage: int = 0
    seconds: float = 0.0
    stage_seconds: float = 0.0


def evaluate(
    mini: Architecture,
    source: FrameSource,
    *,
    frames: int,
    videos: int,
    seed: int = 0,
    questions: int = 16,
) -> Tally:
    """Accuracy on held-out videos, given the answer's earlier tokens."""
    tally, rng = Tally(), stream("held-out", 2, seed, frames)
    size = max(1, min(videos, 256 // frames))
    mini.model.eval()
    with torch.no_grad():
        for _ in range(max(1, videos // size)):
            batch = draw_batch(rng, mini, source, videos=size, frames=frames, questions=questions)
            tally.add_batch(forward(mini, batch), batch)
    mini.model.train()
    return tally


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for all else; or AdamW alone."""

    def __init__(self, module: nn.Module, muon: bool, extra: nn.Module | None = None) -> None:
        named = list(module.named_parameters())
        matrices = [p for name, p in named if muon and p.ndim == 2 and "layers." in name]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        self.parameters = matrices + others
        self.all: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(others, 1e-3, weight_decay=0.01, betas=(0.9, 0.98)), 1.5)
        ]
        if matrices:
            rule = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.2, momentum=0.95)
            self.all.append((rule, 10.0))
        if extra is not None:
            tower = list(extra.parameters())
            self.parameters += tower
            self.all.append((torch.optim.AdamW(tower, 1e-3, weight_decay=0.01), 0.3))

    def step(self, rate: float) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, factor in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()


def learning_rate(step: int, done: float, peak: float) -> float:
    """Warm up over 100 steps, hold, and fall along a cosine over the last 60 % of the time."""
    fall = max(0.0, (done - 0.4) / 0.6)
    return peak * min(1.0, step / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * fall)))


def draw_length(rng: np.random.Generator, stage: Stage) -> int:
    """A number of frames: mostly of the stage, sometimes shorter, rarely the double."""
    kind = rng.random()
    if stage.high >= 16 and kind < 0.2:
        return int(rng.integers(2, stage.low + 1))
    if stage.high >= 64 and kind > 0.96:
        return int(rng.integers(stage.high, 2 * stage.high + 1))
    return int(rng.integers(stage.low, stage.high + 1))


def train_language(
    mini: Architecture,
    source: FrameSource,
    *,
    minutes: float,
    seed: int,
    checkpoint: Path,
    peak: float = 1.2e-3,
    muon: bool = True,
    tower: nn.Module | None = None,
    stages: tuple[Stage, ...] = STAGES,
) -> None:
    """Train the language model; continues from `checkpoint` where there is one.

    Args:
        mini: What is trained, in place.
        source: Where frame features come from.
        minutes: How long to train in all, in `busy_seconds`; the learning rate falls with it.
        seed: Of the videos.
        checkpoint: Written at each evaluation.
        peak: The highest learning rate.
        muon: Use Muon for the layers' matrices: it needs about half the steps of AdamW alone.
        tower: Trained too, if given; `source` must then pass gradients on.
        stages: The curriculum.
    """
    language = mini.language
    optimizers = Optimizers(language, muon, tower)
    heads = ContextHeads(mini.width)
    heads_optimizer = torch.optim.AdamW(heads.parameters(), 2e-3)
    progress = Progress()
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        language.load_state_dict(saved["language"])
        if tower is not None:
            tower.load_state_dict(saved["visual"])
        if "heads" in saved:
            heads.load_state_dict(saved["heads"], strict=False)
        for (optimizer, _), state in zip(optimizers.all, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        progress = Progress(**saved["progress"])
        logger.info("continue at %s", progress)
    rng = stream("train", 2, seed, progress.step)
    clock, running, running_aside = busy_seconds(), 0.0, 0.0
    while progress.seconds < 60 * minutes and progress.stage < len(stages):
        stage = stages[progress.stage]
        frames = draw_length(rng, stage)
        middle = (stage.low + stage.high) / 2
        videos = max(4, min(32, round(stage.videos * middle / max(frames, middle / 2))))
        loss = aside = 0.0
        room = max(1, 320 // frames)  # videos in one pass; the rest accumulates
        for start in range(0, videos, room):
            part = min(room, videos - start)
            batch = draw_batch(
                rng,
                mini,
                source,
                videos=part,
                frames=frames,
                questions=stage.questions,
            )
            if rng.random() < THINNED:
                batch = thin(batch, mini.frame_tokens, rng)
            logits, hidden = forward_with_hidden(mini, batch)
            share = loss_of(logits, batch) * (part / videos)
            loss += share.item()
            if batch.context is not None:
                extra = heads.loss(hidden, batch) * (part / videos)
                share = share + 0.3 * extra
                aside += extra.item()
            share.backward()  # type: ignore[no-untyped-call]
        progress.step += 1
        optimizers.step(learning_rate(progress.step, progress.seconds / (60 * minutes), peak))
        heads_optimizer.step()
        heads_optimizer.zero_grad()
        running_aside = 0.97 * running_aside + 0.03 * aside
        running = loss if running == 0 else 0.97 * running + 0.03 * loss
        now = busy_seconds()
        passed, clock = now - clock, now
        progress.seconds += passed
        progress.stage_seconds += passed
        if progress.step % (50) == 0:
            tally = evaluate(mini, source, frames=stage.high, videos=24 if stage.high <= 16 else 12)
            logger.info(
                "step %d, %.0f s, %d-%d frames, loss %.3f + %.3f, held out at %d: %s",
                progress.step,
                progress.seconds,
                stage.low,
                stage.high,
                running,
                running_aside,
                stage.high,
                tally,
            )
            over = progress.stage_seconds > 60 * stage.minutes
            if tally.accuracy >= stage.gate or over:
                progress.stage += 1
                progress.stage_seconds = 0.0
            save_checkpoint(checkpoint, mini, heads, optimizers, progress)
    save_checkpoint(checkpoint, mini, heads, optimizers, progress)


def save_checkpoint(
    path: Path,
    mini: Architecture,
    heads: nn.Module,
    optimizers: Optimizers,
    progress: Progress,
) -> None:
    """Write the checkpoint beside its place and move it there in one step."""
    beside = path.with_suffix(".new")
    state = {
        "language": mini.language.state_dict(),
        "visual": mini.visual.state_dict(),
        "heads": heads.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers.all],
        "progress": vars(progress),
    }
    torch.save(state, beside)
    beside.replace(path)
