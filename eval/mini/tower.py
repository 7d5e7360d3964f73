"""Stage 1: the vision tower learns, token by token, which shape in which colour it sees."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenprune.eval.mini.architecture import Architecture
from tokenprune.eval.mini.videos import resized
from tokenprune.eval.mini.world import (
    COLORS,
    SECOND_THING,
    SHAPES,
    Clips,
    Thing,
    draw_clips,
    render,
    stream,
)

__all__ = ["Heads", "busy_seconds", "draw_frames", "train_tower"]

logger = logging.getLogger(__name__)

ON, OFF = 0.04, 0.004  # share of a token's area: above it shows the thing, below it does not


class Heads(nn.Module):
    """What a token shows: no thing or a shape, no thing or a colour. Dropped after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.color = nn.Linear(width, 1 + len(COLORS))


def busy_seconds() -> float:
    """Processor time that each thread has had: a busy machine makes a run longer, not worse."""
    return time.process_time() / torch.get_num_threads()


def draw_frames(
    mini: Architecture, rng: np.random.Generator, clips: Clips, progress: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.uint8], Tensor]:
    """Render frame i of `clips[i]` as the tower sees it.

    Returns:
        Frames uint8 `[n, height, width, 3]`, and how much of each media token's area each thing
        covers, float32 `[n, 2, tokens]`.
    """
    soft = rng.uniform(0.7, 1.5)
    sizes = mini.source_sizes
    size = sizes[rng.integers(len(sizes))] if len(sizes) > 1 else sizes[0]
    frames, cover = render(rng, clips, progress, size, soft=soft)
    share = F.adaptive_avg_pool2d(torch.from_numpy(cover), mini.grid).flatten(2)
    return resized(frames, mini.frame_size), share


def token_targets(clips: Clips, share: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and colour classes per token `[n, tokens]`; 0 shows no thing, -100 is not asked."""
    which = share.argmax(1)
    clear = share.amax(1).gt(ON) & share.amin(1).lt(OFF)
    nothing = share.amax(1).lt(OFF)

    def classes(of: NDArray[np.int64]) -> Tensor:
        target = torch.from_numpy(of).gather(1, which) + 1
        return torch.where(clear, target, torch.where(nothing, 0, -100))

    return classes(clips.shape), classes(clips.color)


def draw_things(rng: np.random.Generator, n: int) -> list[tuple[Thing, ...]]:
    """Things for `n` independent scenes, every shape as often as the others."""
    shapes = (rng.permutation(n) + rng.integers(len(SHAPES))) % len(SHAPES)
    things: list[tuple[Thing, ...]] = []
    for shape in shapes:
        first = Thing(int(shape), int(rng.integers(len(COLORS))))
        other = int((shape + rng.integers(1, len(SHAPES))) % len(SHAPES))
        second = Thing(other, int(rng.integers(len(COLORS))))
        things.append((first, second) if rng.random() < SECOND_THING else (first,))
    return things


def train_tower(
    mini: Architecture, *, minutes: float, seed: int, checkpoint: Path, batch: int = 64
) -> None:
    """Train the tower for `minutes` of `busy_seconds`; write it to `checkpoint` now and then."""
    visual, heads = mini.visual, Heads(mini.width)
    parameters = [*visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    start, step = busy_seconds(), 0
    rng = stream("train", 1, seed)
    while (done := (busy_seconds() - start) / (60 * minutes)) < 1:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 1.6e-3 * min(1, step / 150) * (0.02 + 0.98 * (1 - done))
        clips = draw_clips(rng, draw_things(rng, batch))
        frames, share = draw_frames(mini, rng, clips, rng.random(batch))
        shape, color = token_targets(clips, share)
        with torch.autocast("cpu", torch.bfloat16):
            features = mini.encode(frames)
        shapes, colors = heads.shape(features.float()), heads.color(features.float())
        loss = F.cross_entropy(shapes.flatten(0, 1), shape.flatten(), ignore_index=-100)
        loss = loss + F.cross_entropy(colors.flatten(0, 1), color.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            on, off = shape > 0, shape == 0
            logger.info(
                "tower step %d, %.0f s, loss %.3f, shape %.3f, color %.3f, none %.3f",
                step,
                busy_seconds() - start,
                loss.item(),
                (shapes.argmax(-1)[on] == shape[on]).float().mean(),
                (colors.argmax(-1)[on] == color[on]).float().mean(),
                (shapes.argmax(-1)[off] == 0).float().mean(),
            )
        if step % 500 == 0:
            torch.save({"visual": visual.state_dict(), "heads": heads.state_dict()}, checkpoint)
    torch.save({"visual": visual.state_dict(), "heads": heads.state_dict()}, checkpoint)
