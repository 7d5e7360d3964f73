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
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tokenprune.eval.mini.model import FRAME_SIZE, FRAME_TOKENS, MERGE, PATCH
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

__all__ = ["Heads", "encode_frames", "patches", "train_tower"]

logger = logging.getLogger(__name__)

FRAME_PATCHES = FRAME_TOKENS * MERGE * MERGE
ON, OFF = 0.04, 0.004  # share of a token's area: above it shows the thing, below it does not


def _attention_by_frame(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Full attention inside each frame, all frames in one call: training only.

    The model's own path calls the kernel once per frame.
    """

    def fold(x: Tensor) -> Tensor:  # [1, heads, frames * patches, d] -> [frames, heads, patches, d]
        by_frame: Tensor = x[0].unflatten(1, (-1, FRAME_PATCHES))  # type: ignore[no-untyped-call]
        return by_frame.transpose(0, 1)

    # Written out: on these short rows the fused kernel's backward pass is ten times slower.
    scale: float = query.shape[-1] ** -0.5
    weights = (fold(query) * scale @ fold(key).transpose(-1, -2)).softmax(-1)
    out = weights.to(value.dtype) @ fold(value)
    return out.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register("mini_by_frame", _attention_by_frame)
AttentionMaskInterface.register("mini_by_frame", lambda *_, **__: None)


class Heads(nn.Module):
    """What a token shows: no thing or a shape, no thing or a colour. Dropped after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.color = nn.Linear(width, 1 + len(COLORS))


def patches(frames: NDArray[np.uint8]) -> Tensor:
    """The video processor's patches of frames `[n, 48, 96, 3]`: `[n * 72, 192]`."""
    n, height, width, _ = frames.shape
    step = PATCH * MERGE
    pixels = torch.from_numpy(frames).float() / 127.5 - 1
    grid = pixels.view(n, height // step, MERGE, PATCH, width // step, MERGE, PATCH, 3)
    return grid.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * PATCH * PATCH)


def encode_frames(visual: nn.Module, frames: NDArray[np.uint8]) -> Tensor:
    """Tower features of frames `[n, 48, 96, 3]`: `[n, 18, D]`. Needs "mini_by_frame" attention."""
    pixels = patches(frames)
    grid = torch.tensor([[len(frames), FRAME_SIZE[0] // PATCH, FRAME_SIZE[1] // PATCH]])
    whole = torch.tensor([0, len(pixels)], dtype=torch.int32)
    features: Tensor = visual(pixels, grid, cu_seqlens=whole).pooler_output
    return features.view(len(frames), FRAME_TOKENS, -1)


def token_targets(clips: Clips, cover: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Shape and colour classes per token `[n, 18]`; 0 shows no thing, -100 is not asked."""
    step = PATCH * MERGE
    share = F.avg_pool2d(torch.from_numpy(cover), step).flatten(2)  # [n, 2, 18]
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
    visual: PreTrainedModel, *, minutes: float, seed: int, checkpoint: Path, batch: int = 64
) -> None:
    """Train the tower for `minutes`, or go on from `checkpoint`; fold the feature scale in."""
    width = visual.config.out_hidden_size
    heads = Heads(width)
    parameters = [*visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    start, step = time.time(), 0
    rng = stream("train", 1, seed)
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 1.6e-3 * min(1, step / 150) * (0.02 + 0.98 * (1 - done))
        clips = draw_clips(rng, draw_things(rng, batch))
        soft = rng.uniform(0.7, 1.5)
        frames, cover = render(rng, clips, rng.random(batch), FRAME_SIZE, soft=soft)
        shape, color = token_targets(clips, cover)
        with torch.autocast("cpu", torch.bfloat16):
            features = encode_frames(visual, frames)
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
                time.time() - start,
                loss.item(),
                (shapes.argmax(-1)[on] == shape[on]).float().mean(),
                (colors.argmax(-1)[on] == color[on]).float().mean(),
                (shapes.argmax(-1)[off] == 0).float().mean(),
            )
        if step % 500 == 0:
            torch.save({"visual": visual.state_dict(), "heads": heads.state_dict()}, checkpoint)
    torch.save({"visual": visual.state_dict(), "heads": heads.state_dict()}, checkpoint)
