"""Queries and keys of a decoder layer that is about to run, without model-specific code.

The layer is called with what it is about to get, and stopped by an exception as soon as it calls
its attention function: only its norm and its projections are computed, by the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from tokenprune.errors import UnsupportedModelError

__all__ = ["Probe", "Probed"]

_COMPUTING: Final = ("peft.", "torch.nn.utils.")
"""Where forward pre-hooks come from that are part of what a module computes: PEFT names the adapter
of each row of a batch by them, and torch puts pruned and normalised weights together."""

_ABSENT: Final = object()


@dataclass(frozen=True)
class Probed:
    """What a decoder layer gives to its attention function.

    Attributes:
        query: `[B, heads, Q, d]`.
        key: `[B, H, Q, d]`, of the rows in flight alone.
        value: `[B, H, Q, d]`.
        mask: What the model made of its mask interface, for the rows in flight and the cache.
        arguments: What else the attention function was given: `scaling`, `softcap`, ...
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        query, key = list(self.query.shape), list(self.key.shape)
        return f"Probed(query={query}, key={key}, arguments={sorted(self.arguments)})"


class _Stop(BaseException):
    """The layer has come to its attention. No `except Exception` on the way may catch it."""


class Probe:
    """Runs a decoder layer until its attention function is called, and stops it there.

    The attention function that the model calls must hand over to `attend` while `active`.

    Weights that change what is computed stay in force: PEFT's adapters, quantised layers,
    parametrisations, accelerate's hooks. Forward hooks on the layer and on modules inside it do
    not fire, so that those that count or record do so once a real forward; a hook that changes
    hidden states inside the layer is therefore not seen either (those on the layer that ran before
    have changed `hidden` already). Hooks that torch calls for all modules do fire.

    Nothing is left behind: no cache is read or written, no gradient is recorded. In training mode
    the random state is put back, of the CPU and of CUDA devices, so that dropout drops in the layer
    what it dropped in the probe. Compiled layers are run uncompiled, and gradient checkpointing is
    not used. Weights that accelerate has offloaded are loaded for the probe, freed, and loaded
    again for the layer.
    """

    def __init__(self) -> None:
        self._active = False
        self._probed: Probed | None = None

    @property
    def active(self) -> bool:
        """Whether a layer is being probed."""
        return self._active

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any = None,
        **kwargs: Any,
    ) -> NoReturn:
        """Keep what an attention function is called with, and stop the layer.

        Args:
            module: The attention module.
            query: `[B, heads, Q, d]`.
            key: `[B, H, Q, d]`.
            value: `[B, H, Q, d]`.
            mask: As the model made it.
            kwargs: What else the attention function takes.
        """
        self._probed = Probed(query, key, value, mask, kwargs)
        raise _Stop

    def run(
        self,
        layer: nn.Module,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        rotary: bool = True,
    ) -> Probed:
        """Run a layer until its attention.

        Args:
            layer: The decoder layer, or a compiled one.
            hidden: `[B, Q, D]`, about to enter it.
            args: What else it is about to be called with; hidden states among them are replaced
                by `hidden`.
            kwargs: Likewise.
            rotary: Whether queries and keys have their rotary embedding, as in the layer. Without
                it the factor is gone, too, by which YaRN and LongRoPE lengthen them.

        Returns:
            What the layer, called like this, gives to its attention function, bit by bit; but keys
            and values of the rows in flight alone.

        Raises:
            UnsupportedModelError: The layer calls no attention function, or its rotary embedding
                cannot be left out.
        """
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # exceptions and hidden hooks are not for graphs
        if not rotary:
            kwargs = _without_rotary(layer, kwargs)
        args = (hidden, *args[1:]) if args else ()
        if not args:
            kwargs = {**kwargs, "hidden_states": hidden}
        # Whatever it is called, and wherever it is given.
        args = tuple(None if isinstance(one, Cache) else one for one in args)
        kwargs = {name: None if isinstance(one, Cache) else one for name, one in kwargs.items()}
        with torch.no_grad(), _no_autocast_cache(), _prepared(layer):
            self._active = True
            try:
                layer(*args, **kwargs)
            except _Stop:
                pass
            finally:
                self._active = False
                probed, self._probed = self._probed, None
        if probed is None:
            raise UnsupportedModelError(
                f"cannot read queries of a {_name(layer)} layer: it did not call the attention "
                "function of its configuration; use a method that needs none"
            )
        return probed


