"""A prefill run on tokens without content: what a recipe leaves, as far as that is fixed before.

The order of events and the bookkeeping are the engine's own (`Forward`), so counts cannot drift
from it. Only stages are replaced: one that looks at nothing but the layout decides as it
will; for any other, tokens stand in that are as many as it is going to keep.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.adapters.base import Adapter, MediaCall
from tokenprune.core.group import Group
from tokenprune.core.recipe import Step
from tokenprune.engine.cache import adopt, new_cache
from tokenprune.engine.forward import Forward
from tokenprune.engine.laid import LaidPrompt, parts_of
from tokenprune.engine.parts import PartedPrompt, PartsDone
from tokenprune.engine.prompt import Given
from tokenprune.engine.prompt import Prompt as MediaPrompt
from tokenprune.engine.schedule import Schedule
from tokenprune.plan.blank import BlankStage, Known
from tokenprune.report.report import Call

__all__ = ["Forecast", "Prompt", "forecast", "forecast_all"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the processor wrote it.

    Attributes:
        adapter: Of the model, whose parameters need no data.
        inputs: What the processor made; `input_ids` `[1, S]` on the CPU.
        calls: The encoder calls that the model will make.
        frame_seconds: When frames are shown, as `lay_out` takes it.
        takes_back: Tokens at the end of the prompt before it that are forgotten for this one.
        continues: Whether its clip goes on with that of the prompt before.
        more: Whether another prompt goes on with its clip, or asks about it.
    """

    adapter: Adapter
    inputs: dict[str, Any]
    calls: list[MediaCall]
    frame_seconds: list[Tensor] | None = None
    takes_back: int = 0
    continues: bool = False
    more: bool = False

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


def forecast(prompt: Prompt, steps: Sequence[Step], group: Group | None = None) -> Forecast:
    """Run the stages of a recipe on a prompt without content.

    Raises:
        TokenPruneError: As the prefill would.
    """
    return forecast_all([prompt], steps, group)[0]


def forecast_all(
    prompts: Sequence[Prompt], steps: Sequence[Step], group: Group | None = None
) -> list[Forecast]:
    """Run the stages of a recipe on prompts that follow each other in one cache.

    Raises:
        TokenPruneError: As the prefill would.
    """
    config: Any = prompts[0].adapter.language_model.config
    stored = new_cache(config)
    adopt(stored, prompts[0].adapter.shape.layers)
    return [_forecast(prompt, steps, stored, group) for prompt in prompts]


def _forecast(
    prompt: Prompt, steps: Sequence[Step], stored: Cache, group: Group | None
) -> Forecast:
    adapter, ids = prompt.adapter, prompt.inputs["input_ids"]
    known = Known()
    blank = [BlankStage(step.stage, known) for step in steps]
    if prompt.takes_back:
        stored.crop(-prompt.takes_back)
    earlier = [_indices(layer) for layer in stored.layers]
    numbered = [Step(step.number, one) for step, one in zip(steps, blank, strict=True)]
    schedule = Schedule(adapter, numbered, group=group)
    given = Given(frame_seconds=prompt.frame_seconds, continues=prompt.continues, more=prompt.more)
    past = adopt(stored, adapter.shape.layers).end
    media = MediaPrompt(ids, prompt.calls, prompt.inputs, given)
    laid = LaidPrompt.of(schedule, media, past)
    parted = PartedPrompt(laid, parts_of(laid, group, adapter, past))
    rows: list[list[Tensor]] = [[] for _ in stored.layers]
    if len(parted.bounds) == 1:
        forward = Forward(schedule, stored, 1, laid.length, ids.device, given)
        call = _prefill(forward, laid, stored, known, rows)
    else:
        done = PartsDone(parted, adopt(stored, adapter.shape.layers), 1)
        for part in parted.parts(schedule, given):
            length = part.stop - part.start
            forward = Forward(part.schedule, stored, 1, length, ids.device, part.given)
            call = _prefill(forward, part.laid, stored, known, rows)
            done.add(call, forward.flight, torch.zeros(1, 1, 0))
        call = done.join(prompt.continues)
    width = adapter.shape.head_width * adapter.model.dtype.itemsize
    call.kv_bytes_before *= width
    call.kv_bytes_after *= width
    means, exact = [one.mean for one in blank], [one.exact for one in blank]
    return Forecast(call, [torch.cat(one) for one in rows], earlier, means, exact)


def _prefill(
    forward: Forward, part: LaidPrompt, stored: Cache, known: Known, rows: list[list[Tensor]]
) -> Call:
    """Run one part of a prompt; the rows in each layer are added to `rows`."""
    hidden = torch.zeros(1, part.length, 0)
    forward.begin({"inputs_embeds": hidden}, part)
    heads = forward.schedule.adapter.shape.kv_heads
    for number, layer in enumerate(stored.layers):
        narrowed = forward.enter_layer(number, hidden)
        hidden = hidden if narrowed is None else narrowed
        rows[number].append(forward.flight.rows[0])
        # One byte for each key and each value: what is really stored is counted, then scaled.
        entries = torch.zeros(1, heads, len(rows[number][-1]), 1, dtype=torch.uint8)
        layer.update(entries, entries)
        with known.unchanged():  # the next layer's cache starts from the same tokens
            forward.after_attention(number, layer)
    call = forward.finish()
    assert call is not None
    forward.sequence.stop()
    return call


def _indices(layer: Any) -> Tensor:
    """Logical indices `[E]` of the keys of a layer; heads hold equally many."""
    index: Tensor = layer.index[0, 0]
    return index
