"""Sampled frames of a story as they come out of a decoder and the video processor's resize."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tokenprune.eval.mini.model import FRAME_SIZE
from tokenprune.eval.mini.world import Story, draw_clips, frame_scenes, render

__all__ = ["resized", "sampled_frames"]

FACTOR = 2  # rendered this much larger than what the model sees


def sampled_frames(
    rng: np.random.Generator,
    story: Story,
    *,
    frames: int,
    phase: float,
    size: tuple[int, int] = FRAME_SIZE,
) -> NDArray[np.uint8]:
    """Render `frames` frames at `(i + phase)` intervals: `[frames, height, width, 3]`.

    The pictures are drawn at twice the size, lose colour detail and levels as in a video codec,
    and are scaled down with an antialiased bicubic filter as in the processor.
    """
    interval = story.interval_seconds
    scenes = frame_scenes(story, frames, interval, phase)
    starts = np.array([scene.start_seconds for scene in story.scenes])
    lengths = np.array([scene.seconds for scene in story.scenes])
    progress = ((np.arange(frames) + phase) * interval - starts[scenes]) / lengths[scenes]
    looks = draw_clips(rng, [scene.things for scene in story.scenes])[scenes]
    large = (size[0] * FACTOR, size[1] * FACTOR)
    soft = float(rng.uniform(0.8, 2.5))
    pictures, _ = render(rng, looks, np.asarray(progress, np.float32), large, soft=soft)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    return _scaled(_codec(rng, pixels), size)


def resized(frames: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale frames `[n, height, width, 3]` to another height and width, as a processor does."""
    if frames.shape[1:3] == size:
        return frames
    return _scaled(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size)


def _scaled(pixels: torch.Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    small = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    return np.asarray(small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous())


def _codec(rng: np.random.Generator, pixels: torch.Tensor) -> torch.Tensor:
    """Halve the colour resolution and coarsen the levels of `[n, 3, H, W]`."""
    brightness = pixels.mean(1, keepdim=True)
    color = F.interpolate(F.avg_pool2d(pixels - brightness, 2), scale_factor=2.0, mode="bilinear")
    step = float(rng.uniform(1, 6))
    return ((brightness + color) / step).round() * step
