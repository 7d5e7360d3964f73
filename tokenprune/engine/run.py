"""One `with prune(...)`: what the hooks of a model call while it runs."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from tokenprune.engine.cache import (
    CACHE_NAME,
    CACHE_NAMES,
    adopt,
    cache_among,
    check_cache,
    new_cache,
)
from tokenprune.engine.encoders import EncoderCalls
from tokenprune.engine.forward import Forward
from tokenprune.engine.labels import LogitRows
from tokenprune.engine.laid import LaidPrompt, holds_media, parts_of
from tokenprune.engine.layers import LayerCalls
from tokenprune.engine.parts import (
    PartedPrompt,
    PartsDone,
    check_parted,
    cut_call,
    with_hidden,
)
from tokenprune.engine.prompt import Given, Prompt
from tokenprune.engine.schedule import Schedule
from tokenprune.report.report import Report
from tokenprune.report.timing import Mark

__all__ = ["Run"]


class Run:
    """What lives from the beginning of a `with prune(...)` to its end.

    Args:
        schedule: Which stages act where.
        report: Is filled as the model runs.
        given: What the caller knows.

    Attributes:
        report: As given.
        encoders: The encoder calls of the prompt at hand.
        logits: Which rows the model's logits are.
        layers: What decoder layers call.
    """

    def __init__(self, schedule: Schedule, report: Report, given: Given) -> None:
        adapter = schedule.adapter
        self._schedule = schedule
        self._given = given
        language_model: Any = adapter.language_model
        self._lm: nn.Module = language_model
        self._config = language_model.config
        self._signature = inspect.signature(language_model.forward)
        self._prompt: dict[str, Any] = {}
        self._started: Mark | None = None
        self._parted: PartedPrompt | None = None
        self.report = report
        self.encoders = EncoderCalls(schedule, report)
        self.logits = LogitRows(adapter)
        self.layers = LayerCalls(report, str(self._config._attn_implementation))

    # -- before the language model

    def check_prepared(self, prepare: Any) -> Any:
        """`generate` makes masks for caches of fixed size before it calls the model: look first."""

        @functools.wraps(prepare)
        def checked(*args: Any, **kwargs: Any) -> Any:
            cache = cache_among(kwargs)
            if cache is not None:
                check_cache(cache)
            return prepare(*args, **kwargs)

        return checked

    def on_prompt(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The base model is called."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._prompt = {**kwargs, "input_ids": ids}
        self.encoders.on_prompt(self._prompt)

    # -- the language model: logical view in

    def before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The language model is called."""
        # (Binding is not for compilers.)
        named = self._signature.bind_partial(*args).arguments if args else {}
        kwargs = {**named, **kwargs}
        cache = self._cache_of(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        kwargs[CACHE_NAME] = cache
        hidden = kwargs.get("inputs_embeds")
        if hidden is None:
            if cache is not None:
                check_cache(cache)  # before the media are encoded, which embedding may do
            hidden = kwargs["inputs_embeds"] = self._schedule.adapter.embed(kwargs)
        batch, length = hidden.shape[:2]
        acts = self._schedule.steps or self._schedule.compact
        if cache is None and acts and kwargs.get("attention_mask") is None:
            # Without cache and mask transformers takes gaps in positions for packed sequences.
            kwargs["attention_mask"] = hidden.new_ones(batch, length, dtype=torch.int64)
        self.layers.forward = self._parted = None
        past = 0 if cache is None else adopt(cache, self._schedule.adapter.shape.layers).end
        laid = self._lay_out(length, hidden.device, past)
        self._started = Mark(self._lm)
        if laid is not None and self._schedule.group is not None:
            bounds = parts_of(laid, self._schedule.group, self._schedule.adapter, past)
            if len(bounds) > 1:
                check_parted(kwargs, cached=cache is not None)
                self._parted = PartedPrompt(laid, bounds)
                return (), kwargs
        self._begin(self._schedule, self._given, kwargs, laid)
        return (), kwargs

    def _begin(
        self, schedule: Schedule, given: Given, kwargs: dict[str, Any], laid: LaidPrompt | None
    ) -> Forward:
        """Begin a forward of the language model with these arguments."""
        hidden, cache = kwargs["inputs_embeds"], kwargs[CACHE_NAME]
        batch, length = hidden.shape[:2]
        forward = Forward(schedule, cache, batch, length, hidden.device, given)
        self.layers.forward = forward
        forward.begin(kwargs, laid)
        return forward

    def in_parts(self, forward: Any) -> Any:
        """The language model's forward, which prefills a prompt in groups part by part."""

        @functools.wraps(forward)
        def parted(*args: Any, **kwargs: Any) -> Any:
            prompt, self._parted = self._parted, None
            if prompt is None:
                return forward(*args, **kwargs)
            return self._prefill_parts(forward, prompt, kwargs)

        return parted

    def _prefill_parts(self, forward: Any, prompt: PartedPrompt, kwargs: dict[str, Any]) -> Any:
        sequence = adopt(kwargs[CACHE_NAME], self._schedule.adapter.shape.layers)
        done, started = PartsDone(prompt, sequence, self.logits.wanted), self._started
        past, output = sequence.end, None
        try:
            for part in prompt.parts(self._schedule, self._given):
                cut = cut_call(kwargs, part.start, part.stop, past)
                running = self._begin(part.schedule, part.given, cut, part.laid)
                output = forward(**cut)
                done.add(running.finish(), running.flight, output[0])
                sequence.stop()
        except BaseException:
            done.abandon()
            raise
        self.layers.forward = None
        call = done.join(self._given.continues)
        if started is not None:
            self.report.prefill(call, started, Mark(self._lm))
        self.logits.prefilled(done.flight(), call)
        return with_hidden(output, done.hidden())

    def _cache_of(self, kwargs: dict[str, Any]) -> Cache | None:
        """The cache that the language model is given, or would make for itself."""
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._config, "use_cache", True)
        cache = cache_among(kwargs)
        return new_cache(self._config) if cache is None and use_cache else cache

    def _lay_out(self, length: int, device: torch.device, past: int) -> LaidPrompt | None:
        """The prompt that this forward brings, laid out; None if it holds no media tokens."""
        ids = self._prompt.get("input_ids")
        if length == 1 or not holds_media(self._schedule.adapter, ids, length) or ids is None:
            return None
        calls = self.encoders.take()
        prompt = Prompt(ids.to(device), calls, self._prompt, self._given)
        return LaidPrompt.of(self._schedule, prompt, past)

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """The language model returned, or failed."""
        forward, started = self.layers.forward, self._started
        if forward is None or started is None:
            return
        call = None
        if output is not None:  # None: the forward failed
            finished = Mark(self._lm)
            call = forward.finish()
            if call is not None:
                self.report.prefill(call, started, finished)
            # Counting steps would compile each of them anew, and a graph knows no time.
            elif not torch.compiler.is_compiling():
                self.report.step(started, finished)
        else:
            forward.abandon()
        forward.sequence.stop()
        self.layers.forward = None
        if call is not None:
            self.logits.prefilled(forward.flight, call)
