"""A pruned cache and what its sequence knows, as tensors and plain data to be saved."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from tokenprune.core.layout import TokenLayout
from tokenprune.engine.cache import adopt, new_cache
from tokenprune.engine.sequence import Prefilled, Sequence
from tokenprune.errors import TokenPruneError
from tokenprune.report.report import Call

__all__ = ["cache_from_state", "cache_state"]

_COLUMNS = [one.name for one in fields(TokenLayout)]


def cache_state(cache: Cache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What makes up a pruned cache between two forwards.

    Returns:
        Tensors by name ("0.keys", "0.values" and "0.index" for layer 0, and "0.mass" where entries
        were merged), and the rest as plain numbers, flags and texts.

    Raises:
        TokenPruneError: The state of a stage holds what is neither a tensor nor plain.
    """
    tensors, plain = {}, []
    for number, layer in enumerate(cache.layers):
        tensors[f"{number}.keys"] = layer.keys
        tensors[f"{number}.values"] = layer.values
        tensors[f"{number}.index"] = layer.index.to(torch.int32)
        if layer.mass is not None:
            tensors[f"{number}.mass"] = layer.mass
        state = vars(layer).items()
        plain.append({name: value for name, value in state if type(value) in (int, bool)})
    sequence: Sequence = cache.layers[0].sequence
    prompts = _save_prompts(sequence, tensors)
    state = _save_state(sequence, tensors)
    whole = {"shift": sequence.shift, "joined": sequence.joined}
    tensors |= {f"sequence.{name}": one for name, one in whole.items() if one is not None}
    return tensors, {
        "end": sequence.end,
        "settled": sequence.settled,
        "layers": plain,
        "prompts": prompts,
        "state": state,
    }


def _save_prompts(sequence: Sequence, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    found = []
    for number, (start, call, alive, continues) in enumerate(sequence.prompts):
        for sample, (layout, there) in enumerate(zip(call.layouts, alive, strict=True)):
            ahead = f"prompt.{number}.{sample}"
            tensors |= {f"{ahead}.{name}": getattr(layout, name) for name in _COLUMNS}
            tensors[f"{ahead}.alive"] = there
        samples = len(call.layouts)
        found.append(
            {"start": start, "length": call.length, "samples": samples, "continues": continues}
        )
    return found


def _save_state(sequence: Sequence, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    found = []
    for number, ((step, kind, sample), named) in enumerate(sequence.plain_state().items()):
        plain = {}
        for name, value in named.items():
            if isinstance(value, Tensor):
                tensors[f"state.{number}.{name}"] = value
            elif value is None or type(value) in (bool, int, float, str):
                plain[name] = value
            else:
                raise TokenPruneError(
                    f"{kind}.{name} is a {type(value).__name__}, so the state of step {step} "
                    "cannot be saved; let it hold tensors, numbers and texts"
                )
        found.append({"step": step, "kind": kind, "sample": sample, "fields": plain})
    return found


def cache_from_state(
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
    device: torch.device,
) -> Cache:
    """The cache whose state was taken.

    Args:
        config: Of the language model.
        tensors: As from `cache_state`.
        plain: As from `cache_state`.
        device: Where the model is.
    """
    cache = new_cache(config)
    sequence = adopt(cache, len(plain["layers"]))
    sequence.end, sequence.settled = plain["end"], plain["settled"]
    for name in ("shift", "joined"):
        if (found := tensors.get(f"sequence.{name}")) is not None:
            setattr(sequence, name, found.to(device))
    for number, (layer, state) in enumerate(zip(cache.layers, plain["layers"], strict=True)):
        keys, values = (tensors[f"{number}.{name}"].to(device) for name in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layer.index = tensors[f"{number}.index"].to(device, torch.int64)
        if f"{number}.mass" in tensors:
            layer.mass = tensors[f"{number}.mass"].to(device)
        layer.__dict__.update(state)
    sequence.prompts = [
        _prompt(f"prompt.{number}", one, tensors, device)
        for number, one in enumerate(plain["prompts"])
    ]
    for number, one in enumerate(plain["state"]):
        ahead = f"state.{number}."
        held = {
            name.removeprefix(ahead): value.to(device)
            for name, value in tensors.items()
            if name.startswith(ahead)
        }
        sequence.saved[one["step"], one["kind"], one["sample"]] = {**one["fields"], **held}
    return cache


def _prompt(
    name: str, plain: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> Prefilled:
    layouts, alive = [], []
    for sample in range(plain["samples"]):
        columns = {one: tensors[f"{name}.{sample}.{one}"] for one in _COLUMNS}
        layouts.append(TokenLayout(**columns))
        alive.append(tensors[f"{name}.{sample}.alive"].to(device))
    return Prefilled(plain["start"], Call(layouts, plain["length"]), alive, plain["continues"])
