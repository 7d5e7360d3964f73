"""The first run: questions about a generated sample video, asked with and without pruning."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tokenprune.asking import answer
from tokenprune.core.recipe import Recipe
from tokenprune.core.site import Cache, Site
from tokenprune.errors import MediaError, TokenPruneError
from tokenprune.inputs import read_media
from tokenprune.media import Video
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media
from tokenprune.report.answer import Answer

__all__ = ["first_run", "pick_questions", "sample_video"]

RECIPE = "vflowopt(keep=0.25) + plphp(keep=0.5)"
FRAMES = 64
SECONDS, SEED = 180, 7
KINDS = ("color", "after", "count", "needle")
WIDTH = 100
COLUMNS = "{:<10}{:<20}{:<30}{:>9}{:>10}{:>10}{:>11}"


def sample_video(folder: Path) -> tuple[Path, list[dict[str, str]]]:
    """The sample video in a folder, written if it is not there yet.

    Returns:
        Its path, and what is known about it: `question`, `answer` and `kind` of each question.

    Raises:
        MediaError: The folder cannot be written to.
    """
    video, truth = folder / "sample.mp4", folder / "sample.json"
    if not (video.exists() and truth.exists()):  # the questions are written last
        from tokenprune.eval.mini.sample import write_sample

        typer.echo(f"writing {video}, once; this takes up to a minute", err=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_sample(video, seconds=SECONDS, seed=SEED)
        except OSError as error:
            raise MediaError(f"cannot write {video}: {error}; choose another folder") from error
    questions: list[dict[str, str]] = json.loads(truth.read_text())
    return video, questions


def pick_questions(questions: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first question of each of `KINDS`; one whose answer is not "zero", if there is one."""
    picked = []
    for kind in KINDS:
        alike = [one for one in questions if one["kind"] == kind]
        telling = [one for one in alike if one["answer"] != "zero"]
        picked += (telling or alike)[:1]
    return picked


def first_run(folder: Path, model: str | None = None) -> None:
    """Ask four questions about the sample video in `folder`, and print what pruning saved.

    Raises:
        TokenPruneError: The model cannot be loaded, or the video cannot be read.
    """
    video, questions = sample_video(folder)
    picked = pick_questions(questions)
    typer.echo("loading the model", err=True)
    loaded = load_model(model)
    typer.echo("reading the video", err=True)
    media = read_media(video, loaded, frames=FRAMES)
    _, pruned = _answer_both(loaded, media, picked[0]["question"], longest=2)  # a warm-up
    typer.echo(_heading(video, media, loaded, pruned))
    runs: list[tuple[Answer, Answer]] = []
    for number, asked in enumerate(picked, 1):
        typer.echo(f"asking {number} of {len(picked)}", err=True)
        runs.append(_answer_both(loaded, media, asked["question"]))
        typer.echo(_block(number, asked, *runs[-1]))
    typer.echo(_summary([one["answer"] for one in picked], runs))
    kept = folder / "kept.png"
    runs[0][1].report.overlay(media.frames).save(kept)
    typer.echo(f"The frames, dark where tokens were dropped (question 1): {kept}")


def _answer_both(
    loaded: LoadedModel, media: Media, question: str, longest: int = 32
) -> tuple[Answer, Answer]:
    """The answer without pruning, and the one with."""
    unpruned = answer(loaded, media, question, Recipe(), longest)
    return unpruned, answer(loaded, media, question, Recipe(RECIPE), longest)


def _heading(video: Path, media: Media, loaded: LoadedModel, pruned: Answer) -> str:
    lines = [f"video         {video}"]
    if isinstance(media.video, Video):
        info, timings = media.video.info, media.video.timings
        lines[0] += f": {info.duration_seconds:.0f} seconds, {info.width}x{info.height}"
        lines.append(
            f"frames        {len(media.frames)}, read once: packet index "
            f"{timings.index_seconds:.2f} s, decoding {timings.decode_seconds:.2f} s"
        )
    sites = " > ".join(f"after {site}" for site in _before_cache(pruned))
    return "\n".join(
        [
            *lines,
            f"model         {loaded.name}",
            f"recipe        {RECIPE}",
            f"media tokens  made by the encoder > {sites}{' > ' if sites else ''}in the KV cache",
        ]
    )


def _block(number: int, asked: dict[str, str], unpruned: Answer, pruned: Answer) -> str:
    """One question: the truth, both answers, and what they cost."""
    head = ("", "answer", "media tokens", "KV cache", "encoding", "prefill", "per token")
    return "\n".join(
        [
            f"\n{number}. {asked['question']}  ({asked['kind']})",
            COLUMNS.format(*head),
            f"{'truth':<10}{asked['answer']}",
            _line("unpruned", unpruned),
            _line("pruned", pruned),
        ]
    )


def _line(name: str, one: Answer) -> str:
    tokens, seconds = one.media_tokens, one.seconds
    path = [tokens.before, *_before_cache(one).values(), tokens.after]
    return COLUMNS.format(
        name,
        textwrap.shorten(one.answer, 19, placeholder=" ..."),
        " > ".join(f"{left:g}" for left in path),
        f"{one.kv_bytes.after / 1024:.0f} KiB",
        *(f"{spent:.3f} s" for spent in (seconds.encode, seconds.prefill, seconds.per_token)),
    )


def _before_cache(one: Answer) -> dict[Site, float]:
    """Tokens that each site let through, caches left aside."""
    sites = one.media_tokens.per_site
    return {site: left for site, left in sites.items() if not isinstance(site, Cache)}


def _summary(truths: list[str], runs: list[tuple[Answer, Answer]]) -> str:
    """How many answers were right, and what was saved over all of them."""
    unpruned, pruned = map(list, zip(*runs, strict=True))

    def right(answers: list[Answer]) -> int:
        return sum(one.answer == truth for one, truth in zip(answers, truths, strict=True))

    def share(measure: Callable[[Answer], float]) -> str:
        return f"{sum(map(measure, pruned)) / sum(map(measure, unpruned)):.0%}"

    return "\n" + textwrap.fill(
        f"Right: {right(pruned)} of {len(truths)} with pruning, {right(unpruned)} without. Pruned, "
        f"the cache held {share(lambda one: one.media_tokens.after)} of the media tokens and "
        f"took {share(lambda one: one.kv_bytes.after)} of the bytes; prefill took "
        f"{share(lambda one: one.seconds.prefill or 0.0)} of the time, encoding "
        f"{share(lambda one: one.seconds.encode or 0.0)}.",
        WIDTH,
    )


def main(
    folder: Annotated[Path, typer.Argument(help="Where the video and the picture go.")],
    model: Annotated[str | None, typer.Option(help="Another model, by name or folder.")] = None,
) -> None:
    """Ask four questions about a generated video, with and without pruning."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    first_run(folder, model)


if __name__ == "__main__":
    try:
        typer.run(main)
    except TokenPruneError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
