"""The second oracle: what a model computes whose cache entries were merged, as plainly as possible.

Masks cannot tell of keys and values that are no longer those of any token. So this one replaces
the attention of the unpatched model by loops: for each layer, sample and head it holds every key,
its value, whether it is still there and for how many entries it stands; it lets the queries of a
prompt attend, does to the entries what was decided after that prompt, and goes on with the queries
that follow. What happened to hidden states is replayed by the first oracle.

As there, nothing is asked of the engine but the decisions it wrote down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from tokenprune.testing.oracle import Replay, dense_logits
from tokenprune.testing.tiny import decoder_of

NAME = "plain_lists"
"""What the attention is registered as, while it is."""


@torch.no_grad()
def replayed_logits(
    model: Any,
    inputs: Mapping[str, Any],
    sequence: Tensor,
    replay: Replay,
    positions: Tensor | None = None,
    shares: dict[int, Tensor] | None = None,
) -> Tensor:
    """Logits `[B, S, V]` of the whole sequence, as `dense_logits` takes its arguments.

    Args:
        shares: Is filled, by layer, with what each query gives to each token, `[B, heads, S, S]`.
    """
    on_hidden_states = replace(replay, dropped=[], absorbed=[])
    with _attention_by_lists(decoder_of(model).config, replay, shares):
        return dense_logits(model, inputs, sequence, on_hidden_states, positions)


@contextmanager
def _attention_by_lists(
    config: Any, replay: Replay, shares: dict[int, Tensor] | None
) -> Iterator[None]:
    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        samples, heads, length, _ = query.shape
        group = heads // key.shape[1]  # query heads of a key-value head
        weights = query.new_zeros(samples, heads, length, length)
        out = value.new_zeros(samples, heads, length, value.shape[-1])
        for sample in range(samples):
            for head in range(heads):
                mine = sample, head // group
                entries = Entries(key[mine], value[mine])
                for first, last in _turns(replay, module.layer_idx, length):
                    entries.change(replay, module.layer_idx, *mine, first)
                    scores = query[sample, head, first:last] @ entries.keys.T * scaling
                    if softcap is not None:
                        scores = torch.tanh(scores / softcap) * softcap
                    visible = attention_mask[sample, head, first:last] & entries.there
                    scores = (scores + entries.mass.log()).masked_fill(~visible, -torch.inf)
                    weights[sample, head, first:last] = scores.softmax(-1)
                    out[sample, head, first:last] = scores.softmax(-1) @ entries.values
        if shares is not None:
            shares[module.layer_idx] = weights
        return out.transpose(1, 2).contiguous(), None

    attentions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    before = config._attn_implementation_internal
    attentions[NAME], masks[NAME] = attend, eager_mask
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        del attentions[NAME], masks[NAME]


class Entries:
    """What one head of a layer's cache holds of one sample; tokens to come included.

    Attributes:
        keys: `[S, d]`.
        values: `[S, d]`.
        there: `[S]` bool, False for what was dropped.
        mass: `[S]`, for how many entries each stands.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys.clone(), values.clone()
        self.there = torch.ones(len(keys), dtype=torch.bool)
        self.mass = torch.ones(len(keys))

    def change(self, replay: Replay, layer: int, sample: int, head: int, first: int) -> None:
        """Do what was decided just before the query `first`."""
        for at, start, row, merge in replay.absorbed:
            if (at, start, row) == (layer, first, sample):
                self._merge(merge, head)
        for at, start, dropped in replay.dropped:
            if (at, start) == (layer, first):
                self.there = self.there & ~dropped[sample, head]

    def _merge(self, merge: Any, head: int) -> None:
        source, target = merge.source[head].tolist(), merge.target[head].tolist()
        of_keys = merge.weight[head].tolist()
        of_values = of_keys if merge.value_weight is None else merge.value_weight[head].tolist()
        pairs = zip(source, target, of_keys, of_values, strict=True)
        pairs = [one for one in pairs if one[2] or one[3]]
        old = self.keys.clone(), self.values.clone(), self.mass.clone()
        for receiving in {target for _, target, _, _ in pairs}:
            giving = [one for one in pairs if one[1] == receiving]
            self.keys[receiving] = sum(weight * old[0][one] for one, _, weight, _ in giving)
            self.values[receiving] = sum(weight * old[1][one] for one, _, _, weight in giving)
            if merge.mass:
                self.mass[receiving] = sum(float(old[2][one]) for one, _, _, _ in giving)


def _turns(replay: Replay, layer: int, length: int) -> list[tuple[int, int]]:
    """From which query to which nothing changes in a layer."""
    changes = {one[1] for one in [*replay.dropped, *replay.absorbed] if one[0] == layer}
    ends = sorted({0, length, *(one for one in changes if one < length)})
    return list(zip(ends[:-1], ends[1:], strict=True))
