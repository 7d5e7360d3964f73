"""Several devices where there is one: tensors that say they lie elsewhere, and are held to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("cpu:0"), torch.device("cpu:1")
HOST = torch.device("cpu")
FACTORIES = (torch.arange, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros)
"""They make tensors of the host, wherever a scalar that they are given lies."""


class Devices(TorchFunctionMode):
    """Within, a tensor is on the device that it was made on or moved to, by its own word.

    The numbers are computed where they always are. But a function that is given tensors of two
    devices fails, with the exceptions that accelerators make: scalars, and indices of the host.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return device_of(args[0])
        if function is Tensor.to:
            return moved(*args, **kwargs)
        if function is Tensor.cpu:
            return moved(args[0], HOST)
        device = kwargs.get("device")
        if device is None:
            device = HOST if function in FACTORIES else meeting(function, args, kwargs)
        elif torch.device(device).type == HOST.type:
            kwargs["device"] = HOST
        device = torch.device(device)
        found = function(*args, **kwargs)
        if isinstance(found, torch.Size):  # it would come out of the map as a plain tuple
            return found
        return tree_map(lambda one: place(one, device), found)


def moved(tensor: Tensor, *told: Any, **settings: Any) -> Tensor:
    """`Tensor.to`: a copy, where devices differ."""
    asked = [*told, settings.get("device"), settings.get("dtype")]
    asked = [torch.bool if one is bool else one for one in asked]
    asked += [
        part for one in told if isinstance(one, Tensor) for part in (device_of(one), one.dtype)
    ]
    dtype = next((one for one in asked if isinstance(one, torch.dtype)), tensor.dtype)
    device = next((one for one in asked if isinstance(one, str | torch.device)), device_of(tensor))
    elsewhere = torch.device(device) != device_of(tensor)
    copied = tensor.to(dtype, copy=elsewhere or settings.get("copy", False))
    return place(copied, torch.device(device))


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor says it is."""
    return getattr(tensor, "_said_device", None) or tensor.device


def place(value: Any, device: torch.device) -> Any:
    """Let a tensor say that it is on a device."""
    if isinstance(value, Tensor) and not value.is_meta:
        value._said_device = device
    return value


def place_module(module: nn.Module, device: torch.device) -> None:
    """Let the weights of a module say that they are on a device."""
    for tensor in (*module.parameters(), *module.buffers()):
        place(tensor, device)


def meeting(function: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """The one device of all that a function is given.

    Raises:
        AssertionError: There are two.
    """
    found = devices_of((args, kwargs))
    if function in (Tensor.__getitem__, Tensor.__setitem__):
        indices = devices_of(args[1])
        found = devices_of((args[0], args[2:])) | (indices - {HOST})
    assert len(found) < 2, f"{getattr(function, '__name__', function)} of tensors on {found}"
    return found.pop() if found else HOST


def devices_of(values: Any) -> set[torch.device]:
    """The devices of tensors; those of scalars, if there is nothing else."""
    tensors = [one for one in tree_leaves(values) if isinstance(one, Tensor)]
    return {device_of(one) for one in tensors if one.ndim} or set(map(device_of, tensors))
