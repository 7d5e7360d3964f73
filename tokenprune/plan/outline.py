"""Prompts about a file without its content: what a processor will write, from sizes alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenprune.inputs import read_media
from tokenprune.media import SizeRule, Timings, Video, index_video
from tokenprune.media.sampling import FrameRequest, resolve_size
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media
from tokenprune.models.processors import frame_size
from tokenprune.plan.forecast import Prompt
from tokenprune.session.positions import check_positions
from tokenprune.session.script import FrameGroup, Pace, Script, Tokens

__all__ = ["outline_media", "prompt_of", "prompts_in_groups"]


def outline_media(
    path: str | Path, loaded: LoadedModel, *, frames: int | None, fps: float | None, sound: bool
) -> Media:
    """What `read_media` reads; frames of a video have a shape, but no content."""
    reader = partial(_outline_video, device=_device(loaded))
    return read_media(path, loaded, frames=frames, fps=fps, sound=sound, reader=reader)


def prompt_of(loaded: LoadedModel, media: Media, question: str) -> tuple[Prompt, bool]:
    """The prompt about some media, and whether their content decides on its length."""
    inputs, by_content = _process(loaded, media, question)
    return Prompt.of(loaded.adapter, inputs, loaded.frame_seconds(media.video)), by_content


def prompts_in_groups(
    loaded: LoadedModel,
    path: str | Path,
    question: str,
    *,
    group: int,
    frames: int | None,
    fps: float | None,
) -> tuple[list[Prompt], int]:
    """What goes through the model, part by part, when a video is watched in groups and asked about.

    Args:
        loaded: The model.
        path: A video.
        question: In words.
        group: Frames of a group.
        frames: As `Session.watch` takes it.
        fps: As `Session.watch` takes it.

    Returns:
        The prompts, each of which continues the one before, the last of them the question; and the
        number of frames.

    Raises:
        UnsupportedModelError: The processor cannot write the video in groups.
        MediaError: The file cannot be read.
    """
    rule = frame_size(loaded.processor)
    video = _outline_video(path, frames=frames, fps=fps, size=rule, device=_device(loaded))
    rate, length = video.info.clock
    pace = Pace(rate, len(video.frames) / length * rate)
    height, width = video.frames.shape[-2:]
    script = Script(loaded, (height, width), rule is not None, pace)
    prompts = []
    check_positions(loaded, script)
    for first in range(0, len(video.frames), group):
        here = slice(first, first + group)
        part = FrameGroup(
            video.frames[here], video.pts_seconds[here], video.even_indices[here], pace
        )
        tokens = _write(script, part, opening=first == 0)
        inputs = {"input_ids": tokens.ids, **tokens.types, **tokens.media}
        prompt = Prompt.of(loaded.adapter, inputs, loaded.frame_seconds(part))
        takes_back = script.end_tokens if first else 0
        prompts.append(replace(prompt, takes_back=takes_back, continues=first > 0, more=True))
    asked = script.suffix(question)
    prompts.append(Prompt(loaded.adapter, {"input_ids": asked.ids, **asked.types}, []))
    return prompts, len(video.frames)


def _device(loaded: LoadedModel) -> str:
    # A processor of images wants pixels, if only black ones.
    return "meta" if loaded.takes_video else "cpu"


def _write(script: Script, group: FrameGroup, *, opening: bool) -> Tokens:
    try:
        return script.write(group, opening=opening)
    except NotImplementedError:  # torch, about tensors without data
        # If pixels decided on the length, the script would have refused the processor.
        frames = torch.zeros(1, dtype=torch.uint8).expand(group.frames.shape)
        return script.write(replace(group, frames=frames), opening=opening)


def _outline_video(
    path: str | Path,
    *,
    frames: int | None,
    fps: float | None,
    size: SizeRule | None,
    device: str,
) -> Video:
    """What `read_video` reads, with frames that have a shape, but no content."""
    index = index_video(path)
    ranks = FrameRequest(frames, fps).ranks(index)
    height, width = resolve_size(size, index.info, len(ranks))
    blank = torch.zeros(1, dtype=torch.uint8, device=device)
    return Video(
        blank.expand(len(ranks), 3, height, width),
        torch.from_numpy(index.seconds[ranks]),
        torch.from_numpy(ranks),
        index.info,
        torch.zeros(len(ranks), dtype=torch.bool),
        0,
        Timings(0.0, 0.0),
    )


def _process(loaded: LoadedModel, media: Media, question: str) -> tuple[dict[str, Any], bool]:
    """What the processor makes of the media, and whether it counts tokens by what they show."""
    try:
        return loaded.process(media, question), False
    except NotImplementedError:  # torch, about tensors without data
        if media.video is None:
            raise
        generator = torch.Generator().manual_seed(0)
        # In noise no frame repeats another: as many tokens are left as can be.
        noise = torch.empty(media.frames.shape, dtype=torch.uint8).random_(generator=generator)
    found = []
    for frames in (torch.zeros_like(noise), noise):
        video = replace(media.video, frames=frames)
        found.append(loaded.process(replace(media, frames=frames, video=video), question))
    still, lively = (len(inputs["input_ids"][0]) for inputs in found)
    return found[1], still != lively
