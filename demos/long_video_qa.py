"""A page in the browser: give a video, ask, see the answer and what pruning saved."""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import typer
from transformers import TextIteratorStreamer

from tokenprune.asking import answer, default_recipe
from tokenprune.core.recipe import Recipe
from tokenprune.demos.first_run import sample_video
from tokenprune.errors import MediaError, MissingExtraError, TokenPruneError
from tokenprune.inputs import read_media
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media
from tokenprune.report.answer import Answer, numbers

if TYPE_CHECKING:
    import gradio
    from PIL.Image import Image

__all__ = ["build", "serve"]

RECIPES = (
    "vflowopt(keep=0.25)",
    "vflowopt(keep=0.1)",
    "vflowopt(keep=0.25) + plphp(keep=0.5)",
    "plphp(keep=0.5)",
    "uniform(keep=0.25)",
    "random(keep=0.25)",
    "none",
)
LONGEST_ANSWER = 128  # tokens
MOST_FRAMES = 256
INTRODUCTION = """# Long-video questions with pruned tokens
{model} answers a question about a video while most of its visual tokens are dropped."""
# No web fonts: the page works without a network.
FONTS = {
    "font": ["Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
    "font_mono": ["Menlo", "Consolas", "monospace"],
}
CSS = """
#numbers table {width: 100%; margin: 0}
#numbers table, #numbers tr {border: 0 !important}
#numbers th, #numbers td {padding: 3px 10px; border-width: 0 0 1px 0; border-color: #ddd}
#numbers td:first-child {white-space: pre}
"""

Shown = tuple[str, str, str, "Image | None"]  # both answers, the numbers, the picture


def serve(model: str | None, *, host: str, port: int) -> None:
    """Serve the page until it is interrupted.

    Raises:
        MissingExtraError: gradio is absent or broken.
        TokenPruneError: The model cannot be loaded, or the port cannot be used.
    """
    gr = _gradio()
    typer.echo("loading the model", err=True)
    page = build(load_model(model))
    try:
        page.launch(
            server_name=host,
            server_port=port,
            theme=gr.themes.Default(**FONTS),
            css=CSS,
            allowed_paths=[str(_sample_folder())],
            footer_links=[],
            show_error=True,
            ssr_mode=False,
        )
    except OSError as error:
        raise TokenPruneError(
            f"cannot serve on {host}:{port}: {error}; choose another --host or --port"
        ) from error


def build(loaded: LoadedModel, folder: Path | None = None) -> gradio.Blocks:
    """The page for a model.

    Args:
        loaded: The model.
        folder: Where the sample video is kept; by default in the user's cache.

    Raises:
        MissingExtraError: gradio is absent or broken.
    """
    gr = _gradio()
    jobs = _Jobs(loaded, folder or _sample_folder())
    with gr.Blocks(title="tokenprune", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION.format(model=loaded.name))
        with gr.Row():
            with gr.Column(scale=4):
                video = gr.Video(label="Video", sources=["upload"], height=260)
                sample = gr.Button("Use the sample video", size="sm")
                question = gr.Textbox(label="Question", placeholder="What happens?")
                recipe = gr.Dropdown(
                    _recipes(loaded),
                    label="Recipe",
                    info="Choose one, or write your own.",
                    allow_custom_value=True,
                )
                frames = gr.Slider(1, MOST_FRAMES, 64, step=1, label="Frames")
                compare = gr.Checkbox(label="Compare with the unpruned model")
                press = gr.Button("Ask", variant="primary")
                known = gr.Dataset(
                    label="Questions about the sample video, and the truth",
                    components=[gr.Textbox(visible=False), gr.Textbox(visible=False)],
                    headers=["question", "truth"],
                    samples=[],
                    samples_per_page=9,
                    visible=False,
                )
            with gr.Column(scale=5):
                pruned = gr.Textbox(label="Answer", lines=2, interactive=False)
                unpruned = gr.Textbox(
                    label="Answer without pruning", lines=2, interactive=False, visible=False
                )
                table = gr.Markdown(elem_id="numbers")
                gr.Markdown("**Kept tokens**: the darker a cell, the fewer layers and heads see it")
                picture = gr.Image(
                    show_label=False,
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],
                )
        alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        asked = [video, question, recipe, frames, compare]
        shown = [pruned, unpruned, table, picture]
        progress = {"show_progress_on": pruned, **alone}
        press.click(jobs.ask, asked, shown, api_name="ask", **progress)
        question.submit(jobs.ask, asked, shown, api_visibility="private", **progress)
        sample.click(jobs.sample, None, [video, question, known], api_name="sample", **alone)
        compare.change(
            lambda on: gr.update(visible=on), compare, unpruned, api_visibility="private"
        )
        known.click(lambda row: row[0], known, question, api_visibility="private")
        for changed in (video.upload, video.clear):
            changed(lambda: gr.update(visible=False), None, known, api_visibility="private")
    return page


