"""Encoder calls: which media they encoded, and the attention of their towers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tokenprune.adapters.base import MediaCall, Tower
from tokenprune.core.layout import Modality
from tokenprune.core.signal import EncoderSignal
from tokenprune.engine.hooks import add_hook, switch_attention
from tokenprune.engine.masks import base_attention
from tokenprune.engine.schedule import Schedule
from tokenprune.engine.views import AttentionTap, StreamedView, split_views
from tokenprune.errors import RecipeError, UnsupportedModelError
from tokenprune.report.report import Report
from tokenprune.report.timing import Mark

__all__ = ["EncoderCalls"]

_HELD_ELEMENTS = 1 << 22
"""Queries and keys that wait to be scored together: in float32, 16 MiB."""


class EncoderCalls:
    """The encoder calls of the prompt at hand.

    Args:
        schedule: Whose signals are read from the towers.
        report: Is told how long encoders took.
    """

    def __init__(self, schedule: Schedule, report: Report) -> None:
        self._adapter = schedule.adapter
        self._signals = schedule.encoder
        self._report = report
        self._calls: list[MediaCall] = []
        self._ahead: list[MediaCall] = []  # encoded before the base model was called
        self._used: set[Modality] = set()
        self._current: MediaCall | None = None
        self._patches: tuple[MediaCall, list[Tensor]] | None = None
        self._views: list[tuple[Tensor, Tensor]] = []  # queries and keys of views of one size
        self._tower: tuple[Tower, float | None] | None = None  # of these views, with its scaling
        self._prompt: dict[str, Any] = {}

    # -- calls

    def on_prompt(self, prompt: dict[str, Any]) -> None:
        """The base model is called with these arguments."""
        self._prompt = prompt
        # What was encoded ahead counts if the model is given it: older releases of transformers
        # lose it where `generate` prefills in chunks.
        self._ahead = [] if prompt.get("mm_encoder_outputs") else list(self._calls)

    def take(self) -> list[MediaCall]:
        """The calls that made the media tokens of the prompt at hand, from now on used."""
        calls = [call for call in self._calls if call not in self._ahead]
        self._used = {call.modality for call in calls}
        return calls

    def watch(self, modality: Modality) -> Callable[[Any], Any]:
        """A decorator for a method that encodes media of this kind."""

        def decorate(encode: Any) -> Any:
            signature = inspect.signature(encode)

            @functools.wraps(encode)  # generate looks at the signature
            def watched(*args: Any, **kwargs: Any) -> Any:
                if self._current is not None:  # a video call that nests the image call
                    return encode(*args, **kwargs)
                bound = signature.bind(*args, **kwargs).arguments
                arguments = {**bound, **bound.pop("kwargs", {})}
                arguments.pop("inputs_embeds", None)  # large, and not of the media
                kind = self._adapter.modality(modality, arguments, self._prompt)
                call = MediaCall(kind, arguments)
                started = Mark(self._adapter.language_model)
                self._current = call
                try:
                    result = encode(*args, **kwargs)
                    self._score_views()
                finally:
                    self._current = self._patches = None
                    self._views.clear()
                if kind in self._used:  # a new prompt; others may have been encoded ahead
                    self._calls = [old for old in self._calls if old.modality != kind]
                    self._used.discard(kind)
                self._calls.append(call)
                self._report.encoding(started, Mark(self._adapter.language_model))
                return result

            return watched

        return decorate

    # -- the attention of towers

    def read_towers(self, stack: ExitStack) -> None:
        """Let the towers show their attention until the stack closes."""
        inside: dict[nn.Module, Tower] = {}
        read = frozenset[Modality]().union(*self._signals.values())
        for modality in self._adapter.modalities:
            tower = self._adapter.tower(modality) if modality in read else None
            if tower is not None:
                inside |= dict.fromkeys(tower.block.modules(), tower)
        for tower in set(inside.values()):
            if not any(hasattr(module, "config") for module in tower.block.modules()):
                self._tap(stack, tower)
        configs: dict[int, Any] = {  # several towers may share one
            id(module.config): module.config
            for module in inside
            if hasattr(getattr(module, "config", None), "_attn_implementation")
        }
        for config in configs.values():
            base = str(config._attn_implementation)

            def attend(
                module: nn.Module,
                query: Tensor,
                key: Tensor,
                *args: Any,
                _base: str = base,
                **kw: Any,
            ) -> Any:
                if module in inside:
                    mask = args[1] if len(args) > 1 else kw.get("attention_mask")
                    self._read(inside[module], query, key, kw, mask)
                return base_attention(_base, module)(module, query, key, *args, **kw)

            # The base's name stays part of the new one: towers look for "flash" in it.
            name = f"tokenprune_{id(config):x}_{base}"
            mask = ALL_MASK_ATTENTION_FUNCTIONS.get(base)
            switch_attention(stack, config, name, attend, mask)

    def _tap(self, stack: ExitStack, tower: Tower) -> None:
        """Read a block that is not of transformers, but calls torch's attention."""
        open_taps: list[tuple[ExitStack, AttentionTap]] = []

        def show(query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None) -> None:
            self._read(tower, query, key, {"scaling": scaling}, mask)

        def enter(*_: Any) -> None:
            opened, tap = ExitStack(), AttentionTap(show)
            opened.enter_context(tap)
            open_taps.append((opened, tap))

        def leave(*_: Any) -> None:
            opened, tap = open_taps.pop()
            opened.close()
            if not tap.calls:
                raise UnsupportedModelError(
                    f"{type(tower.block).__name__} computes its attention by hand, so it cannot be "
                    "read; let it use torch's (timm: TIMM_FUSED_ATTN=1), or a method without maps"
                )

        add_hook(stack, tower.block, "register_forward_pre_hook", enter)
        add_hook(stack, tower.block, "register_forward_hook", leave, always_call=True)

    @torch.no_grad()
    def _read(
        self,
        tower: Tower,
        query: Tensor,
        key: Tensor,
        kwargs: dict[str, Any],
        mask: Tensor | None,
    ) -> None:
        """Read one attention of a tower, `[W, heads, P + Nv, d]`, once with others like it.

        Towers for pictures of any size attend view by view; to score each alone would take longer
        than to encode it.
        """
        call = self._current
        if call is None or not self._readers(call):
            return
        lengths = self._adapter.view_lengths(call)
        if lengths is None and (boundaries := kwargs.get("cu_seq_lens_q")) is not None:
            lengths = boundaries.diff().tolist()
        kind, padding = (tower, kwargs.get("scaling")), self._adapter.padding(call)
        bias = mask if tower.biased else None  # of others padding and boundaries are known
        for views in split_views(query, key, lengths):
            alike = self._views and self._views[0][0].shape[1:] == views[0].shape[1:]
            if not alike or self._tower != kind or self._held() > _HELD_ELEMENTS:
                self._score_views()
            self._views.append(views)
            self._tower = kind
            if padding is not None or bias is not None or len(views[0]) > 1:  # or many already
                self._score_views(padding, bias)

    def _readers(self, call: MediaCall) -> list[EncoderSignal]:
        """The signals that are wanted of what a call encodes."""
        return [one for one, modalities in self._signals.items() if call.modality in modalities]

    def _held(self) -> int:
        return sum(query.numel() + key.numel() for query, key in self._views)

    @torch.no_grad()
    def _score_views(self, padding: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Compute the encoder signals of the views that were read.

        Args:
            padding: As `Adapter.padding` gives it.
            bias: What the tower adds to the scores.
        """
        call = self._current
        if not self._views or self._tower is None or call is None:
            return
        query, key = self._views[0]
        if len(self._views) > 1:
            query, key = (torch.cat(parts) for parts in zip(*self._views, strict=True))
        self._views.clear()
        tower, scaling = self._tower
        call.view_tokens.extend([query.shape[2] - tower.prefix_tokens] * len(query))
        for signal in self._readers(call):
            maps = call.maps.setdefault(signal, [])
            grey = functools.partial(self._grey, call, len(maps), len(query))
            view = StreamedView(query, key, scaling, tower.prefix_tokens, padding, bias, grey)
            maps.extend(_checked(signal, signal.of(view), view).unbind())

    def _grey(self, call: MediaCall, first: int, views: int) -> Tensor:
        """The pixels below each token of some views, `[W, Nv, pixels]`."""
        if self._patches is None or self._patches[0] is not call:  # once a call, not once a view
            patches = self._adapter.grey(call)
            if patches is None:
                kind = self._adapter.config.model_type
                raise RecipeError(
                    f"{kind} does not give the pixels below its tokens; set the weight of the "
                    "entropy to 0"
                )
            self._patches = call, patches
        return torch.stack(self._patches[1][first : first + views])


def _checked(signal: EncoderSignal, found: Tensor, view: StreamedView) -> Tensor:
    """What a signal made of some views, if it has the shape that it must have."""
    of_tokens = found.shape[:2] == (view.views, view.tokens) and found.ndim in (2, 3)
    if of_tokens if signal.per == "token" else found.ndim == 2 and len(found) == view.views:
        return found
    rule = "[W, Nv] or [W, Nv, C]" if signal.per == "token" else "[W, C]"
    raise RecipeError(
        f"{signal} must give {rule} of {view.views} views of {view.tokens} tokens, got "
        f"{list(found.shape)}"
    )
