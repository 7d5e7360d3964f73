"""`Session`: watch a video once, in groups of frames, and ask many questions about it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenprune._version import __version__
from tokenprune.adapters._wrapped import unwrapped
from tokenprune.core.recipe import Recipe
from tokenprune.core.stage import Method
from tokenprune.engine.patch import Patch
from tokenprune.errors import MediaError, TokenPruneError
from tokenprune.media.decode.pool import WorkerKind
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.prompts import check_question
from tokenprune.report.answer import Answer
from tokenprune.report.report import Report
from tokenprune.session.checks import check_session, check_watches, frames_of
from tokenprune.session.file import check_identity, check_path, identity, read, write
from tokenprune.session.question import Question, answer_words, generate_from
from tokenprune.session.summary import Summary
from tokenprune.session.turns import Turn, takes_a_turn
from tokenprune.session.watched import Watched, WatchedGroup
from tokenprune.session.watcher import Watcher

__all__ = ["Session"]


class Session(Summary):
    """Watches a video group by group, prunes each group, and answers questions on what is kept.

    ```python
    session = Session(model, processor, VFlowOpt(keep=0.1))
    session.watch("match.mp4", fps=1)
    print(session.ask("Who scores first?").answer)
    print(session.ask("And who scores last?").answer)  # nothing is watched again
    ```

    Frames go through the encoder and the language model as they arrive, and only the pruned cache
    stays, so memory is bounded by a group and by what is kept. With an empty recipe an answer is
    that of one `generate` over the whole video. Questions know nothing of each other. Between calls
    the model carries no hooks, and several sessions may share it, one call at a time; calls from
    several threads wait for each other. While a session is at work, what would use the model
    otherwise, another session or `prune`, is refused.

    The sound track of a video is left out. Budgets are of each group: a share is the same as over
    the video, a count is per group. Stages that depend on the question act when it is asked (at
    `Cache(after="prefill")`), for it alone, or are refused.

    Args:
        model: A model of a supported family that takes videos or images; or a wrapper of it.
        processor: Its processor, with a chat template.
        recipe: What to prune; "none" prunes nothing.
        group: Frames that are prefilled at once; None for as many as the recipe says, or 8.
        name: What to call the model in answers and files; None for its own name.

    Attributes:
        recipe: What is pruned.

    Raises:
        RecipeError: The recipe cannot be followed group by group.
        UnsupportedModelError: The model cannot be pruned, or takes sound only.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        recipe: Recipe | Method | str,
        *,
        group: int | None = None,
        name: str | None = None,
    ) -> None:
        recipe = Recipe(recipe)
        inner: PreTrainedModel = unwrapped(model)
        self._loaded = LoadedModel(inner, processor, name or str(inner.name_or_path or "model"))
        check_session(recipe)
        check_watches(self._loaded)
        self._patch = Patch(model, recipe, "original")
        self._report = Report(str(recipe))
        group = frames_of(recipe) if group is None else group
        watcher = Watcher(self._loaded, self._patch, self._report, group)
        super().__init__(recipe, self._loaded.name, watcher)
        self._asked: Report | None = None
        self._closed = False
        self._turn = Turn()

    @property
    def report(self) -> Report:
        """Layouts and decisions of each group, as `prune` reports them; empty after `load`."""
        return self._report

    @property
    def asked(self) -> Report | None:
        """Of the last question: what was decided when watching, and for it alone."""
        return self._asked

    # -- watching

    @takes_a_turn
    def watch(
        self,
        source: str | os.PathLike[str] | Tensor,
        *,
        frames: int | None = None,
        fps: float | None = None,
        workers: int | None = None,
        worker_kind: WorkerKind | None = None,
    ) -> list[WatchedGroup]:
        """Watch a video file, or frames as they arrive; may be called again and again.

        Frames of a file are decoded up to three groups ahead. Frames that are given wait for a full
        group, but not if a question, `save` or a file comes. All frames of a session are one clip
        at one rate, resized to the first one's size.

        Args:
            source: A video file, or frames `[F, 3, H, W]` uint8.
            frames: Frames to take from a file, evenly spread; 64 if `fps` is not given either.
            fps: Frames per second to take from a file; or those of the frames that are given,
                which must be told the first time.
            workers: How many decode a file at a time; None for one on each core we may use.
            worker_kind: "thread" (the default); or "process", if your program runs much Python
                beside the session, for which decoding threads would have to wait.

        Returns:
            What became of the groups that were prefilled by this call.

        Raises:
            MediaError: The file or the frames cannot be used.
            UnsupportedModelError: The model's processor cannot write this video in groups.
        """
        self._check_open()
        before = len(self._watcher.groups)
        of_files = {"frames": frames, "workers": workers, "worker_kind": worker_kind}
        given = [f"{name}={one!r}" for name, one in of_files.items() if one is not None]
        if not isinstance(source, Tensor):
            self._watcher.watch_file(source, frames, fps, workers, worker_kind)
        elif given:
            raise MediaError(
                f"{' and '.join(given)} go with a file; leave them out and give the frames you want"
            )
        else:
            self._watcher.watch_frames(source, fps)
        return self._watcher.groups[before:]

    # -- asking

    @takes_a_turn
    def ask(
        self, question: str, *, max_new_tokens: int = 64, streamer: Any = None, **settings: Any
    ) -> Answer:
        """Answer a question about what was watched; the session stays as it is.

        Args:
            question: In words.
            max_new_tokens: Longest answer.
            streamer: Takes tokens as they come, as in `generate`.
            settings: Of the model's `generate`, such as `num_beams`; decoding is greedy by default.

        Returns:
            The answer. Its seconds are those of the question; those of watching are in `groups`.
        """
        if max_new_tokens < 1:
            raise TokenPruneError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        asked = self._question(question)
        report = Report(str(self.recipe))
        report.calls.extend(self._report.calls)
        settings = {"do_sample": False, **settings}
        settings |= {"max_new_tokens": max_new_tokens, "streamer": streamer}
        self._asked = report
        output = generate_from(asked, self._loaded, self._patch, report, settings)
        return self._answered(answer_words(output, asked, self._loaded), report)

    @takes_a_turn
    def generate(self, question: str, **settings: Any) -> Any:
        """What the model's own `generate` returns for a question; the session stays as it is.

        Args:
            question: In words.
            settings: Of `generate`, but for the prompt and its cache, which are the session's.

        Returns:
            Tokens `[rows, S + T]`, the whole prompt included; or an object with them as
            `sequences`, as `return_dict_in_generate` asks. It holds no cache.

        Raises:
            TokenPruneError: As `ask`; or a setting is the session's own.
        """
        asked, report = self._question(question), Report(str(self.recipe))
        report.calls.extend(self._report.calls)
        self._asked = report
        return generate_from(asked, self._loaded, self._patch, report, settings)

    def _watched(self, what: str) -> Watched:
        """What was watched, with all frames prefilled that waited."""
        self._watcher.flush()
        watched = self._watcher.watched
        if watched is None or not watched.groups:
            raise TokenPruneError(f"nothing was watched yet; call watch() before you {what}")
        return watched

    def _question(self, words: str) -> Question:
        self._check_open()
        check_question(words)
        return Question.about(self._watched("ask"), words)

    # -- files

    @takes_a_turn
    def save(self, path: str | Path) -> Path:
        """Save what was watched, to answer questions about it later or elsewhere.

        Args:
            path: Ends in ".safetensors".

        Raises:
            TokenPruneError: Nothing was watched.
            MediaError: The file cannot be written.
        """
        path = check_path(path)
        self._check_open()
        tensors, state = self._watched("save").state()
        header = {
            "version": __version__,
            "model": self.model_name,
            "identity": identity(self._loaded.model),
            "recipe": str(self.recipe),
            "group": self._watcher.group,
            "watched": state,
        }
        write(path, tensors, header)
        return path

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, processor: Any, *, name: str | None = None
    ) -> Session:
        """A session that goes on where the saved one was: it answers the same, and may watch on.

        Args:
            path: As given to `save`.
            model: The model that watched, with the same weights.
            processor: Its processor.
            name: What to call the model; None for what it was called.

        Raises:
            MediaError: The file is damaged, or none that `save` wrote.
            TokenPruneError: It was saved with another model, other weights or another processor.
        """
        tensors, header = read(path)
        check_identity(path, header["identity"], unwrapped(model))
        name = name or header["model"]
        session = cls(model, processor, header["recipe"], group=header["group"], name=name)
        try:
            watched = Watched.from_state(session._loaded, tensors, header["watched"])
        except TokenPruneError as error:
            raise TokenPruneError(f"{str(path)!r} cannot be used: {error}") from None
        session._watcher.go_on(watched)
        return session

    # -- the end

    @takes_a_turn
    def close(self) -> None:
        """Free the cache. The model is as it was before the session, as between all calls."""
        self._closed = True
        self._watcher.forget()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TokenPruneError("this session is closed; make a new one, or load a saved one")
