"""The main job: a file and a question in, an answer out, with what pruning saved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.core.recipe import Recipe
from tokenprune.engine.patch import prune
from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.media import Timings
from tokenprune.models.loading import LoadedModel, Media, check_question, read_media
from tokenprune.report.report import KVBytes, MediaTokens, Report
from tokenprune.report.timeline import Timeline
from tokenprune.report.timing import Clock

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Answer", "answer", "ask", "default_recipe", "numbers"]


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    Attributes:
        answer: The model's words.
        media_tokens: Counts before and after pruning, and what each site let through.
        seconds: "index", "decode", "encode", "prefill" and the mean "per_token".
        kv_bytes: Bytes of the cache at the end of prefill, unpruned and measured.
        frames: Frames that the model was given.
        recipe: The recipe, as text.
        model: Name of the model.
        report: The full report.
        pictures: `[F, 3, H, W]` uint8, the frames as far as the model saw them; or tiles of an
            image, if it saw nothing else.
        timeline: When each group of frames was decoded, processed, encoded and prefilled; all
            frames are one group, unless they were watched in several.
        pictures_decoded: Pictures that came out of decoders: the frames, and those they are built
            on; 0 if it is no video.
        bytes_read: Bytes of video packets that were read for them.
        columns: How many `pictures` lie side by side, if they are tiles.
    """

    answer: str
    media_tokens: MediaTokens
    seconds: dict[str, float]
    kv_bytes: KVBytes
    frames: int
    recipe: str
    model: str
    report: Report = field(repr=False, compare=False)
    pictures: Tensor = field(repr=False, compare=False)
    timeline: Timeline = field(repr=False, compare=False)
    pictures_decoded: int
    bytes_read: int
    columns: int | None = None

    def overlay(self) -> Image:
        """A picture of what the model saw, in which dropped tokens are dark.

        Raises:
            MediaError: It saw nothing, or the frames are no more at hand.
        """
        return self.report.overlay(self.pictures, columns=self.columns)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        names = ("answer", "media_tokens", "seconds", "kv_bytes", "frames", "pictures_decoded")
        found = {name: getattr(self, name) for name in (*names, "bytes_read", "recipe", "model")}
        return found | {"timeline": self.timeline.as_list()}


def default_recipe(loaded: LoadedModel, media: Media | None = None) -> Recipe:
    """A quarter of what is seen by VFlowOpt; for what is only heard, half the cache by PLPHP.

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
    streamer: Any = None,
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
    if group is not None:
        from tokenprune.session.session import watch_and_ask  # which imports this module

        chosen = default_recipe(loaded) if chosen is None else chosen
        return watch_and_ask(
            loaded,
            path,
            question,
            chosen,
            max_new_tokens,
            streamer,
            group=group,
            frames=frames,
            fps=fps,
            sound=sound,
        )
    media = read_media(path, loaded, frames=frames, fps=fps, sound=sound)
    chosen = default_recipe(loaded, media) if chosen is None else chosen
    return answer(loaded, media, question, chosen, max_new_tokens, streamer)


def answer(
    loaded: LoadedModel,
    media: Media,
    question: str,
    recipe: Recipe,
    max_new_tokens: int = 64,
    streamer: Any = None,
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
    held = loaded.adapter.placeholders(inputs["input_ids"], inputs.get("mm_token_type_ids"))
    if not any(map(torch.any, held.values())):
        raise UnsupportedModelError(
            f"the chat template of {loaded.name} wrote a prompt without a place for the file; "
            "use a checkpoint whose template knows such files"
        )
    length = inputs["input_ids"].shape[1]
    seen = loaded.frame_seconds(media.video)
    with torch.inference_mode(), prune(loaded.model, recipe, frame_seconds=seen) as report:
        output = loaded.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
        )
    words = loaded.processor.batch_decode(output[:, length:], skip_special_tokens=True)[0]
    video = media.video
    timings = Timings(0.0, 0.0) if video is None else video.timings
    seconds = {
        "index": timings.index_seconds,
        "decode": timings.decode_seconds,
        "per_token": 0.0,
        **report.seconds,
    }
    spans = {
        "decode": [(clock.of_host(begin), clock.of_host(end)) for begin, end in timings.effort],
        "process": [(clock.of_host(began), clock.of_host(processed))],
        **report.spans(clock),
    }
    return Answer(
        answer=words.strip(),
        media_tokens=report.media_tokens,
        seconds={
            name: seconds[name] for name in ("index", "decode", "encode", "prefill", "per_token")
        },
        kv_bytes=report.kv_bytes,
        frames=len(media.frames),
        recipe=str(recipe),
        model=loaded.name,
        report=report,
        pictures=loaded.visible(media),
        timeline=Timeline((spans,)).from_start(),
        pictures_decoded=0 if video is None else video.pictures_decoded,
        bytes_read=0 if video is None else video.bytes_read,
        columns=loaded.columns(media),
    )


def numbers(answers: Sequence[Answer]) -> list[tuple[str, list[str]]]:
    """What answers cost, row by row: its name, and a cell for each answer."""
    sites = list(dict.fromkeys(site for one in answers for site in one.media_tokens["per_site"]))
    decoded = [
        ("  decoded", [f"{one.pictures_decoded} pictures" for one in answers]),
        ("  read", [_size(one.bytes_read) for one in answers]),
    ]
    return [
        ("frames", [str(one.frames) for one in answers]),
        *(decoded if any(one.bytes_read for one in answers) else []),
        ("media tokens", [str(one.media_tokens["before"]) for one in answers]),
        *(
            (f"  after {site}", [_left(one.media_tokens["per_site"].get(site)) for one in answers])
            for site in sites
        ),
        ("  in the cache", [str(one.media_tokens["after"]) for one in answers]),
        ("KV cache", [_size(one.kv_bytes["after"]) for one in answers]),
        *(
            (f"{name.replace('_', ' ')} seconds", [f"{one.seconds[name]:.3f}" for one in answers])
            for name in ("index", "decode", "encode", "prefill", "per_token")
        ),
    ]


def _left(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens:g}"


def _size(count: int) -> str:
    return f"{count / 2**10:.0f} KiB" if count < 10 * 2**20 else f"{count / 2**20:.1f} MiB"
