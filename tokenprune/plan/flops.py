"""Operations of a prefill, counted from the shapes of a language model's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenprune.adapters.base import adapter_for
from tokenprune.engine.cache import adopt, new_cache

__all__ = ["prefill_flops"]


def prefill_flops(
    model: PreTrainedModel, rows: Sequence[Tensor], earlier: Sequence[Tensor] | None = None
) -> float:
    """Floating point operations of a prefill in the language model, encoders left out.

    A linear map takes two operations a weight and token, of experts those that a token is sent to.
    Attention takes four a pair of query and key, for each number of a head: two for the score, two
    for the sum of values. Pairs are those that a causal mask leaves, within the layer's window.
    The output head runs for the last token only. What grows slower (norms, softmax) is left out.

    Args:
        model: Its parameters may lie on the meta device.
        rows: For each decoder layer `[S]`, the logical indices of the tokens in it, increasing.
        earlier: For each decoder layer `[E]` those of the keys in its cache before; None if empty.
    """
    adapter = adapter_for(model)
    shape, language_model = adapter.shape, adapter.language_model
    config: Any = language_model.config
    cache = new_cache(config)
    adopt(cache, shape.layers)
    layers: Any = language_model.layers
    total = 0.0
    keys = earlier or [one[:0] for one in rows]
    for layer, stored, tokens, before in zip(layers, cache.layers, rows, keys, strict=True):
        total += 2.0 * _active_weights(layer, config) * len(tokens)
        total += 4.0 * _pairs(tokens, stored.window, before) * shape.heads * shape.head_width
    head = model.get_output_embeddings()
    return float(total + 2.0 * head.weight.numel())


def _active_weights(layer: nn.Module, config: Any) -> float:
    """Weights of linear maps that one token meets in a decoder layer."""
    chosen = getattr(config, "num_experts_per_tok", None)
    return sum(
        # Experts lie in one tensor `[experts, out, in]`.
        parameter.numel() * (chosen / len(parameter) if parameter.ndim == 3 and chosen else 1)
        for parameter in layer.parameters()
        if parameter.ndim >= 2
    )


def _pairs(rows: Tensor, window: int | None, earlier: Tensor) -> int:
    """Pairs of query and key that a causal mask leaves; keys are of `earlier` and of `rows`."""
    number = len(rows)
    if window is None:
        return number * (number + 1) // 2 + number * len(earlier)
    keys = torch.cat([earlier, rows])
    first = torch.searchsorted(keys, rows - window, right=True)
    return int((torch.arange(1, number + 1) + len(earlier) - first).sum())
