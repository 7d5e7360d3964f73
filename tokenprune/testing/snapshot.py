"""What a model looks like from outside: to tell whether pruning left a trace."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["differences", "snapshot"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch could have left behind, as values that can be compared."""
    return {
        "modules": {name: _module(module) for name, module in model.named_modules()},
        "parameters": {name: (id(one), one._version) for name, one in model.named_parameters()},
        "configs": {
            name: vars(module.config).copy()
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "attention": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
        "masks": sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys()),
    }


def _module(module: nn.Module) -> dict[str, Any]:
    # rope_deltas and the like: left behind by any run, pruned or not.
    plain = {name for name, value in vars(module).items() if not name.startswith("rope_deltas")}
    return {
        "type": type(module),
        "attributes": sorted(plain),
        "hooks": {name: list(getattr(module, name)) for name in _HOOKS},
        "forward": getattr(module.forward, "__func__", module.forward),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two snapshots, in words: "parameters lm_head.weight" for one."""
    found = []
    for what, old in before.items():
        new = after[what]
        if isinstance(old, dict):
            names = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        else:
            names = set(old) ^ set(new)
        found += [f"{what} {name}".rstrip() for name in sorted(names)]
    return found