class _Jobs:
    """What the buttons do. A model follows one recipe at a time: jobs wait for each other."""

    def __init__(self, loaded: LoadedModel, folder: Path) -> None:
        self._loaded = loaded
        self._folder = folder
        self._lock = Lock()
        # Further questions about a video do not read it again.
        self._read: Callable[[str, int], Media] = functools.lru_cache(maxsize=1)(
            lambda path, frames: read_media(path, loaded, frames=frames)
        )

    def sample(self) -> tuple[str, str, Any]:
        """The sample video, a question about it, and what is known about it."""
        gr = _gradio()
        if not (self._folder / "sample.json").exists():
            gr.Info("The sample video is written once; that takes up to a minute.")
        with _errors_on_page():
            path, questions = sample_video(self._folder)
        rows = [[one["question"], one["answer"]] for one in questions]
        return str(path), rows[0][0], gr.update(samples=rows, visible=True)

    def ask(
        self, path: str | None, question: str, recipe: str, frames: int, compare: bool
    ) -> Iterator[Shown]:
        """The answer as it grows, then the numbers and the picture."""
        yield "", "", "", None
        with _errors_on_page():
            if path is None:
                raise MediaError("there is no video; upload one, or use the sample video")
            chosen = Recipe.parse(recipe or "none")
            media = self._read(path, int(frames))
            if compare:  # seconds are compared after a warm-up
                self._answer(media, question, chosen, 2)
            texts = ["", ""]
            found: list[Answer] = []
            for column, one in enumerate((chosen, Recipe()) if compare else (chosen,)):
                for part in self._stream(media, question, one):
                    if isinstance(part, Answer):
                        found.append(part)
                        part = part.answer
                    texts[column] = part
                    yield texts[0], texts[1], "", None
            drawn = found[0].overlay() if len(media.frames) else None
            yield texts[0], texts[1], _table(found), drawn

    def _stream(self, media: Media, question: str, recipe: Recipe) -> Iterator[str | Answer]:
        """An answer's words so far, again and again; in the end the answer."""
        streamer = TextIteratorStreamer(
            self._loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )

        def work() -> Answer:
            try:
                return self._answer(media, question, recipe, LONGEST_ANSWER, streamer)
            finally:  # also after an error, or the page would wait forever
                streamer.on_finalized_text("", stream_end=True)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            text = ""
            for part in streamer:
                text += part
                yield text
            yield future.result()

    def _answer(
        self,
        media: Media,
        question: str,
        recipe: Recipe,
        longest: int,
        streamer: TextIteratorStreamer | None = None,
    ) -> Answer:
        # A page that was closed leaves its last job running: the next one waits here.
        with self._lock:
            return answer(self._loaded, media, question, recipe, longest, streamer)


def _table(found: list[Answer]) -> str:
    """The numbers as a Markdown table."""
    heads = ["", "pruned", "unpruned"][: 1 + len(found)]
    rows = [heads, ["---", *("--:" for _ in found)]]
    rows += [[name.strip(), *cells] for name, cells in numbers(found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _recipes(loaded: LoadedModel) -> list[str]:
    return list(dict.fromkeys([str(default_recipe(loaded)), *RECIPES]))


def _sample_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tokenprune"


@contextmanager
def _errors_on_page() -> Iterator[None]:
    """Show what the user can mend; other errors pass, and gradio shows those with a traceback."""
    try:
        yield
    except TokenPruneError as error:
        shown = html.escape(str(error), quote=False)
        raise _gradio().Error(shown, print_exception=False) from error


def _gradio() -> Any:
    try:
        import gradio
    except Exception as error:  # absent, or broken in whatever way
        raise MissingExtraError(
            'the page needs gradio: pip install "tokenprune-mm[demo]"'
        ) from error
    return gradio
