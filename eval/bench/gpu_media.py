"""Decoding of a file on all cores, alone and while a model prefills what was decoded before."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from tokenprune.eval.bench import footage
from tokenprune.eval.bench.gpu_models import TINY_SIGLIP, TINY_TEXT, Models
from tokenprune.eval.bench.overlap import FOOTAGE, Bench, Round, summary
from tokenprune.eval.bench.random_models import QWEN2_7B, SO400M, build, llava_config
from tokenprune.eval.bench.readers import numbers_on
from tokenprune.media import read_video
from tokenprune.models.load import load_outline
from tokenprune.models.loaded import LoadedModel

__all__ = ["decode", "overlap"]

PRESET = "veryfast"  # of the encoder: the file is made first
PROCESSOR = "mini-video-llava"

Cell = dict[str, Any]


def overlap(models: Models, files: Path, rounds: int, until: float, tiny: bool) -> Iterator[Cell]:
    """Seconds from the path of a video to the first token, decoding during prefill and before it.

    Yields:
        What is known of a recipe after each round.
    """
    path = footage.make(FOOTAGE, files, PRESET)
    loaded = _watcher(models, tiny)
    frames, group = (8, 4) if tiny else (96, 16)
    yielded = False  # there is to be one cell at least
    for recipe in ("none", "vflowopt(keep=0.25)"):
        bench = Bench(loaded, path, frames, group, recipe, workers=None)
        measured: list[Round] = []
        for number in range(rounds + 1):
            if yielded and time.monotonic() > until:
                return
            one, _ = bench.round(number)
            if not number:  # a warm-up
                continue
            measured.append(one)
            found = {f"{name}_seconds": value for name, value in summary(measured).items()}
            ratio = found.pop("over_longer_seconds")
            yielded = True
            whole, apart = found["whole_seconds"], found["one_after_the_other_seconds"]
            yield {
                "recipe": recipe,
                "frames": frames,
                "group": group,
                "rounds": len(measured),
                **found,
                "over_longer_ratio": ratio,
                "whole_ratio": whole / apart,
            }


def _watcher(models: Models, tiny: bool) -> LoadedModel:
    """A LLaVA-OneVision of 7B shape with the processor, and so the vocabulary, of a small model."""
    outline = load_outline(PROCESSOR)
    processor, known = outline.processor, outline.model.config
    text, vision = (TINY_TEXT, TINY_SIGLIP) if tiny else (QWEN2_7B, SO400M)
    side = vision["image_size"]
    processor.video_processor.size = {"height": side, "width": side}
    processor.num_image_tokens = (side // vision["patch_size"]) ** 2
    text = {**text, "vocab_size": known.text_config.vocab_size}
    config = llava_config(text, vision, (known.image_token_index, known.video_token_index))
    model = models.get("a watcher", lambda device: build(config, device))
    return LoadedModel(model, processor, "random-llava-onevision")


def decode(files: Path, rounds: int, until: float, tiny: bool) -> Iterator[Cell]:
    """Seconds to read frames spread over ten minutes, with one worker and with one on each core.

    Yields:
        What is known of a way to read after each round.
    """
    path = footage.make(FOOTAGE, files, PRESET)
    cores = len(os.sched_getaffinity(0))
    ways: list[tuple[int, int | None, Literal["thread", "process"]]] = [
        (64, None, "thread"),
        (256, None, "thread"),
        (1024, None, "thread"),
        (256, None, "process"),
        (64, 1, "thread"),
    ]
    if tiny:
        ways = [(8, None, "thread"), (8, 1, "thread")]
    size = (112, 192) if tiny else (SO400M["image_size"], SO400M["image_size"])
    yielded = False
    for frames, workers, kind in ways:
        seconds: list[float] = []
        for _ in range(rounds):
            if yielded and time.monotonic() > until:
                return
            begin = time.perf_counter()
            video = read_video(path, frames=frames, size=size, workers=workers, worker_kind=kind)
            seconds.append(time.perf_counter() - begin)
            due = video.indices % footage.MINUTE
            yielded = True
            yield {
                "frames": frames,
                "workers": workers or cores,
                "worker_kind": kind,
                "rounds": len(seconds),
                "seconds": statistics.median(seconds),
                "pictures_decoded": video.pictures_decoded,
                "right": int((torch.as_tensor(numbers_on(video.frames)) == due).sum()),
            }
