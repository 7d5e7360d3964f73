"""A prefill run on tokens without content: what a recipe leaves, as far as that is fixed before.

The order of events and the bookkeeping are the engine's own (`Forward`), so counts cannot drift
from it. Only stages are replaced: one that looks at nothing but the layout decides as it
will; for any other, tokens stand in that are as many as it is going to keep.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.adapters.base import Adapter, MediaCall
from tokenprune.core.context import CacheContext, Context
from tokenprune.core.layout import TokenLayout
from tokenprune.core.selection import Selection
from tokenprune.core.selectors import allocate, uniform_per_group
from tokenprune.core.stage import Stage
from tokenprune.engine.cache import adopt, new_cache
from tokenprune.engine.forward import Forward
from tokenprune.engine.prompt import Prompt as MediaPrompt
from tokenprune.engine.schedule import Schedule
from tokenprune.report.report import Call

__all__ = ["Forecast", "Prompt", "forecast", "forecast_all"]

_COARSER: dict[str, frozenset[str]] = {
    "token": frozenset({"token", "frame", "second", "item", "prompt"}),
    "frame": frozenset({"frame", "item", "prompt"}),
    "second": frozenset({"second", "item", "prompt"}),
    "item": frozenset({"item", "prompt"}),
    "prompt": frozenset({"prompt"}),
    "nothing": frozenset(),
}
"""If it is known how many tokens are left of each such group, then of each of these too."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the processor wrote it.

    Attributes:
        adapter: Of the model, whose parameters need no data.
        inputs: What the processor made; `input_ids` `[1, S]` on the CPU.
        calls: The encoder calls that the model will make.
        frame_seconds: When frames are shown, as `Adapter.layouts` takes it.
        takes_back: Tokens at the end of the prompt before it that are forgotten for this one.
    """

    adapter: Adapter
    inputs: dict[str, Any]
    calls: list[MediaCall]
    frame_seconds: list[Tensor] | None = None
    takes_back: int = 0

    @classmethod
    def of(
        cls, adapter: Adapter, inputs: dict[str, Any], frame_seconds: list[Tensor] | None = None
    ) -> Prompt:
        """A prompt with these inputs; a model gives them to its encoders by their names."""
        encoders = adapter.encoders()
        # A method may serve a kind of media that has none of its own.
        alone = [kind for kind in adapter.modalities if kind not in encoders.values()]
        calls = []
        for path, modality in encoders.items():
            below, _, name = path.rpartition(".")
            encode = getattr(adapter.base_model.get_submodule(below), name)
            # Older releases of transformers do not name the sizes.
            names = [*inspect.signature(encode).parameters, f"{modality}_sizes"]
            for kind in [modality, *alone]:
                given = {name: _given(name, inputs, kind) for name in names}
                arguments = {name: value for name, value in given.items() if value is not None}
                if any(_is_content(value) for value in arguments.values()):
                    what = adapter.modality(modality, arguments, inputs)
                    calls.append(MediaCall(what, arguments))
        return cls(adapter, inputs, calls, frame_seconds)


def _given(name: str, inputs: dict[str, Any], kind: str) -> Any:
    """The input that goes to a parameter of an encoder of this kind of media."""
    if name != "pixel_values":
        return inputs.get(name)
    # Families, and releases of transformers, differ in what they call these.
    own = inputs.get(f"{name}_{kind}s")
    return inputs.get(name) if own is None and kind == "image" else own


def _is_content(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass
class Forecast:
    """What stages leave of a prompt.

    Attributes:
        call: The record that a report will hold, with stand-ins for what is not known before.
        rows: For each decoder layer `[S]`, logical indices of the tokens in it.
        earlier: For each decoder layer `[E]`, those of the keys that it held before.
        left: For each stage the tokens it keeps: at a cache the mean over layers.
        exact: For each stage whether that number is certain.
    """

    call: Call
    rows: list[Tensor]
    earlier: list[Tensor]
    left: list[float]
    exact: list[bool]


def forecast(prompt: Prompt, stages: Sequence[Stage]) -> Forecast:
    """Run the stages of a recipe on a prompt without content.

    Raises:
        TokenPruneError: As the prefill would.
    """
    return forecast_all([prompt], stages)[0]


def forecast_all(prompts: Sequence[Prompt], stages: Sequence[Stage]) -> list[Forecast]:
    """Run the stages of a recipe on prompts that follow each other in one cache.

    Raises:
        TokenPruneError: As the prefill would.
    """
    config: Any = prompts[0].adapter.language_model.config
    stored = new_cache(config)
    adopt(stored, prompts[0].adapter.shape.layers)
    return [_forecast(prompt, stages, stored) for prompt in prompts]


def _forecast(prompt: Prompt, stages: Sequence[Stage], stored: Cache) -> Forecast:
    adapter, ids = prompt.adapter, prompt.inputs["input_ids"]
    length = ids.shape[1]
    known = _Known()
    blind: list[Any] = [_BlindStage(stage, known) for stage in stages]
    if prompt.takes_back:
        stored.crop(-prompt.takes_back)
    earlier = [_indices(layer) for layer in stored.layers]
    forward = Forward(Schedule(adapter, blind), stored, 1, length, ids.device)
    hidden = torch.zeros(1, length, 0)
    media = MediaPrompt(ids, prompt.calls, prompt.inputs, prompt.frame_seconds)
    forward.begin({"inputs_embeds": hidden}, media)
    rows = []
    for number, layer in enumerate(stored.layers):
        narrowed = forward.enter_layer(number, hidden)
        hidden = hidden if narrowed is None else narrowed
        rows.append(forward.flight.rows[0])
        # One byte for each key and each value: what is really stored is counted, then scaled.
        entries = torch.zeros(1, adapter.shape.kv_heads, len(rows[-1]), 1, dtype=torch.uint8)
        layer.update(entries, entries)
        here = known.left
        forward.after_attention(number, layer)
        known.left = here  # the next layer's cache starts from the same tokens
    call = forward.finish()
    assert call is not None
    forward.clock.stop()
    width = adapter.shape.head_width * adapter.model.dtype.itemsize
    call.kv_bytes_before *= width
    call.kv_bytes_after *= width
    means, exact = [one.mean for one in blind], [one.exact for one in blind]
    return Forecast(call, rows, earlier, means, exact)


def _indices(layer: Any) -> Tensor:
    """Logical indices `[E]` of the keys of a layer; heads hold equally many."""
    index: Tensor = layer.index[0, 0]
    return index


@dataclass
class _Known:
    """Of which groups it is known how many tokens are left; shared by the stages of a recipe."""

    left: str = "token"


@dataclass
class _BlindStage:
    """Stands in for a stage where there is no content to look at.

    Attributes:
        stage: The stage.
        known: What earlier stages leave, updated as this one acts.
        kept: Tokens kept, each time it acted.
        exact: Whether all of these are certain.
    """

    stage: Stage
    known: _Known
    kept: list[int] = field(default_factory=list)
    exact: bool = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    @property
    def mean(self) -> float:
        return round(sum(self.kept) / len(self.kept), 2) if self.kept else 0.0

    def counts(self, layout: TokenLayout) -> None:
        """No promise: every selection is to be made here."""

    def select(self, context: Context | CacheContext) -> Selection:
        layout = context.layout
        rows = context.rows if isinstance(context, CacheContext) else None
        here = layout if rows is None else layout[rows[0]]
        promised = self.stage.counts(here)
        per = getattr(self.stage, "per", "token")
        if per == "item" and bool((here.item == here.item[0]).all()):
            per = "prompt"
        certain = promised is not None and per in _COARSER[self.known.left]
        self.exact = self.exact and certain
        try:
            selection = self.stage.select(_blindfold(context))
            left = self.known.left if self.known.left == "token" else per
        except _NeedsContent:
            selection = self._stand_in(layout, rows, promised, here)
            left = per if per != "token" else "prompt"
        if promised == len(here) and certain:
            left = self.known.left
        self.known.left = left if certain else "nothing"
        self.kept.append(selection.index.shape[-1])
        return Selection(selection.index)

    def _stand_in(
        self, layout: TokenLayout, rows: Tensor | None, promised: int | None, here: TokenLayout
    ) -> Selection:
        """Evenly spread tokens, as many of each group as the stage keeps."""
        stage: Any = self.stage
        if promised is not None and hasattr(stage, "per"):
            budget = allocate(stage.keep, stage.per, layout, rows)
        else:
            budget = allocate(stage.expects(here), "prompt", layout, rows)
        return Selection(uniform_per_group(budget))


_CONTENT = ("features", "encoder_map", "keys", "values", "attention")


class _NeedsContent(Exception):
    """A stage asked for what only a run can show."""


def _refuse(*_: object) -> NoReturn:
    raise _NeedsContent


def _blindfold(context: Any) -> Any:
    """The same context without content."""
    kind = type(context)
    blind = type(f"Blind{kind.__name__}", (kind,), {name: property(_refuse) for name in _CONTENT})
    seen: Any = object.__new__(blind)
    vars(seen).update({k: v for k, v in vars(context).items() if k not in _CONTENT})
    return seen
