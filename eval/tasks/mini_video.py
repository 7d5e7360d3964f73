"""Held-out questions on generated event videos: the quality bench of every method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BatchFeature, Qwen2VLProcessor
from transformers.video_utils import VideoMetadata

from tokenprune.eval.mini.language import draw_interval
from tokenprune.eval.mini.videos import sampled_frames
from tokenprune.eval.mini.world import KINDS, Split, ask, draw_story, stream

__all__ = ["LOOKUPS", "VideoQuestion", "check", "encode", "max_new_tokens", "samples", "score"]

max_new_tokens = 16  # answers are one or two words

LOOKUPS = ("color", "shape", "first", "last", "exist", "needle")  # the other kinds need order


@dataclass(frozen=True, repr=False)
class VideoQuestion:
    """A question on sampled frames; the questions of a video share one `frames` array."""

    frames: NDArray[np.uint8]  # [F, 3, H, W]
    seconds_per_frame: float
    question: str
    answer: str
    kind: str
    video: int  # number of the video, from 0

    def __repr__(self) -> str:
        return f"VideoQuestion({self.question!r}, {self.answer!r}, frames={self.frames.shape})"

    @property
    def timestamps(self) -> NDArray[np.float64]:
        """Time of each frame in seconds from the first, `[F]`."""
        return np.asarray(np.arange(len(self.frames)) * self.seconds_per_frame, np.float64)


def samples(
    count: int, *, frames: int = 64, seed: int = 1, split: Split = "held-out"
) -> Iterator[VideoQuestion]:
    """Yield `count` questions, one of each kind that a video allows, then the next video.

    Args:
        count: Number of questions.
        frames: Sampled frames per video.
        seed: Another seed, other videos; the same ones every time.
        split: "held-out" to report, "tune" to tune strategies on. Training uses neither.

    Raises:
        ValueError: If `count` or `frames` is below one, or `split` is the training's.
    """
    check(count, frames, split)
    video = 0
    while count > 0:
        for item in _video_questions(frames, seed, video, split)[:count]:
            yield item
            count -= 1
        video += 1


def check(count: int, frames: int, split: Split) -> None:
    """Refuse what `samples` cannot draw, with a ValueError."""
    if count < 1 or frames < 1:
        raise ValueError(f"count and frames must be at least 1, got {count} and {frames}")
    if split == "train":
        raise ValueError('split must be "held-out" or "tune", got "train": it was trained on')


def _video_questions(frames: int, seed: int, video: int, split: Split) -> list[VideoQuestion]:
    rng = stream(split, 10, seed, frames, video)
    interval = draw_interval(rng, frames)
    story = draw_story(rng, frames=frames, interval_seconds=interval)
    pictures = sampled_frames(rng, story, frames=frames, phase=float(rng.random()))
    planes = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
    drawn = [ask(rng, story, KINDS[i]) for i in rng.permutation(len(KINDS))]
    return [VideoQuestion(planes, interval, q.text, q.answer, q.kind, video) for q in drawn if q]


def encode(processor: Qwen2VLProcessor, sample: VideoQuestion) -> BatchFeature:
    """The model's inputs for a sample, through the processor and its chat template."""
    content = [{"type": "video"}, {"type": "text", "text": sample.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    count = len(sample.frames)
    metadata = VideoMetadata(
        total_num_frames=count,
        fps=1 / sample.seconds_per_frame,
        frames_indices=list(range(count)),
    )
    return processor(
        text=[text],
        videos=[torch.from_numpy(sample.frames)],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )


def score(answer: str, truth: str) -> bool:
    """Whether the answers are the same words, whatever their case, spaces and punctuation."""
    return _words(answer) == _words(truth)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