def _without_rotary(layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, but with position embeddings that rotate by nothing."""
    pair: Any = kwargs.get("position_embeddings")
    known = isinstance(pair, tuple | list) and all(isinstance(one, Tensor) for one in pair)
    if not known or len(pair) != 2:
        raise UnsupportedModelError(
            f"cannot read queries of a {_name(layer)} layer before their rotary embedding: it must "
            "take (cos, sin) as `position_embeddings`; read them with rotary embedding"
        )
    cos, sin = pair
    return {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def _name(layer: nn.Module) -> str:
    """The model type of a layer."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    types = (getattr(config, "model_type", None) for config in configs)
    return next((f"{one!r}" for one in types if one), type(layer).__name__)


# -- what would be left behind


@contextmanager
def _prepared(layer: nn.Module) -> Iterator[None]:
    """Inside, calls of a layer fire no hooks of others, are not compiled and can be stopped.

    accelerate loads weights before a module's forward and frees them after it. A forward that is
    stopped, or fails, is not seen to end: the hooks of all modules in progress are told, innermost
    first, with None for the output.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    running: list[tuple[Callable[..., Any], nn.Module]] = []
    training = False

    def change(state: dict[str, Any], name: str, value: Any) -> None:
        changed.append((state, name, state.get(name, _ABSENT)))
        state[name] = value

    try:
        for module in layer.modules():
            state = vars(module)  # past `__setattr__`, which looks for parameters
            training = training or module.training
            if module._forward_hooks:
                change(state, "_forward_hooks", {})
            if before := module._forward_pre_hooks:
                kept = {number: hook for number, hook in before.items() if _computes(hook)}
                change(state, "_forward_pre_hooks", kept)
            if state.get("_compiled_call_impl") is not None:
                change(state, "_compiled_call_impl", None)
            if "_orig_mod" in module._modules and "forward" in state:  # of `torch.compile`
                change(state, "forward", module._modules["_orig_mod"])
            if state.get("gradient_checkpointing"):
                change(state, "gradient_checkpointing", False)
            if "_hf_hook" in state:
                pre_forward, post_forward = _watched(state["_hf_hook"], running)
                change(vars(state["_hf_hook"]), "pre_forward", pre_forward)
                change(vars(state["_hf_hook"]), "post_forward", post_forward)
        with _same_random_state() if training else nullcontext():
            yield
    finally:
        try:
            while running:
                end, module = running.pop()
                end(module, None)
        finally:
            for state, name, value in reversed(changed):
                if value is _ABSENT:
                    del state[name]
                else:
                    state[name] = value


def _watched(
    hook: Any, running: list[tuple[Callable[..., Any], nn.Module]]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two methods of a hook of accelerate, which note the modules whose forward is running."""
    begin, end = hook.pre_forward, hook.post_forward

    def pre_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = begin(module, *args, **kwargs)
        running.append((end, module))
        return found

    def post_forward(module: nn.Module, output: Any) -> Any:
        running.pop()
        return end(module, output)

    return pre_forward, post_forward


def _computes(hook: Any) -> bool:
    """Whether a forward pre-hook is part of what its module computes."""
    origin = getattr(getattr(hook, "func", hook), "__module__", None)
    return isinstance(origin, str) and origin.startswith(_COMPUTING)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Inside, autocast keeps no copies of weights.

    They would have no gradient, and releases of torch before pytorch/pytorch#165068 would give them
    to the layer that comes next.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _same_random_state() -> Any:
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
