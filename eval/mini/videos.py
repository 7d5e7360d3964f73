"""Sampled frames of a story as they come out of a decoder and the video processor's resize."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tokenprune.eval.mini.model import FRAME_SIZE
from tokenprune.eval.mini.world import Story, draw_clips, frame_scenes, render

__all__ = ["sampled_frames"]

FACTOR = 2  # rendered this much larger than what the model sees


def sampled_frames(
    rng: np.random.Generator, story: Story, *, frames: int, phase: float
) -> NDArray[np.uint8]:
    """Render `frames` frames at `(i + phase)` intervals: `[frames, 48, 96, 3]`.

    The pictures are drawn at twice the size, lose colour detail and levels as in a video codec,
    and are scaled down with an antialiased bicubic filter as in the processor.
    """
    interval = story.interval_seconds
    scenes = frame_scenes(story, frames, interval, phase)
    starts = np.array([scene.start_seconds for scene in story.scenes])
    lengths = np.array([scene.seconds for scene in story.scenes])
    progress = ((np.arange(frames) + phase) * interval - starts[scenes]) / lengths[scenes]
    looks = draw_clips(rng, [scene.things for scene in story.scenes])[scenes]
    size = (FRAME_SIZE[0] * FACTOR, FRAME_SIZE[1] * FACTOR)
    soft = float(rng.uniform(0.8, 2.5))
    pictures, _ = render(rng, looks, np.asarray(progress, np.float32), size, soft=soft)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    small = F.interpolate(
        _codec(rng, pixels), FRAME_SIZE, mode="bicubic", antialias=True, align_corners=False
    )
    return np.asarray(small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous())


def _codec(rng: np.random.Generator, pixels: torch.Tensor) -> torch.Tensor:
    """Halve the colour resolution and coarsen the levels of `[n, 3, H, W]`."""
    brightness = pixels.mean(1, keepdim=True)
    color = F.interpolate(F.avg_pool2d(pixels - brightness, 2), scale_factor=2.0, mode="bilinear")
    step = float(rng.uniform(1, 6))
    return ((brightness + color) / step).round() * step
