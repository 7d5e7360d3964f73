"""One `with prune(...)`: what the hooks of a model call while it runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function

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
from tokenprune.engine.masks import LazyMask, base_attention, mask_for_kernel, weighted_mask
from tokenprune.engine.parts import (
    PartedPrompt,
    PartsDone,
    check_parted,
    cut_call,
    with_hidden,
)
from tokenprune.engine.probe import Probe
from tokenprune.engine.prompt import Given, Prompt
from tokenprune.engine.rows import Attended
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
        forward: The call of the language model in progress; None between calls.
    """

    def __init__(self, schedule: Schedule, report: Report, given: Given) -> None:
        adapter = schedule.adapter
        self._schedule = schedule
        self._given = given
        language_model: Any = adapter.language_model
        self._lm: nn.Module = language_model
        self._config = language_model.config
        self._signature = inspect.signature(language_model.forward)
        self._kernel = str(self._config._attn_implementation)
        self._prompt: dict[str, Any] = {}
        self._started: Mark | None = None
        self._parted: PartedPrompt | None = None
        self.report = report
        self.encoders = EncoderCalls(schedule, report)
        self.logits = LogitRows(adapter)
        self._probe = Probe()
        self.forward: Forward | None = None

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
        self.forward = self._parted = None
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
        self.forward = Forward(schedule, cache, batch, length, hidden.device, given)
        self.forward.begin(kwargs, laid)
        return self.forward

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
        self.forward = None
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
        forward, started = self.forward, self._started
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
        self.forward = None
        if call is not None:
            self.logits.prefilled(forward.flight, call)

    # -- decoder layers: physical inside

    def before_layer(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A decoder layer is called."""
        forward = self.forward
        if forward is None:  # on its own
            return None
        entering = args[0] if args else kwargs["hidden_states"]
        probing = None
        if forward.schedule.probed(number, narrowed=False):
            cut = forward.cut_arguments(args, kwargs)
            probing = functools.partial(self._probe_layer, forward, number, module, entering, *cut)
        hidden = forward.enter_layer(number, entering, probing)
        if hidden is not None and args:
            args = (hidden, *args[1:])
        elif hidden is not None:
            kwargs = {**kwargs, "hidden_states": hidden}
        args, kwargs = forward.cut_arguments(args, kwargs)
        if forward.schedule.probed(number, narrowed=True):
            entering = entering if hidden is None else hidden
            given = number, module, entering, args, kwargs
            forward.probe_layer(number, functools.partial(self._probe_layer, forward, *given))
        return args, kwargs

    def _probe_layer(
        self,
        forward: Forward,
        number: int,
        module: nn.Module,
        hidden: Tensor,
        args: Any,
        kwargs: Any,
        *,
        rotary: bool,
    ) -> Attended:
        """What a layer will attend with, if it is called like this."""
        probed = self._probe.run(module, hidden, args, kwargs, rotary=rotary)
        keys, values, rows = probed.key, probed.value, forward.flight.rows
        index, layer = rows[:, None], forward.layer(number)
        mass = None
        if rotary and layer is not None and layer.is_initialized:  # what it holds comes first
            index = torch.cat([layer.index, index.expand(-1, layer.index.shape[1], -1)], dim=-1)
            keys = torch.cat([layer.keys.to(keys.device), keys], dim=2)
            values = torch.cat([layer.values.to(values.device), values], dim=2)
            mass = layer.mass
        if mass is not None:
            mass = pad(mass, (0, rows.shape[1]), value=1.0)
        given = probed.mask, rows, index, probed.arguments, mass
        return Attended(probed.query, keys, values, *given)

    def after_layer(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        """A decoder layer returned."""
        if self.forward is None:
            return None
        several = isinstance(output, tuple)
        hidden = self.forward.leave_layer(number, output[0] if several else output)
        return (hidden, *output[1:]) if several and hidden is not None else hidden

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Any = causal_mask_function,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> LazyMask:
        """What the model gets when it asks for the mask of its attention."""
        # A window that holds all there is changes nothing, and plain causal masks are fastest.
        # Either flag says that there is more to the function (images that see ahead).
        plain = kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap")
        if local_size is not None and int(kv_length) < local_size and plain:
            mask_function = causal_mask_function
        return LazyMask(mask_function, attention_mask)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of a decoder layer, by the model's own kernel.

        Args:
            module: The attention module.
            query: `[B, heads, Q, d]`.
            key: `[B, H, S, d]`, what the cache gave.
            value: `[B, H, S, d]`.
            attention_mask: What the model made of `mask`.
            kwargs: What else the kernel takes.
        """
        if self._probe.active:
            self._probe.attend(module, query, key, value, attention_mask, **kwargs)
        forward = self.forward
        if forward is None:  # the decoder layer was called on its own
            attend = base_attention(self._kernel, module)
            return attend(module, query, key, value, attention_mask, **kwargs)
        flight, layer = forward.flight, forward.layer(module.layer_idx)
        keys = flight.rows[:, None] if layer is None else layer.shown
        holes = flight.holes if layer is None else layer.holes
        given = attention_mask, self._kernel, query, flight.rows, keys
        mass = None if layer is None else layer.mass
        name, mask = (
            mask_for_kernel(*given, holes)
            if mass is None
            else weighted_mask(*given, mass[..., -keys.shape[-1] :])
        )
        self.report.kernel(self._kernel, name)
        # Positions with gaps look like packed sequences to flash kernels.
        kwargs.pop("position_ids", None)
        output = base_attention(name, module)(module, query, key, value, mask, **kwargs)
        number = module.layer_idx
        if forward.schedule.watches(number):
            stored = (
                (key, value, keys) if layer is None else (layer.keys, layer.values, layer.index)
            )
            forward.attended(
                number,
                lambda: Attended(
                    query, *stored[:2], attention_mask, flight.rows, stored[2], kwargs, mass
                ),
                layer,
            )
        if layer is not None:
            forward.after_attention(number, layer)
        return output

    def hook_layer(self, number: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What is called before and after a decoder layer."""
        before = functools.partial(self.before_layer, number)
        return before, functools.partial(self.after_layer, number)
