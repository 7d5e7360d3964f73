"""`plan`: what a recipe will save on a file, told before any weights are loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch

from tokenprune.answering import default_recipe
from tokenprune.engine import Patch
from tokenprune.flops import prefill_flops
from tokenprune.forecast import Forecast, Prompt, forecast
from tokenprune.loading import LoadedModel, Media, check_question, load_outline, read_media
from tokenprune.media import SizeRule, Timings, Video, index_video
from tokenprune.media.files import check_file
from tokenprune.media.sample import check_amount, choose_ranks, resolve_size
from tokenprune.recipe import Recipe
from tokenprune.report import KVBytes, MediaTokens
from tokenprune.stage import EncoderStage

__all__ = ["Plan", "PlannedStage", "PrefillFlops", "plan"]

QUESTION = "What happens?"


class PrefillFlops(TypedDict):
    """Operations of the language model's prefill: unpruned, and pruned."""

    before: float
    after: float


@dataclass(frozen=True)
class PlannedStage:
    """One stage, and what a recipe that ended with it would cost.

    Attributes:
        method: Its name.
        site: Where it acts.
        media_tokens: Tokens that it lets through, at caches the mean over layers.
        prefill_flops: Operations of the prefill.
        kv_bytes: Bytes of the cache at the end of prefill.
        exact: Whether `media_tokens` is certain. If not, it is what the stage aims at, and what
            follows from it is as uncertain.
    """

    method: str
    site: str
    media_tokens: float
    prefill_flops: float
    kv_bytes: int
    exact: bool


@dataclass(frozen=True)
class Plan:
    """What a recipe will save on a file.

    Attributes:
        media_tokens: As `ask` reports them, if the plan is exact.
        prefill_flops: See `tokenprune.flops`.
        kv_bytes: Of the cache at the end of prefill, for a question of the same length.
        exact: Whether all counts are fixed by settings and sizes.
        adaptive: Who decides on counts while the model runs: names of methods, and "processor"
            for one that leaves out what it finds repeated.
        stages: Stage by stage.
        frames: Frames that the model is given.
        recipe: The recipe, as text.
        model: Name of the model.
    """

    media_tokens: MediaTokens
    prefill_flops: PrefillFlops
    kv_bytes: KVBytes
    exact: bool
    adaptive: tuple[str, ...]
    stages: tuple[PlannedStage, ...]
    frames: int
    recipe: str
    model: str

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)

    def __str__(self) -> str:
        tokens, flops, size = self.media_tokens, self.prefill_flops, self.kv_bytes
        rows = [("", "media tokens", "prefill", "KV cache")]
        rows.append(_row("unpruned", tokens["before"], flops["before"], size["before"], True))
        for one in self.stages:
            name = f"{one.method} at {one.site}"
            rows.append(_row(name, one.media_tokens, one.prefill_flops, one.kv_bytes, one.exact))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"recipe  {self.recipe}", f"frames  {self.frames}", ""]
        for first, *cells in rows:
            aligned = (f"{cell:>{w}}" for cell, w in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([f"{first:<{widths[0]}}", *aligned]).rstrip())
        if self.adaptive:
            lines += ["", f"~ about: decided by what is seen or heard ({', '.join(self.adaptive)})"]
        return "\n".join(lines)


def plan(
    path: str | Path,
    model: str | None = None,
    *,
    recipe: Recipe | str | None = None,
    frames: int | None = None,
    fps: float | None = None,
    sound: bool = True,
    question: str = QUESTION,
) -> Plan:
    """Say what a recipe will save on a file: from sizes, without weights, frames not decoded.

    It is a plan for asking about all frames at once. With `group` a share of each group is kept,
    which may round to other counts.

    A sound is decoded, because containers do not tell its length to the sample.

    Args:
        path: A video, an image, or a sound.
        model: As `load_model` takes it.
        recipe: What to prune; None for the default one.
        frames: Frames to take from a video, evenly spread; 64 if `fps` is not given either.
        fps: Frames per second to take from a video.
        sound: Whether a model that both sees and hears is given a video's sound track as well.
        question: In words; its length counts for operations and bytes.

    Raises:
        TokenPruneError: As `ask`, for what shows before the model runs.
    """
    check_file(path)
    check_question(question)
    check_amount(frames, fps)
    chosen = None if recipe is None else Recipe(recipe)
    loaded = load_outline(model)
    # A processor of images wants pixels, if only black ones.
    reader = partial(_outline_video, device="meta" if loaded.watches else "cpu")
    media = read_media(path, loaded, frames=frames, fps=fps, sound=sound, reader=reader)
    chosen = default_recipe(loaded, media) if chosen is None else chosen
    # Checks the recipe against the model; it is never entered.
    stages = Patch(loaded.model, chosen, "original").stages
    acting = [stage for stage in stages if not isinstance(stage, EncoderStage)]
    inputs, by_content = _process(loaded, media, question)
    prompt = Prompt.of(loaded.adapter, inputs, loaded.frame_seconds(media.video))
    steps = [forecast(prompt, acting[:count]) for count in range(len(acting) + 1)]
    first, last = steps[0], steps[-1]
    uncertain = [stage.name for stage, sure in zip(acting, last.exact, strict=True) if not sure]
    adaptive = (["processor"] if by_content else []) + uncertain
    return Plan(
        media_tokens=last.call.media_tokens,
        prefill_flops={"before": _flops(loaded, first), "after": _flops(loaded, last)},
        kv_bytes={"before": first.call.kv_bytes_after, "after": last.call.kv_bytes_after},
        exact=not adaptive,
        adaptive=tuple(dict.fromkeys(adaptive)),
        stages=tuple(
            PlannedStage(
                method=stage.name,
                site=str(stage.site),
                media_tokens=last.left[number],
                prefill_flops=_flops(loaded, steps[number + 1]),
                kv_bytes=steps[number + 1].call.kv_bytes_after,
                exact=last.exact[number] and not by_content,
            )
            for number, stage in enumerate(acting)
        ),
        frames=len(media.frames),
        recipe=str(chosen),
        model=loaded.name,
    )


def _row(
    name: str, tokens: float, flops: float, size: int, exact: bool
) -> tuple[str, str, str, str]:
    """Cells of one line of the table."""
    count = f"{tokens:g}" if exact else f"~{tokens:g}"
    return name, count, f"{flops / 1e9:,.1f} GFLOP", f"{size / 2**20:,.1f} MiB"


def _flops(loaded: LoadedModel, step: Forecast) -> float:
    return prefill_flops(loaded.model, step.rows)


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
    ranks = choose_ranks(
        index, frames=frames, fps=fps, indices=None, seconds=None, start=None, end=None
    )
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
