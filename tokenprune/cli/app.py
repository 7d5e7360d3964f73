"""The command line: verbs, progress on stderr, exit code 2 for what the user can mend."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from tokenprune.errors import MediaError, TokenPruneError

if TYPE_CHECKING:
    from tokenprune.report.answer import Answer

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Prune the visual and audio tokens that multimodal language models do not need.",
    pretty_exceptions_enable=False,
)

Model = Annotated[str | None, typer.Option(help="Hub name, folder, or built-in model.")]
Frames = Annotated[int | None, typer.Option(help="Frames, evenly spread.", show_default="64")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Timeline = Annotated[
    Path | None, typer.Option(help="Picture of when what was decoded and computed.")
]
RECIPE_HELP = "Such as 'vflowopt(keep=0.1) + plphp(keep=0.4)'; 'none' prunes nothing."


def main() -> None:
    """Run the command line."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except TokenPruneError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


@app.command()
def ask(
    file: Annotated[
        Path, typer.Argument(help="A video, an image, a sound, or what `watch` has saved.")
    ],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Model = None,
    recipe: Annotated[str | None, typer.Option(help=RECIPE_HELP)] = None,
    frames: Frames = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, instead.")] = None,
    group: Annotated[
        int | None,
        typer.Option(help="Frames to prefill at once, while the next ones are decoded."),
    ] = None,
    sound: Annotated[
        bool, typer.Option(help="Hear a video's sound track, with a model that sees and hears.")
    ] = True,
    compare: Annotated[bool, typer.Option("--compare", help="Ask without pruning too.")] = False,
    overlay: Annotated[Path | None, typer.Option(help="Picture of the kept tokens.")] = None,
    timeline: Timeline = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Answer a question about a file, with pruned tokens, and say what that saved."""
    from tokenprune.asking import answer, default_recipe, watch_and_ask
    from tokenprune.core.recipe import Recipe
    from tokenprune.media.index.container import check_file
    from tokenprune.media.sampling import check_amount
    from tokenprune.models.loading import check_question, load_model, read_media
    from tokenprune.report.answer import table
    from tokenprune.report.pictures import check_chart, check_picture, save_picture
    from tokenprune.session.session import check_session

    # A large model takes minutes to load: what can be known before is said before.
    check_file(file)
    check_question(question)
    if max_new_tokens < 1:
        raise TokenPruneError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if file.suffix == ".safetensors":
        settled: dict[str, object] = {"recipe": recipe, "frames": frames, "fps": fps}
        settled |= {"group": group, "overlay": overlay, "timeline": timeline}
        given = [f"--{name}" for name, value in settled.items() if value is not None]
        if given := given + ["--compare"] * compare:
            raise TokenPruneError(
                f"{str(file)!r} was watched already, without its frames: leave out "
                f"{' and '.join(given)}, or ask about the video itself"
            )
        _ask_saved(file, question, model, max_new_tokens, as_json)
        return
    if frames is not None and fps is not None:
        raise MediaError(f"give --frames or --fps, got both ({frames} and {fps})")
    check_amount(frames, fps)
    if overlay is not None:
        check_picture(overlay)
    if timeline is not None:
        check_picture(timeline)
        check_chart()
    chosen = None if recipe is None else Recipe.parse(recipe)
    if group is not None:
        _check_group(group, overlay)
        check_session(chosen or Recipe())
    with tqdm(total=3, bar_format="{desc}", leave=False, disable=as_json) as progress:
        progress.set_description_str("loading the model")
        loaded = load_model(model)
        run: Callable[[Recipe, int], Answer]
        if group is None:
            progress.set_description_str("reading the file")
            media = read_media(file, loaded, frames=frames, fps=fps, sound=sound)
            chosen = default_recipe(loaded, media) if chosen is None else chosen
            if overlay is not None and not len(media.frames):
                raise MediaError(f"an overlay needs frames, but {str(file)!r} was only heard")
            run = partial(answer, loaded, media, question)
        else:
            chosen = default_recipe(loaded) if chosen is None else chosen
            ask_watching = partial(watch_and_ask, group=group, frames=frames, fps=fps, sound=sound)
            run = partial(ask_watching, loaded, file, question)
        progress.set_description_str("answering")
        if compare:  # seconds are compared after a warm-up
            run(chosen, min(2, max_new_tokens))
        found = [run(chosen, max_new_tokens)]
        if compare:
            found.append(run(Recipe(), max_new_tokens))
    if overlay is not None:
        save_picture(found[0].overlay(), overlay)
    if timeline is not None:
        found[0].timeline.save(timeline)
    if as_json:
        output = found[0].as_dict()
        if compare:
            output["unpruned"] = found[1].as_dict()
        typer.echo(json.dumps(output))
        return
    typer.echo(table(found))
    if overlay is not None:
        typer.echo(f"kept tokens: {overlay}", err=True)
    if timeline is not None:
        typer.echo(f"timeline: {timeline}", err=True)


@app.command("plan")
def plan_file(
    file: Annotated[Path, typer.Argument(help="A video, an image, or a sound.")],
    model: Model = None,
    recipe: Annotated[str | None, typer.Option(help=RECIPE_HELP)] = None,
    frames: Frames = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, instead.")] = None,
    group: Annotated[
        int | None, typer.Option(help="Frames to prefill at once, as `ask` and `watch` do.")
    ] = None,
    sound: Annotated[bool, typer.Option(help="Hear a video's sound track, as `ask` does.")] = True,
    question: Annotated[str, typer.Option(help="What will be asked.")] = "What happens?",
    as_json: Json = False,
) -> None:
    """Say what a recipe will save on a file, without loading weights."""
    from tokenprune.plan.planning import plan

    if frames is not None and fps is not None:
        raise MediaError(f"give --frames or --fps, got both ({frames} and {fps})")
    if group is not None:
        _check_group(group, None)
    settled: dict[str, Any] = {"frames": frames, "fps": fps, "group": group, "sound": sound}
    planned = plan(file, model, recipe=recipe, question=question, **settled)
    typer.echo(json.dumps(planned.as_dict()) if as_json else str(planned))


def _check_group(group: int, overlay: Path | None) -> None:
    if group < 1:
        raise TokenPruneError(f"--group must be at least 1, got {group}")
    if overlay is not None:
        raise TokenPruneError(
            "an overlay needs all frames, but groups are let go once they are watched: leave out "
            "--overlay or --group"
        )


def _ask_saved(
    file: Path, question: str, model: str | None, max_new_tokens: int, as_json: bool
) -> None:
    from tokenprune.models.loading import load_model
    from tokenprune.report.answer import table
    from tokenprune.session.file import read_header
    from tokenprune.session.session import Session

    name = read_header(file)["model"]
    with tqdm(total=3, bar_format="{desc}", leave=False, disable=as_json) as progress:
        progress.set_description_str("loading the model")
        loaded = load_model(model or name)
        progress.set_description_str("reading the file")
        with Session.load(file, loaded.model, loaded.processor, name=loaded.name) as session:
            progress.set_description_str("answering")
            found = session.ask(question, max_new_tokens=max_new_tokens)
    typer.echo(json.dumps(found.as_dict()) if as_json else table([found]))


@app.command("watch")
def watch_video(
    video: Annotated[Path, typer.Argument(help="A video.")],
    save: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    model: Model = None,
    recipe: Annotated[str | None, typer.Option(help=RECIPE_HELP)] = None,
    frames: Frames = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, instead.")] = None,
    group: Annotated[int, typer.Option(help="Frames that are prefilled at once.")] = 8,
    timeline: Timeline = None,
    as_json: Json = False,
) -> None:
    """Watch a video once, without its sound, and save what is kept, for `ask` to answer about."""
    from tokenprune.asking import default_recipe
    from tokenprune.core.recipe import Recipe
    from tokenprune.media.index.container import check_file
    from tokenprune.media.sampling import check_amount
    from tokenprune.models.loading import load_model
    from tokenprune.report.pictures import check_chart, check_picture
    from tokenprune.session.file import check_path
    from tokenprune.session.session import Session, check_session

    check_file(video)
    check_path(save)
    if timeline is not None:
        check_picture(timeline)
        check_chart()
    if frames is not None and fps is not None:
        raise MediaError(f"give --frames or --fps, got both ({frames} and {fps})")
    check_amount(frames, fps)
    chosen = None if recipe is None else Recipe.parse(recipe)
    if chosen is not None:
        check_session(chosen)
    with tqdm(total=3, bar_format="{desc}", leave=False, disable=as_json) as progress:
        progress.set_description_str("loading the model")
        loaded = load_model(model)
        chosen = default_recipe(loaded) if chosen is None else chosen
        name = loaded.name
        with Session(loaded.model, loaded.processor, chosen, group=group, name=name) as session:
            progress.set_description_str("watching")
            session.watch(video, frames=frames, fps=fps)
            progress.set_description_str("saving")
            session.save(save)
            if timeline is not None:
                session.timeline.save(timeline)
            found = json.dumps(session.as_dict()) if as_json else str(session)
    typer.echo(found)
    typer.echo(f"saved: {save}", err=True)
    if timeline is not None:
        typer.echo(f"timeline: {timeline}", err=True)


@app.command("decode")
def decode_video(
    file: Annotated[Path, typer.Argument(help="A video.")],
    frames: Frames = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, instead.")] = None,
    start: Annotated[float | None, typer.Option(help="Seconds where to begin.")] = None,
    end: Annotated[float | None, typer.Option(help="Seconds where to end.")] = None,
    size: Annotated[str | None, typer.Option(help="Height and width, such as 224x384.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads.", show_default="all cores")] = None,
    out: Annotated[Path | None, typer.Option(help="An .npy file, or a folder for PNGs.")] = None,
    as_json: Json = False,
) -> None:
    """Decode frames of a video, and write them."""
    from tokenprune.media import VideoReader
    from tokenprune.media.sampling import parse_size
    from tokenprune.media.save import decode_to

    if frames is not None and fps is not None:
        raise MediaError(f"give --frames or --fps, got both ({frames} and {fps})")
    wanted = None if size is None else parse_size(size)
    reader = VideoReader(file, workers=workers)
    found = decode_to(reader, out, frames=frames, fps=fps, start=start, end=end, size=wanted)
    typer.echo(json.dumps(found.as_dict()) if as_json else str(found))


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(help="MP4 to write; questions go beside it as JSON.")],
    seconds: Annotated[float, typer.Option(help="Length.")] = 180.0,
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 7,
) -> None:
    """Write a video of the generated world, with questions and true answers."""
    from tokenprune.eval.mini.sample import write_sample

    try:
        questions = write_sample(out, seconds=seconds, seed=seed)
    except (ValueError, OSError) as error:
        raise MediaError(f"cannot write a sample to {str(out)!r}: {error}") from error
    typer.echo(
        f"{out}: {seconds:g} seconds, {len(questions)} questions in {out.with_suffix('.json')}"
    )


@app.command("eval")
def evaluate(
    task: Annotated[str, typer.Option(help="What to measure on.")] = "mini-video",
    frames: Annotated[int, typer.Option(help="Frames of each video.")] = 64,
    samples: Annotated[int, typer.Option(help="Questions.")] = 500,
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 1,
    recipe: Annotated[list[str] | None, typer.Option(help=RECIPE_HELP)] = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a model under recipes, on held-out questions."""
    from tokenprune.core.recipe import Recipe
    from tokenprune.eval.run import check_run, evaluate_recipes
    from tokenprune.models.loading import load_model

    recipes = [Recipe.parse(text) for text in recipe or ["none"]]
    check_run(task, frames=frames, samples=samples, seed=seed)
    loaded = load_model(model)
    for result in evaluate_recipes(
        loaded, recipes, task=task, frames=frames, samples=samples, seed=seed
    ):
        typer.echo(json.dumps(result.as_dict()) if as_json else str(result))


@app.command("convert")
def convert_checkpoint(
    family: Annotated[str, typer.Argument(help="What the checkpoint is of: longva.")],
    folder: Annotated[Path, typer.Argument(help="Its original checkpoint.")],
    out: Annotated[Path | None, typer.Argument(help="Folder to write [FOLDER-converted].")] = None,
    tower: Annotated[Path | None, typer.Option(help="Checkpoint of its vision tower.")] = None,
) -> None:
    """Write a checkpoint that transformers does not know as one that it does."""
    from tokenprune.models.convert import find_converter

    convert = find_converter(family)
    out = folder.with_name(f"{folder.resolve().name}-converted") if out is None else out
    convert(folder, out, tower)
    typer.echo(f"{out}: use it with --model {out}")


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """List methods and model families."""
    from tokenprune.adapters.base import list_models
    from tokenprune.core.registry import list_methods
    from tokenprune.models import built_in_models

    methods = {name: (cls.__doc__ or "").splitlines()[0] for name, cls in list_methods().items()}
    models, built_in = list(list_models()), list(built_in_models())
    if as_json:
        typer.echo(json.dumps({"methods": methods, "models": models, "built_in": built_in}))
        return
    width = max(map(len, methods))
    lines = [f"  {name:<{width}}  {what}" for name, what in methods.items()]
    typer.echo("\n".join(["methods", *lines, "models", f"  {', '.join(models)}"]))
    typer.echo(f"built-in models\n  {', '.join(built_in)}")


@app.command()
def demo(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 7860,
) -> None:
    """Serve a page that answers questions about a video."""
    from tokenprune.demos.long_video_qa import serve

    serve(model, host=host, port=port)
