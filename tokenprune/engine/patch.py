"""`prune`: makes an unmodified model follow a recipe.

Outside the decoder layers everything stays logical: `generate`, positions, rope deltas, 2-D masks
and the cache's length see the unpruned sequence. Inside, hidden states and stored keys are short.
One index tensor per place is the bridge, and masks are functions evaluated at those indices.
"""

from __future__ import annotations

import functools
import reprlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenprune.adapters.base import adapter_for
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import Question
from tokenprune.core.stage import Method
from tokenprune.engine.beams import check_beam_media
from tokenprune.engine.hooks import add_hook, shadow, switch_attention
from tokenprune.engine.prompt import Given
from tokenprune.engine.run import Run
from tokenprune.engine.schedule import Schedule, make_schedule
from tokenprune.errors import MediaError, RecipeError, UnsupportedModelError
from tokenprune.report.report import Report

__all__ = ["Patch", "prune"]

_PATCHED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
_ENTERING = threading.Lock()


@contextmanager
def prune(
    model: nn.Module,
    *methods: Method | Recipe | str,
    positions: Literal["original", "compact"] = "original",
    question: str | None = None,
    frames: Sequence[Tensor] | None = None,
    frame_seconds: Sequence[Sequence[float] | Tensor] | None = None,
) -> Iterator[Report]:
    """Make `model` follow a recipe inside the `with` block; afterwards it is as before.

    ```python
    with prune(model, VFlowOpt(keep=0.1)) as report:
        output = model.generate(**inputs, max_new_tokens=64)
    print(report)
    ```

    Args:
        model: A model of a supported family (`tokenprune list`), or a wrapper around one, which
            you go on calling: of PEFT, of `torch.compile`, or DistributedDataParallel.
        methods: Methods, recipes, or recipes as text, applied in this order.
        positions: "original" leaves every token its position in the unpruned sequence. "compact"
            numbers what is left of the input anew, for models with one-dimensional positions.
        question: What is asked, for methods that compare it with frames: the chat template's words
            around it tell them nothing.
        frames: The pictures of each clip (of each image, if the prompt has no clips),
            `[F, 3, H, W]` uint8, for methods that look at pictures and not at features.
        frame_seconds: When the frames of the prompt's clips are shown: for each clip (for each
            image, if the model takes frames as images) the times of the pictures that its
            processor was given. Layouts have them where the model is told no times as numbers,
            as with Qwen3-VL, GLM-4V and VideoLLaMA 3, to which they are words of the prompt;
            without them the seconds of such tokens are nan.

    What is given holds for every prompt with media inside the block.

    Yields:
        The report, which fills as the model runs.

    Raises:
        UnsupportedModelError: The model, or its cache, cannot be pruned.
        RecipeError: The recipe does not fit the model.
        MediaError: `frame_seconds` holds no times, `frames` no pictures, or they do not fit the
            prompt.
    """
    recipe = Recipe(*methods)
    patch = Patch(model, recipe, positions)
    given = Given(
        question=question,
        frames=None if frames is None else _pictures(frames),
        frame_seconds=None if frame_seconds is None else _times(frame_seconds),
    )
    report = Report(str(recipe))
    with patch.run(report, given):
        yield report


class Patch:
    """Puts the hooks of a recipe into a model, and takes them out again.

    Args:
        model: The model.
        recipe: What it is to follow.
        positions: As `prune` takes them.

    Attributes:
        adapter: Of the model.
        schedule: Which stages act where.

    Raises:
        UnsupportedModelError: The model cannot be pruned so.
        RecipeError: The recipe does not fit it.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, positions: str) -> None:
        self.adapter = adapter_for(model)
        self.schedule = make_schedule(self.adapter, recipe, positions)
        self._model = self.adapter.model  # without wrappers

    @contextmanager
    def run(self, report: Report, given: Given | None = None) -> Iterator[Run]:
        """Hooks are in the model inside the `with` block.

        Args:
            report: Is filled as the model runs.
            given: What the caller knows.

        Raises:
            RecipeError: A stage needs what the caller did not give.
            UnsupportedModelError: The model is in use by another patch.
        """
        given = given or Given()
        _check_given(self.schedule, given)
        with ExitStack() as stack:
            self._claim(stack)
            run = Run(self.schedule, report, given)
            self._install(stack, run)
            yield run

    def _claim(self, stack: ExitStack) -> None:
        with _ENTERING:  # two threads may ask for one model
            if self._model in _PATCHED:
                raise UnsupportedModelError(
                    "this model is already inside a `with prune(...)`, or in use by a session; "
                    "put all methods into one recipe, prune(model, first, second), and let "
                    "threads take turns"
                )
            _PATCHED.add(self._model)
        stack.callback(_PATCHED.discard, self._model)

    def _install(self, stack: ExitStack, run: Run) -> None:
        adapter, model = self.adapter, self._model
        language_model: Any = adapter.language_model
        # A flash name would send transformers down paths that do not ask for a mask function.
        name = f"tokenprune_{id(run):x}"
        switch_attention(stack, language_model.config, name, run.layers.attend, run.layers.mask)
        if self.schedule.encoder:
            run.encoders.read_towers(stack)
        for path, modality in adapter.encoders().items():
            shadow(stack, adapter.base_model, path, run.encoders.watch(modality))
        if hasattr(model, "prepare_inputs_for_generation"):
            shadow(stack, model, "prepare_inputs_for_generation", run.check_prepared)
            repeat = functools.partial(check_beam_media, adapter)
            shadow(stack, model, "_expand_inputs_for_generation", repeat)
        if self.schedule.group is not None:
            shadow(stack, language_model, "forward", run.in_parts)
        run.logits.watch(stack)
        before, after = "register_forward_pre_hook", "register_forward_hook"
        add_hook(stack, adapter.base_model, before, run.on_prompt, with_kwargs=True)
        add_hook(stack, language_model, before, run.before_model, with_kwargs=True)
        add_hook(stack, language_model, after, run.after_model, always_call=True)
        for number, layer in enumerate(language_model.layers):
            enter, leave = run.layers.hooks(number)
            add_hook(stack, layer, before, enter, with_kwargs=True)
            add_hook(stack, layer, after, leave)


def _check_given(schedule: Schedule, given: Given) -> None:
    for signal, name in schedule.given.items():
        missing = "question" if isinstance(signal, Question) else "frames"
        if getattr(given, missing) is None:
            raise RecipeError(
                f"{name} needs the {missing}, which only the caller knows; give "
                f"prune(..., {missing}=...)"
            )


def _times(clips: Sequence[Sequence[float] | Tensor]) -> list[Tensor]:
    try:
        found = [torch.as_tensor(one, dtype=torch.float64).cpu() for one in clips]
    except (TypeError, ValueError, RuntimeError):
        found = [torch.zeros(0)]
    if any(one.ndim != 1 or not len(one) or not bool(one.isfinite().all()) for one in found):
        raise MediaError(
            "frame_seconds must hold a list of seconds for each clip, such as [[0.0, 0.5, 1.0]], "
            f"got {reprlib.repr(clips)}"
        )
    return found


def _pictures(clips: Sequence[Tensor]) -> list[Tensor]:
    for one in clips:
        shape = tuple(one.shape) if isinstance(one, Tensor) else None
        if shape is None or len(shape) != 4 or shape[1] != 3 or one.dtype != torch.uint8:
            what = type(one).__name__ if shape is None else f"{one.dtype} {list(shape)}"
            raise MediaError(
                f"frames must hold a uint8 tensor [F, 3, H, W] for each clip, got {what}"
            )
    return list(clips)
