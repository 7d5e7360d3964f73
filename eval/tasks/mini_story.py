"""Retelling generated event videos: long answers, which a pruned cache has to carry to the end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenprune.eval.mini.language import draw_interval
from tokenprune.eval.mini.videos import sampled_frames
from tokenprune.eval.mini.world import Split, ask, draw_story, stream
from tokenprune.eval.tasks.mini_video import VideoQuestion, check, encode

__all__ = ["encode", "max_new_tokens", "samples", "score"]

max_new_tokens = 160  # 24 scenes, a few of them with two things


def samples(
    count: int, *, frames: int = 32, seed: int = 1, split: Split = "held-out"
) -> Iterator[VideoQuestion]:
    """Yield `count` videos with the request to describe them.

    Args:
        count: Number of videos.
        frames: Sampled frames per video.
        seed: Another seed, other videos; the same ones every time.
        split: "held-out" to report, "tune" to tune strategies on. Training uses neither.

    Raises:
        ValueError: If `count` or `frames` is below one, or `split` is the training's.
    """
    check(count, frames, split)
    for video in range(count):
        rng = stream(split, 11, seed, frames, video)
        interval = draw_interval(rng, frames)
        story = draw_story(rng, frames=frames, interval_seconds=interval)
        pictures = sampled_frames(rng, story, frames=frames, phase=float(rng.random()))
        question = ask(rng, story, "describe")
        assert question is not None  # every story can be told
        planes = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
        yield VideoQuestion(planes, interval, question.text, question.answer, "describe", video)


def score(answer: str, truth: str) -> float:
    """Share of the scenes told rightly and in order, 0 to 1.

    The longest common subsequence of both lists of scenes, over the longer list: a scene left
    out, told wrongly or told twice costs the same.
    """
    told, true = (tuple(text.split(" then ")) for text in (answer.strip(), truth.strip()))
    return _common(told, true) / max(len(told), len(true))


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if x == y else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]
