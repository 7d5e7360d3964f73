"""`plan`: what a recipe will save on a file, told before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenprune.asking import default_recipe
from tokenprune.core.recipe import Recipe, Step
from tokenprune.core.site import Site
from tokenprune.engine.patch import Patch
from tokenprune.inputs import check_watchable
from tokenprune.media.local import check_source
from tokenprune.media.sampling import check_amount
from tokenprune.models.load import load_outline
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.prompts import check_question
from tokenprune.plan.flops import prefill_flops
from tokenprune.plan.forecast import Forecast, Prompt, forecast_all
from tokenprune.plan.outline import outline_media, prompt_of, prompts_in_groups
from tokenprune.report.change import Change, MediaTokens, total
from tokenprune.session.checks import check_group, check_session, check_watches

__all__ = ["Plan", "PlannedStage", "plan"]

QUESTION = "What happens?"


@dataclass(frozen=True)
class PlannedStage:
    """One stage, and what a recipe that ended with it would cost.

    Attributes:
        method: Its name.
        site: Where it acts.
        media_tokens: Tokens that it lets through, at caches the mean over layers; those of all
            groups together.
        prefill_flops: Operations of the prefill.
        kv_bytes: Bytes of the cache at the end of prefill.
        exact: Whether `media_tokens` is certain. If not, it is what the stage aims at, and what
            follows from it is as uncertain.
    """

    method: str
    site: Site
    media_tokens: float
    prefill_flops: float
    kv_bytes: int
    exact: bool


@dataclass(frozen=True)
class Plan:
    """What a recipe will save on a file.

    Attributes:
        media_tokens: As `ask` reports them, if the plan is exact.
        prefill_flops: See `tokenprune.plan.flops`.
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
    prefill_flops: Change[float]
    kv_bytes: Change[int]
    exact: bool
    adaptive: tuple[str, ...]
    stages: tuple[PlannedStage, ...]
    frames: int
    recipe: str
    model: str

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "media_tokens": self.media_tokens.as_dict(),
            "prefill_flops": self.prefill_flops.as_dict(),
            "kv_bytes": self.kv_bytes.as_dict(),
            "exact": self.exact,
            "adaptive": self.adaptive,
            "stages": [asdict(one) | {"site": str(one.site)} for one in self.stages],
            "frames": self.frames,
            "recipe": self.recipe,
            "model": self.model,
        }

    def __str__(self) -> str:
        tokens, flops, size = self.media_tokens, self.prefill_flops, self.kv_bytes
        rows = [("", "media tokens", "prefill", "KV cache")]
        rows.append(_row("unpruned", tokens.before, flops.before, size.before, True))
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
    group: int | None = None,
    sound: bool = True,
    question: str = QUESTION,
) -> Plan:
    """Say what a recipe will save on a file: from sizes, without weights, frames not decoded.

    With `group` it is the plan of a session that watches a video group by group, and of `ask` with
    that many frames a group: budgets are of each group, and the cache is that behind the question.

    A sound is decoded, because containers do not tell its length to the sample.

    Args:
        path: A video, an image, or a sound.
        model: As `load_model` takes it.
        recipe: What to prune; None for the default one.
        frames: Frames to take from a video, evenly spread; 64 if `fps` is not given either.
        fps: Frames per second to take from a video.
        group: Frames of a video that are prefilled at once; None for all.
        sound: Whether a model that both sees and hears is given a video's sound track as well.
        question: In words; its length counts for operations and bytes.

    Raises:
        TokenPruneError: As `ask`, for what shows before the model runs.
    """
    check_source(path)
    check_question(question)
    check_amount(frames, fps)
    chosen = None if recipe is None else Recipe(recipe)
    if group is not None:
        check_session(chosen or Recipe())
    loaded = load_outline(model)
    if group is None:
        media = outline_media(path, loaded, frames=frames, fps=fps, sound=sound)
        chosen = default_recipe(loaded, media) if chosen is None else chosen
        steps = Patch(loaded.model, chosen, "original").schedule.steps
        prompt, by_content = prompt_of(loaded, media, question)
        return _plan(loaded, chosen, steps, [prompt], len(media.frames), by_content)
    chosen = default_recipe(loaded) if chosen is None else chosen
    check_watches(loaded)
    patch = Patch(loaded.model, chosen, "original")
    check_group(group, loaded)
    check_watchable(path, loaded, sound=sound)
    prompts, count = prompts_in_groups(loaded, path, question, group=group, frames=frames, fps=fps)
    return _plan(loaded, chosen, patch.schedule.steps, prompts, count)


def _plan(
    loaded: LoadedModel,
    recipe: Recipe,
    acting: Sequence[Step],
    prompts: Sequence[Prompt],
    frames: int,
    by_content: bool = False,
) -> Plan:
    """The plan of prompts that follow each other."""
    walks = [
        forecast_all(prompts, acting[:count], recipe.group) for count in range(len(acting) + 1)
    ]
    first, last = walks[0], walks[-1]
    exact = [all(sure) for sure in zip(*(one.exact for one in last), strict=True)]
    uncertain = [step.stage.name for step, sure in zip(acting, exact, strict=True) if not sure]
    adaptive = (["processor"] if by_content else []) + uncertain
    return Plan(
        media_tokens=total([one.call.media_tokens for one in last]),
        prefill_flops=Change(_flops(loaded, first), _flops(loaded, last)),
        kv_bytes=Change(_kv_bytes(first), _kv_bytes(last)),
        exact=not adaptive,
        adaptive=tuple(dict.fromkeys(adaptive)),
        stages=tuple(
            PlannedStage(
                method=step.stage.name,
                site=step.stage.site,
                media_tokens=round(sum(one.left[number] for one in last), 2),
                prefill_flops=_flops(loaded, walks[number + 1]),
                kv_bytes=_kv_bytes(walks[number + 1]),
                exact=exact[number] and not by_content,
            )
            for number, step in enumerate(acting)
        ),
        frames=frames,
        recipe=str(recipe),
        model=loaded.name,
    )


def _row(
    name: str, tokens: float, flops: float, size: int, exact: bool
) -> tuple[str, str, str, str]:
    """Cells of one line of the table."""
    count = f"{tokens:g}" if exact else f"~{tokens:g}"
    return name, count, f"{flops / 1e9:,.1f} GFLOP", f"{size / 2**20:,.1f} MiB"


def _flops(loaded: LoadedModel, step: Sequence[Forecast]) -> float:
    return sum(prefill_flops(loaded.model, one.rows, one.earlier) for one in step)


def _kv_bytes(step: Sequence[Forecast]) -> int:
    """Of the cache behind the last prompt."""
    return step[-1].call.kv_bytes_after
