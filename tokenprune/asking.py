"""The main job: a file and a question in, an answer out, with what pruning saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.core.recipe import Recipe
from tokenprune.engine.cache import cache_bytes, full_cache_bytes
from tokenprune.engine.patch import prune
from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.inputs import check_watchable, read_media
from tokenprune.media import Timings, Video
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media
from tokenprune.models.prompts import check_question
from tokenprune.report.answer import Answer
from tokenprune.report.change import Change
from tokenprune.report.seconds import Seconds
from tokenprune.report.timeline import Timeline
from tokenprune.report.timing import Clock
from tokenprune.session.session import Session
from tokenprune.session.watcher import Watcher

if TYPE_CHECKING:
    from transformers.generation import BaseStreamer

__all__ = ["Source", "answer", "ask", "default_recipe", "open_source", "watch_and_ask"]


def default_recipe(loaded: LoadedModel, media: Media | None = None) -> Recipe:
    """The recipe where none is given: VFlowOpt for what is seen, PLPHP for sound alone.

    Args:
        loaded: The model.
        media: What is asked about; None before it is known.
    """
    sees = set(loaded.adapter.modalities) - {"audio"}
    heard = media is not None and not len(media.frames)
    return Recipe("vflowopt(keep=0.25)" if sees and not heard else "plphp(keep=0.5)")


def ask(
    loaded: LoadedModel,
    path: str | Path,
    question: str,
    *,
    recipe: Recipe | str | None = None,
    frames: int | None = None,
    fps: float | None = None,
    group: int | None = None,
    sound: bool = True,
    max_new_tokens: int = 64,
    streamer: BaseStreamer | None = None,
) -> Answer:
    """Answer a question about a file.

    With `group` the file is watched by a `Session`: frames are decoded while those before them go
    through the model, and only the pruned cache stays. Budgets are then of each group, as are
    `report.calls`. What a session refuses is refused: recipes that depend on the question or weigh
    the whole video, models whose processor cannot write a video in groups, and sound.

    Args:
        loaded: The model.
        path: A video, an image, or a sound.
        question: In words.
        recipe: What to prune; None for `default_recipe`.
        frames: Frames to take from a video, evenly spread; 64 if `fps` is not given either.
        fps: Frames per second to take from a video.
        group: Frames of a video that are prefilled at once; None for all.
        sound: Whether a model that both sees and hears is given a video's sound track as well.
        max_new_tokens: Longest answer.
        streamer: Takes tokens as they come, as in `generate`.

    Raises:
        TokenPruneError: Something about the file, the question, the recipe or the model.
    """
    check_question(question)
    chosen = None if recipe is None else Recipe(recipe)
    source = open_source(loaded, path, frames=frames, fps=fps, group=group, sound=sound)
    return source.ask(question, chosen, max_new_tokens, streamer)


@dataclass(frozen=True)
class Source:
    """A file that a model answers about: read once, or watched again for each question.

    Attributes:
        loaded: The model.
        media: What was read; None if the file is watched in groups.
    """

    loaded: LoadedModel
    media: Media | None
    _answer: Callable[[str, Recipe, int, BaseStreamer | None], Answer] = field(repr=False)

    def ask(
        self,
        question: str,
        recipe: Recipe | None = None,
        max_new_tokens: int = 64,
        streamer: BaseStreamer | None = None,
    ) -> Answer:
        """Answer a question; the arguments and errors are those of `tokenprune.ask`."""
        chosen = default_recipe(self.loaded, self.media) if recipe is None else recipe
        return self._answer(question, chosen, max_new_tokens, streamer)


def open_source(
    loaded: LoadedModel,
    path: str | Path,
    *,
    frames: int | None = None,
    fps: float | None = None,
    group: int | None = None,
    sound: bool = True,
) -> Source:
    """A file to ask about; the arguments are those of `ask`. With `group` nothing is read yet.

    Raises:
        TokenPruneError: Something about the file or the model.
    """
    settings: dict[str, Any] = {"frames": frames, "fps": fps, "sound": sound}
    if group is not None:
        return Source(loaded, None, partial(watch_and_ask, loaded, path, group=group, **settings))
    media = read_media(path, loaded, **settings)
    return Source(loaded, media, partial(answer, loaded, media))


def answer(
    loaded: LoadedModel,
    media: Media,
    question: str,
    recipe: Recipe,
    max_new_tokens: int = 64,
    streamer: BaseStreamer | None = None,
) -> Answer:
    """Answer a question about media that were read before.

    Raises:
        TokenPruneError: Something about the question, the recipe or the model.
    """
    if max_new_tokens < 1:
        raise TokenPruneError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    clock = Clock(loaded.adapter.language_model)
    began = time.perf_counter()
    inputs = loaded.encode(media, question)
    processed = time.perf_counter()
    _check_placeholders(loaded, inputs)
    length = inputs["input_ids"].shape[1]
    pruned = prune(
        loaded.model,
        recipe,
        question=question,
        frames=loaded.frames_by_clip(media),
        frame_seconds=loaded.frame_seconds(media.video),
    )
    with torch.inference_mode(), pruned as report:
        output = loaded.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
        )
    words = loaded.processor.batch_decode(output[:, length:], skip_special_tokens=True)[0]
    video = media.video if isinstance(media.video, Video) else None
    timings = Timings(0.0, 0.0) if video is None else video.timings
    reading = Seconds(index=timings.index_seconds, decode=timings.decode_seconds)
    phases = replace(
        report.spans(clock),
        decode=tuple((clock.of_host(begin), clock.of_host(end)) for begin, end in timings.effort),
        process=((clock.of_host(began), clock.of_host(processed)),),
    )
    return Answer(
        answer=words.strip(),
        media_tokens=report.media_tokens,
        seconds=Seconds.zero() + reading + report.seconds,
        kv_bytes=report.kv_bytes,
        frames=len(media.frames),
        recipe=str(recipe),
        model=loaded.name,
        report=report,
        pictures=loaded.visible(media),
        timeline=Timeline((phases,)).from_start(),
        pictures_decoded=0 if video is None else video.pictures_decoded,
        bytes_read=0 if video is None else video.bytes_read,
        columns=loaded.columns(media),
    )


def _check_placeholders(loaded: LoadedModel, inputs: dict[str, Tensor]) -> None:
    """Check that the chat template gave the file a place in the prompt.

    Raises:
        UnsupportedModelError: It left it out.
    """
    held = loaded.adapter.placeholders(inputs["input_ids"], inputs.get("mm_token_type_ids"))
    if not any(map(torch.any, held.values())):
        raise UnsupportedModelError(
            f"the chat template of {loaded.name} wrote a prompt without a place for the file; "
            "use a checkpoint whose template knows such files"
        )


def watch_and_ask(
    loaded: LoadedModel,
    path: str | Path,
    question: str,
    recipe: Recipe,
    max_new_tokens: int = 64,
    streamer: BaseStreamer | None = None,
    *,
    group: int = 8,
    frames: int | None = None,
    fps: float | None = None,
    sound: bool = True,
) -> Answer:
    """Watch a file group by group and answer one question about it; see `ask`.

    Returns:
        The answer. Its seconds are those of watching and of the question together: "decode" is the
        time that the model waited for frames.

    Raises:
        TokenPruneError: Something about the file, the question, the recipe or the model.
    """
    check_question(question)
    with Session(loaded.model, loaded.processor, recipe, group=group, name=loaded.name) as session:
        check_watchable(path, loaded, sound=sound)
        groups = session.watch(path, frames=frames, fps=fps)
        size = _SizeAfterPrefill(session._watcher)
        found = session.ask(
            question, max_new_tokens=max_new_tokens, streamer=streamer, logits_processor=[size]
        )
    spent = sum((one.seconds for one in groups), found.seconds)
    return replace(found, kv_bytes=size.kv_bytes, seconds=replace(spent, process=None))


class _SizeAfterPrefill:
    """Measures the cache when `generate` has read the question, where it asks for logits."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self.kv_bytes = Change(0, 0)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        watched = self._watcher.watched
        if watched is not None and not self.kv_bytes.after:
            cache = watched.cache
            self.kv_bytes = Change(full_cache_bytes(cache), cache_bytes(cache))
        return scores
