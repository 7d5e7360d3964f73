"""`tokenprune ask`: a question about a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.checks import check_frames, check_group, check_outputs, parse_recipe
from tokenprune.cli.options import Fps, Frames, Group, Json, Model, RecipeText, Sound, Timeline
from tokenprune.cli.output import note_files, progress
from tokenprune.errors import MediaError, TokenPruneError

if TYPE_CHECKING:
    from tokenprune.asking import Source
    from tokenprune.core.recipe import Recipe
    from tokenprune.report.answer import Answer

__all__ = ["ask"]


def ask(
    file: Annotated[
        Path, typer.Argument(help="A video, an image, a sound, or what `watch` has saved.")
    ],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Model = None,
    recipe: RecipeText = None,
    frames: Frames = None,
    fps: Fps = None,
    group: Group = None,
    sound: Sound = True,
    compare: Annotated[bool, typer.Option("--compare", help="Ask without pruning too.")] = False,
    overlay: Annotated[Path | None, typer.Option(help="Picture of the kept tokens.")] = None,
    timeline: Timeline = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Answer a question about a file, and say what pruning saved."""
    # Torch takes seconds to import and a large model minutes to load: errors that can be known
    # before either are told first.
    if max_new_tokens < 1:
        raise TokenPruneError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    from tokenprune.media.local import check_source
    from tokenprune.models.prompts import check_question

    check_source(file)
    check_question(question)
    if file.suffix == ".safetensors":
        settled: dict[str, object] = {"recipe": recipe, "frames": frames, "fps": fps}
        settled |= {"group": group, "overlay": overlay, "timeline": timeline}
        settled |= {"compare": compare or None}
        _refuse(file, [f"--{name}" for name, value in settled.items() if value is not None])
        _ask_saved(file, question, model, max_new_tokens, as_json)
        return
    check_frames(frames, fps)
    check_group(group, overlay)
    from tokenprune.asking import open_source
    from tokenprune.models.load import load_model

    check_outputs(overlay, timeline)
    chosen = parse_recipe(recipe, in_groups=group is not None)
    with progress(quiet=as_json) as tell:
        tell("loading the model")
        loaded = load_model(model)
        tell("reading the file")
        source = open_source(loaded, file, frames=frames, fps=fps, group=group, sound=sound)
        if overlay is not None and source.media is not None and not len(source.media.frames):
            raise MediaError(f"an overlay needs frames, but {str(file)!r} was only heard")
        tell("answering")
        found = _answer(source, question, chosen, max_new_tokens, compare)
    if overlay is not None:
        from tokenprune.report.pictures import save_picture

        save_picture(found[0].overlay(), overlay)
    if timeline is not None:
        found[0].timeline.save(timeline)
    _show(found, as_json)
    if not as_json:
        note_files(kept_tokens=overlay, timeline=timeline)


def _answer(
    source: Source, question: str, recipe: Recipe | None, longest: int, compare: bool
) -> list[Answer]:
    """The answer; to compare, that of the unpruned model as well."""
    from tokenprune.core.recipe import Recipe

    if not compare:
        return [source.ask(question, recipe, longest)]
    source.ask(question, recipe, min(2, longest))  # seconds are compared after a warm-up
    return [source.ask(question, one, longest) for one in (recipe, Recipe())]


def _refuse(file: Path, given: list[str]) -> None:
    """Refuse options that were settled when a session watched."""
    if given:
        raise TokenPruneError(
            f"{str(file)!r} was watched already, without its frames: leave out "
            f"{' and '.join(given)}, or ask about the video itself"
        )


def _ask_saved(file: Path, question: str, model: str | None, longest: int, as_json: bool) -> None:
    """Ask about what a session has saved."""
    from tokenprune.models.load import load_model
    from tokenprune.session.file import read_header
    from tokenprune.session.session import Session

    name = read_header(file)["model"]
    with progress(quiet=as_json) as tell:
        tell("loading the model")
        loaded = load_model(model or name)
        tell("reading the file")
        with Session.load(file, loaded.model, loaded.processor, name=loaded.name) as session:
            tell("answering")
            found = session.ask(question, max_new_tokens=longest)
    _show([found], as_json)


def _show(found: list[Answer], as_json: bool) -> None:
    from tokenprune.report.answer import table

    if not as_json:
        typer.echo(table(found))
        return
    output = found[0].as_dict()
    if len(found) > 1:
        output["unpruned"] = found[1].as_dict()
    typer.echo(json.dumps(output))
