"""Write a sample video of the event world as a real file, with the truth about it beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from tokenprune.eval.mini.world import (
    ASPECT,
    KINDS,
    Story,
    ask,
    draw_clips,
    draw_story,
    render,
    stream,
)

__all__ = ["write_sample"]

FPS = 10
FRAMES = 64  # the number of frames the story is made for
SAMPLE_RATE = 22050
MOST_SCENES = 20
QUESTIONS = 27


def write_sample(
    path: str | Path, *, seconds: float = 180, seed: int = 7, size: tuple[int, int] = (360, 640)
) -> list[dict[str, str]]:
    """Write an H.264 MP4 with B-frames and a sound track, and questions to `<stem>.json`.

    Every scene is seen at least once when 64 frames are sampled evenly from the file.

    Args:
        path: The file to write; its folder must exist.
        seconds: Length of the video.
        seed: Another seed, another story.
        size: Height and width, both even.

    Returns:
        What the JSON file holds: `question`, `answer` and `kind` of about 27 questions.

    Raises:
        ValueError: If `seconds` or `size` is too small or odd.
    """
    if seconds < 3:
        raise ValueError(f"seconds must be at least 3, got {seconds}")
    if min(size) < 48 or size[0] % 2 or size[1] % 2:
        raise ValueError(f"size must be even and at least 48 on both sides, got {size}")
    rng = stream("sample", seed)
    intervals = min(FRAMES - 1, int(seconds))  # first and last frame are both sampled
    scenes = min(MOST_SCENES, int(intervals / 1.3))
    story = draw_story(
        rng,
        frames=intervals,
        interval_seconds=seconds / intervals,
        scenes=scenes,
        needle=scenes >= 3,
    )
    path = Path(path)
    with av.open(str(path), "w", format="mp4") as file:
        video = file.add_stream("libx264", rate=FPS)
        video.height, video.width = size
        video.pix_fmt = "yuv420p"
        video.gop_size = 5 * FPS
        video.options = {"preset": "superfast", "crf": "25", "bf": "2"}
        sound = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        sound.bit_rate = 48000
        for picture, tone in zip(
            _pictures(rng, story, seconds), _tones(story, seconds), strict=True
        ):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            file.mux(video.encode(frame.reformat(size[1], size[0], "yuv420p")))
            file.mux(sound.encode(tone))
        file.mux(video.encode(None))
        file.mux(sound.encode(None))
    told = _questions(rng, story)
    path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    return told


def _pictures(
    rng: np.random.Generator, story: Story, seconds: float
) -> Iterator[NDArray[np.uint8]]:
    """Frames at a small size: the encoder's scaler enlarges them."""
    size = (144, round(144 * ASPECT))
    clips = draw_clips(rng, [scene.things for scene in story.scenes])
    clips = replace(clips, noise=clips.noise * np.float32(0.4))  # noise is most of a file's size
    starts = np.array([scene.start_seconds for scene in story.scenes])
    times = np.arange(round(seconds * FPS)) / FPS
    which = np.searchsorted(starts, times, side="right") - 1
    lengths = np.array([scene.seconds for scene in story.scenes])
    progress = ((times - starts[which]) / lengths[which]).astype(np.float32)
    for first in range(0, len(times), 16):
        part = slice(first, first + 16)
        frames, _ = render(rng, clips[which[part]], progress[part], size)
        yield from frames


def _tones(story: Story, seconds: float) -> Iterator[av.AudioFrame]:
    """One quiet tone per scene, cut into the length of a picture each."""
    step = SAMPLE_RATE // FPS
    starts = np.array([scene.start_seconds for scene in story.scenes])
    for number in range(round(seconds * FPS)):
        scene = int(np.searchsorted(starts, number / FPS, side="right")) - 1
        pitch = 220 * 2 ** ((scene * 5 % 12) / 12)
        at = (number * step + np.arange(step)) / SAMPLE_RATE
        wave = (0.05 * np.sin(2 * np.pi * pitch * at)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = number * step
        frame.time_base = Fraction(1, SAMPLE_RATE)
        yield frame


def _questions(rng: np.random.Generator, story: Story) -> list[dict[str, str]]:
    """Up to QUESTIONS different questions, the kinds in turn."""
    told: dict[str, dict[str, str]] = {}
    for turn in range(12 * QUESTIONS):
        question = ask(rng, story, KINDS[turn % len(KINDS)])
        if question is not None and question.text not in told:
            told[question.text] = {
                "question": question.text.replace(" ?", "?").capitalize(),
                "answer": question.answer,
                "kind": question.kind,
            }
        if len(told) == QUESTIONS:
            break
    return list(told.values())
