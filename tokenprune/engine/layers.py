"""What decoder layers call while a model runs under a recipe: physical inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.masking_utils import causal_mask_function

from tokenprune.engine.forward import Forward
from tokenprune.engine.masks import LazyMask, base_attention, mask_for_kernel, weighted_mask
from tokenprune.engine.probe import Probe
from tokenprune.engine.rows import Attended
from tokenprune.report.report import Report

__all__ = ["LayerCalls"]


class LayerCalls:
    """The hooks of decoder layers, and their attention function.

    Args:
        report: Is told which kernels run.
        kernel: The attention implementation that the model would use.

    Attributes:
        forward: The call of the language model in progress; None between calls.
    """

    def __init__(self, report: Report, kernel: str) -> None:
        self._report = report
        self._kernel = kernel
        self._probe = Probe()
        self.forward: Forward | None = None

    def before(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
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

    def after(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
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
        self._report.kernel(self._kernel, name)
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

    def hooks(self, number: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What is called before and after a decoder layer."""
        return functools.partial(self.before, number), functools.partial(self.after, number)
