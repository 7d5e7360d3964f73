"""`Session`: watch a video once, in groups of frames, and ask many questions about it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenprune._version import __version__
from tokenprune.core.recipe import Recipe
from tokenprune.core.stage import Method
from tokenprune.engine.cache import CACHE_NAME, CACHE_NAMES
from tokenprune.engine.patch import Patch
from tokenprune.engine.rollback import Bookmark, cache_from_state, cache_state
from tokenprune.errors import MediaError, RecipeError, TokenPruneError, UnsupportedModelError
from tokenprune.media.decode.pool import WorkerKind
from tokenprune.models.loading import LoadedModel, check_question
from tokenprune.report.answer import Answer
from tokenprune.report.report import KVBytes, MediaTokens, Report, total
from tokenprune.report.timeline import Timeline
from tokenprune.report.timing import Clock
from tokenprune.session.file import check_identity, check_path, identity, read, write
from tokenprune.session.script import Pace, Script, Tokens
from tokenprune.session.turns import Turn, takes_a_turn
from tokenprune.session.watcher import WatchedGroup, Watcher

__all__ = ["Session", "check_session", "check_watches"]

_RESERVED = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", *CACHE_NAMES)


class Session:
    """Watches a video group by group, prunes each group, and answers questions on what is kept.

    ```python
    session = Session(model, processor, VFlowOpt(keep=0.1))
    session.watch("match.mp4", fps=1)
    print(session.ask("Who scores first?").answer)
    print(session.ask("And who scores last?").answer)  # nothing is watched again
    ```

    Frames go through the encoder and the language model as they arrive, and only the pruned cache
    stays, so memory is bounded by a group and by what is kept. With an empty recipe an answer is
    that of one `generate` over the whole video. Each question starts from the watched video alone:
    questions know nothing of each other. Between calls the model carries no hooks, and several
    sessions may share it, one call at a time. A session may be used from several threads: a call
    waits until the one before it has returned. While a session is at work, what would use the model
    otherwise, another session or `prune`, is refused.

    A session watches: the sound track of a video is left out. Budgets are of each group: a share
    is the same as over the video, a count is per group. Stages that depend on the question are
    refused, for there is none yet, and so are those that weigh the whole video at once.

    Args:
        model: A model of a supported family that takes videos or images.
        processor: Its processor, with a chat template.
        recipe: What to prune; "none" prunes nothing.
        group: Frames that are prefilled at once.
        name: What to call the model in answers and files; None for its own name.

    Attributes:
        recipe: What is pruned.

    Raises:
        RecipeError: The recipe cannot be followed group by group.
        UnsupportedModelError: The model cannot be pruned, or takes sound only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        recipe: Recipe | Method | str,
        *,
        group: int = 8,
        name: str | None = None,
    ) -> None:
        self.recipe = Recipe(recipe)
        self._loaded = LoadedModel(model, processor, name or str(model.name_or_path or "model"))
        check_session(self.recipe)
        check_watches(self._loaded)
        self._patch = Patch(model, self.recipe, "original")
        self._report = self._patch.report  # during a question the patch fills another
        self._watcher = Watcher(self._loaded, self._patch, group)
        self._closed = False
        self._turn = Turn()

    # -- what can be asked of it at any time

    @property
    def report(self) -> Report:
        """Layouts and decisions of each group, as `prune` reports them; empty after `load`."""
        return self._report

    @property
    def groups(self) -> list[WatchedGroup]:
        """What became of each group, in order."""
        return list(self._watcher.groups)

    @property
    def frames(self) -> int:
        """Frames watched, those included that wait for their group to fill."""
        return self._watcher.frames

    @property
    def media_tokens(self) -> MediaTokens:
        """Media tokens of all groups, before and after."""
        return total([group.media_tokens for group in self.groups])

    @property
    def kv_bytes(self) -> KVBytes:
        """Bytes of the cache that is kept: unpruned, and as measured."""
        groups = self._watcher.groups
        return groups[-1].kv_bytes if groups else {"before": 0, "after": 0}

    @property
    def timeline(self) -> Timeline:
        """When each group was decoded, processed, encoded and prefilled."""
        return Timeline(tuple(group.spans for group in self._watcher.groups))

    @property
    def pictures_decoded(self) -> int:
        """Pictures that came out of decoders: the frames watched, and those they are built on."""
        return self._watcher.pictures_decoded

    @property
    def bytes_read(self) -> int:
        """Bytes of video packets that were read from files."""
        return self._watcher.bytes_read

    def as_dict(self) -> dict[str, Any]:
        """What was watched and what it cost, group by group."""
        groups = [asdict(group) for group in self._watcher.groups]
        return {
            "frames": self.frames,
            "media_tokens": self.media_tokens,
            "kv_bytes": self.kv_bytes,
            "pictures_decoded": self.pictures_decoded,
            "bytes_read": self.bytes_read,
            "recipe": str(self.recipe),
            "model": self._loaded.name,
            "groups": [{k: v for k, v in group.items() if k != "spans"} for group in groups],
            "timeline": self.timeline.as_list(),
        }

    def __str__(self) -> str:
        tokens, size, groups = self.media_tokens, self.kv_bytes, self._watcher.groups
        spent = [
            f"{name} {sum(getattr(group, f'{name}_seconds') for group in groups):.3f}"
            for name in ("decode", "process", "encode", "prefill")
        ]
        mebibytes = [f"{size[when] / 2**20:.1f} MiB" for when in ("before", "after")]
        lines = [
            f"recipe        {self.recipe}",
            f"frames        {self.frames} in {len(groups)} groups",
            f"decoded       {self.pictures_decoded} pictures, {self.bytes_read / 2**20:.1f} MiB",
            f"media tokens  {tokens['before']} -> {tokens['after']}",
            f"KV cache      {' -> '.join(mebibytes)}",
            f"seconds       {', '.join(spent)}",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Session({self._loaded.name}, {self.recipe}, {self.frames} frames)"

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

        Frames of a file are decoded while those before them are prefilled, at most three groups
        ahead: decoding waits for a model that is slow. Frames that are given
        wait until a group is full; a question, `save` and a file do not wait. All frames of a
        session are one clip at one rate and size: later ones are brought to the size of the first.

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
        if not isinstance(source, Tensor):
            self._watcher.watch_file(source, frames, fps, workers, worker_kind)
            return self._watcher.groups[before:]
        of_files = {"frames": frames, "workers": workers, "worker_kind": worker_kind}
        if given := [f"{name}={value!r}" for name, value in of_files.items() if value is not None]:
            raise MediaError(
                f"{' and '.join(given)} go with a file; leave them out and give the frames you want"
            )
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

        Raises:
            TokenPruneError: Nothing was watched, or the question has no words.
        """
        if max_new_tokens < 1:
            raise TokenPruneError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        prompt = self._prompt(question)
        report = self._patch.report = Report(str(self.recipe))
        report.calls.extend(self._report.calls)
        settings = {"do_sample": False, **settings}
        settings |= {"max_new_tokens": max_new_tokens, "streamer": streamer}
        try:
            output = self._generate(prompt, settings)
        finally:
            self._patch.report = self._report
        sequences = output if isinstance(output, Tensor) else output.sequences
        # Of several answers the first one is the best.
        words = self._loaded.processor.batch_decode(
            sequences[:1, len(prompt) :], skip_special_tokens=True
        )[0]
        nothing = dict.fromkeys(("index", "decode", "encode", "prefill", "per_token"), 0.0)
        return Answer(
            answer=words.strip(),
            media_tokens=self.media_tokens,
            seconds={**nothing, **report.turn_seconds},
            kv_bytes=self.kv_bytes,
            frames=self.frames,
            recipe=str(self.recipe),
            model=self._loaded.name,
            report=report,
            pictures=torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
            timeline=self.timeline,
            pictures_decoded=self.pictures_decoded,
            bytes_read=self.bytes_read,
        )

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
        return self._generate(self._prompt(question), settings)

    def _prompt(self, question: str) -> Tokens:
        self._check_open()
        check_question(question)
        self._watcher.flush()
        told, script = self._watcher.told, self._watcher.script
        if told is None or script is None:
            raise TokenPruneError("nothing was watched yet; call watch() before you ask")
        return told.then(script.suffix(question))

    def _generate(self, prompt: Tokens, settings: dict[str, Any]) -> Any:
        cache, model = self._watcher.cache, self._loaded.model
        assert cache is not None
        if taken := sorted(set(settings) & set(_RESERVED)):
            raise TokenPruneError(
                f"{' and '.join(taken)} belong to the session; leave them out, or use `prune`"
            )
        if settings.get("use_cache") is False:
            raise TokenPruneError(
                "use_cache=False would forget what was watched; leave it out, or use `prune`"
            )
        rows = _rows(model, settings)
        mark = Bookmark(cache, whole=rows > 1)
        try:
            if rows > 1:  # `generate` repeats its inputs, but not a cache that it is given
                cache.batch_repeat_interleave(rows)
            with torch.no_grad(), self._patch:
                output: Any = model.generate(
                    input_ids=prompt.ids,
                    attention_mask=torch.ones_like(prompt.ids),
                    position_ids=self._watcher.positions(prompt),
                    **{CACHE_NAME: cache},
                    **prompt.types,
                    **settings,
                )
        finally:
            mark.restore()
        if getattr(output, CACHE_NAME, None) is not None:
            setattr(output, CACHE_NAME, None)  # it is the session's, and back at its old length
        return output

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
        self._watcher.flush()
        watcher = self._watcher
        told, cache, script, pace = watcher.told, watcher.cache, watcher.script, watcher.pace
        if told is None or cache is None or script is None or pace is None:
            raise TokenPruneError("nothing was watched yet; call watch() before you save")
        tensors, state = cache_state(cache)
        inputs = {"ids": told.ids, **told.types, **told.media}
        tensors |= {f"told.{name}": torch.as_tensor(one) for name, one in inputs.items()}
        header = {
            "version": __version__,
            "model": self._loaded.name,
            "identity": identity(self._loaded.model),
            "recipe": str(self.recipe),
            "group": watcher.group,
            "groups": [asdict(group) for group in watcher.groups],
            "cache": state,
            "types": list(told.types),
            "pace": asdict(pace),
            "size": watcher.size,
            "sized": watcher.sized,
            "source_frames": watcher.source_frames,
            "counted": watcher.counted,
            "pictures_decoded": watcher.pictures_decoded,
            "bytes_read": watcher.bytes_read,
            "script": script.as_dict(),
        }
        write(path, tensors, header)
        return path

    @classmethod
    def load(
        cls, path: str | Path, model: PreTrainedModel, processor: Any, *, name: str | None = None
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
        check_identity(path, header["identity"], model)
        session = cls(
            model,
            processor,
            header["recipe"],
            group=header["group"],
            name=name or header["model"],
        )
        watcher = session._watcher
        height, width = header["size"]
        watcher.size, watcher.sized = (height, width), header["sized"]
        watcher.pace = Pace(**header["pace"])
        watcher.script = Script(session._loaded, watcher.size, watcher.sized, watcher.pace)
        if watcher.script.as_dict() != header["script"]:
            raise TokenPruneError(
                f"{str(path)!r} was saved with a processor that writes prompts otherwise; load the "
                "same processor, or watch the video again"
            )
        watcher.check_positions(watcher.script)
        inputs = {
            name.removeprefix("told."): one.to(model.device)
            for name, one in tensors.items()
            if name.startswith("told.")
        }
        types = {name: inputs.pop(name) for name in header["types"]}
        watcher.told = Tokens(inputs.pop("ids"), types, inputs)
        language_model: Any = session._patch.adapter.language_model
        state = header["cache"]
        watcher.cache = cache_from_state(language_model.config, tensors, state, model.device)
        watcher.source_frames = header["source_frames"]
        items, canvases, frames = header["counted"]
        watcher.counted = items, canvases, frames
        watcher.pictures_decoded = header["pictures_decoded"]
        watcher.bytes_read = header["bytes_read"]
        watcher.groups = [WatchedGroup(**group) for group in header["groups"]]
        watcher.clock = Clock(language_model, at=_end(watcher.groups))
        return session

    # -- the end

    @takes_a_turn
    def close(self) -> None:
        """Free the cache. The model is as it was before the session, as between all calls."""
        self._closed = True
        self._watcher.forget()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TokenPruneError("this session is closed; make a new one, or load a saved one")


def check_session(recipe: Recipe) -> None:
    """Check that a recipe can be followed group by group.

    Raises:
        RecipeError: It asks for the question, or for the whole video.
    """
    for method in recipe.methods:
        if method.text_dependent:
            raise RecipeError(
                f"{method.name} decides by the question, but a session prunes before there is one; "
                "use a method that reads the media only, such as vflowopt"
            )
        if method.joint:
            raise RecipeError(
                f"{method.name} weighs a whole video at once, but a session sees only groups; "
                "use it with `prune`, or a method that decides within a group, such as vflowopt"
            )


def _end(groups: list[WatchedGroup]) -> float:
    """When the last of what was timed ended."""
    spans = [span for group in groups for phase in group.spans.values() for span in phase]
    return max((end for _, end in spans), default=0.0)


def check_watches(loaded: LoadedModel) -> None:
    """Check that a model sees.

    Raises:
        UnsupportedModelError: It understands sound only.
    """
    if not set(loaded.adapter.modalities) - {"audio"}:
        raise UnsupportedModelError(
            f"{loaded.name} understands sound only, and a session watches; use `prune`"
        )


def _rows(model: Any, settings: dict[str, Any]) -> int:
    """Rows that `generate` makes of one prompt."""
    config = settings.get("generation_config") or model.generation_config
    names = ("num_beams", "num_return_sequences")
    return max(settings.get(name) or getattr(config, name, None) or 1 for name in names)
