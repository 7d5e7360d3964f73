"""Hooks, shadowed methods and switched attention, each of which goes when its stack closes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

__all__ = ["add_hook", "shadow", "switch_attention"]


def add_hook(stack: ExitStack, module: nn.Module, register: str, hook: Any, **how: bool) -> None:
    """Register a hook that goes with the stack, whatever fails after it."""
    stack.callback(getattr(module, register)(hook, **how).remove)


def shadow(stack: ExitStack, module: nn.Module, path: str, decorate: Callable[[Any], Any]) -> None:
    """Put a decorated method on an instance, in front of its class's or of what others put there.

    Args:
        stack: Takes it off again.
        module: Where `path` begins.
        path: Name of the method, below submodules if it has dots.
        decorate: Makes the new method of the old one.
    """
    below, _, name = path.rpartition(".")
    module = module.get_submodule(below)
    if name in vars(module):
        stack.callback(setattr, module, name, vars(module)[name])
    else:
        stack.callback(delattr, module, name)
    setattr(module, name, decorate(getattr(module, name)))


def switch_attention(stack: ExitStack, config: Any, name: str, attend: Any, mask: Any) -> None:
    """Let modules with this config call `attend`, under a name of its own in both registries.

    A name that is missing in the registry of masks means no mask, without a word.
    """
    AttentionInterface.register(name, attend)
    stack.callback(AttentionInterface._global_mapping.pop, name)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
        stack.callback(AttentionMaskInterface._global_mapping.pop, name)
    # The public setter would also switch the configs below this one.
    stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation)
    config._attn_implementation_internal = name
