"""The contract suite can fail: each of these faults in the engine is seen by a contract.

A mutant replaces one function of the package by a faulty one. The contract that is named for it
passes without the mutant and must fail with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.adapters import test_adapters
from tests.contract import test_cache_merges as merging
from tests.contract import test_context as context
from tests.contract import test_contracts as contracts
from tests.contract import test_groups as groups
from tests.contract import test_late as late
from tests.contract import test_signals as signals
from tests.contract import test_stages as stages
from tests.contract.cases import EVERYWHERE
from tests.engine import test_sequence as sequences
from tokenprune.adapters.base import Item
from tokenprune.adapters.llava_next import LlavaNext
from tokenprune.adapters.qwen2_5_vl import Qwen2_5VL
from tokenprune.core import budget
from tokenprune.core.signal import Hidden
from tokenprune.core.site import Cache, Layer
from tokenprune.engine import (
    deepstack,
    entries,
    flight,
    forward,
    hooks,
    later,
    layers,
    parts,
    prefill,
    rows,
    run,
)
from tokenprune.engine import patch as patching
from tokenprune.engine import signals as collecting
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.deepstack import DeepStack
from tokenprune.engine.entries import Entries
from tokenprune.engine.flight import Flight
from tokenprune.engine.forward import Forward
from tokenprune.engine.layers import LayerCalls
from tokenprune.engine.masks import LazyMask
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.schedule import Schedule
from tokenprune.engine.sequence import Sequence
from tokenprune.engine.signals import Collector
from tokenprune.engine.views import StreamedView
from tokenprune.methods import baselines
from tokenprune.testing.harness import forget_pruned_runs
from tokenprune.testing.mutants import Mutants

INPUT, LAYERS, CACHE = "random(keep=0.5)", "random(keep=0.6 at=1)", "random(keep=0.5 at=cache)"
MUTANTS = Mutants(forget=forget_pruned_runs)
caught_by = MUTANTS.caught_by

attention_at_caches = signals.test_attention_at_caches_is_that_of_the_dense_model
attention_at_layers = signals.test_attention_at_layers_is_that_of_the_dense_model
hidden_states = signals.test_keys_values_and_hidden_states_are_those_of_the_dense_model
oracle = contracts.test_prefill_and_decoding_match_the_oracle
batch_oracle = contracts.test_a_left_padded_batch_matches_the_oracle


# -- positions


@caught_by(oracle, "llava", INPUT)
def positions_counted_anew(patch: pytest.MonkeyPatch) -> None:
    """What is left gets the positions 0 to K - 1."""
    _cut_elsewhere(patch, lambda source, length: torch.arange(source.shape[1]).expand_as(source))


@caught_by(oracle, "qwen2_5_vl", LAYERS)
def positions_one_too_far(patch: pytest.MonkeyPatch) -> None:
    """Kept tokens get the position of the token after them."""
    _cut_elsewhere(patch, lambda source, length: (source + 1).clamp_max(length - 1))


def _cut_elsewhere(patch: pytest.MonkeyPatch, other: Callable[[Any, int], Any]) -> None:
    """Cut positions to rows other than those in flight."""
    original = Forward.cut_arguments

    def faulty(self: Forward, args: Any, kwargs: Any) -> Any:
        flight = self.flight
        if flight.source is None:
            return original(self, args, kwargs)
        kept = flight.source
        flight.source = other(kept, flight.length)
        try:
            return original(self, args, kwargs)
        finally:
            flight.source = kept

    patch.setattr(Forward, "cut_arguments", faulty)


@caught_by(contracts.test_compact_positions_match_the_oracle, "llava", INPUT, "alone")
def compact_shift_forgotten_in_decoding(patch: pytest.MonkeyPatch) -> None:
    original = forward.compact_positions

    def faulty(kwargs: Any, flight: Any, sequence: Any, tokens: Any, compact: bool) -> None:
        if tokens is not None:
            original(kwargs, flight, sequence, tokens, compact)

    patch.setattr(forward, "compact_positions", faulty)


# -- masks


@caught_by(contracts.test_eager_attention_matches_the_oracle, "llava", INPUT, "alone")
def bidirectional_mask(patch: pytest.MonkeyPatch) -> None:
    """Eager attention goes without a mask, as SDPA may: but then nothing is causal."""
    original = layers.mask_for_kernel

    def faulty(mask: Any, name: str, *args: Any) -> Any:
        return name, original(mask, "sdpa", *args)[1]

    patch.setattr(layers, "mask_for_kernel", faulty)


@caught_by(batch_oracle, "llava", INPUT)
def mask_of_the_first_keys(patch: pytest.MonkeyPatch) -> None:
    """The mask is cut to length instead of being evaluated at the keys in hand."""
    original = LazyMask.__call__

    def faulty(self: LazyMask, queries: Any, keys: Any) -> Any:
        return original(self, queries, torch.arange(keys.shape[2]).expand_as(keys))

    patch.setattr(LazyMask, "__call__", faulty)


@caught_by(contracts.test_keep_all_is_bit_identical, "llava_onevision", INPUT)
def mask_of_all_ones_where_none_is_needed(patch: pytest.MonkeyPatch) -> None:
    """Right to the last digits but not bit for bit: another kernel runs."""
    _always_masked(patch)


@caught_by(contracts.test_no_square_tensor_and_no_higher_peak, "llava_onevision", CACHE)
def square_mask(patch: pytest.MonkeyPatch) -> None:
    _always_masked(patch)


def _always_masked(patch: pytest.MonkeyPatch) -> None:
    original = layers.mask_for_kernel

    def faulty(mask: Any, name: str, query: Any, rows: Any, keys: Any, holes: bool) -> Any:
        return original(mask, name, query, rows, keys, True)

    patch.setattr(layers, "mask_for_kernel", faulty)


@caught_by(batch_oracle, "qwen2_5_vl", CACHE)
def padding_is_seen(patch: pytest.MonkeyPatch) -> None:
    original = LazyMask.__init__

    def faulty(self: LazyMask, function: Any, padding: Any) -> None:
        original(self, function, None)

    patch.setattr(LazyMask, "__init__", faulty)


@caught_by(batch_oracle, "llava", CACHE)
def holes_are_seen(patch: pytest.MonkeyPatch) -> None:
    """Samples keep unequal counts, and the filling of the shorter one takes part."""
    original = LazyMask.__call__

    def faulty(self: LazyMask, queries: Any, keys: Any) -> Any:
        newest = keys.max(dim=-1, keepdim=True).values
        return original(self, queries, torch.where(keys < 0, newest, keys))

    patch.setattr(LazyMask, "__call__", faulty)


# -- indices


@caught_by(batch_oracle, "llava", INPUT)
def holes_on_the_right(patch: pytest.MonkeyPatch) -> None:
    """Right padding: the last row of the shorter sample is no token."""

    def faulty(rows: list[Any], least: int = 0) -> Any:
        longest = max(row.shape[-1] for row in rows)
        return torch.stack(
            [torch.nn.functional.pad(row, (0, longest - row.shape[-1]), value=-1) for row in rows]
        )

    for module in (flight, prefill):
        patch.setattr(module, "pad_left", faulty)


@caught_by(oracle, "llava", EVERYWHERE)
def stale_kept_index(patch: pytest.MonkeyPatch) -> None:
    """A second narrowing takes rows as if the first had not been."""

    def faulty(self: Flight, sample: int, tokens: Any) -> Any:
        return tokens.clamp_max(self.rows.shape[1] - 1)

    patch.setattr(Flight, "locate", faulty)


@caught_by(batch_oracle, "llava", CACHE)
def stale_index_after_a_selection(patch: pytest.MonkeyPatch) -> None:
    """A layer drops entries but goes on with the index of the first ones."""
    original = PrunedLayer.select

    def faulty(self: PrunedLayer, columns: Any) -> None:
        before = self.index
        original(self, columns)
        self.index = before[..., : columns.shape[-1]].expand_as(self.index)

    patch.setattr(PrunedLayer, "select", faulty)


@caught_by(oracle, "llava", INPUT)
def decision_recorded_but_not_applied(patch: pytest.MonkeyPatch) -> None:
    original = Prefill.prune

    def faulty(self: Prefill, *args: Any) -> Any:
        before = [sample.alive for sample in self.samples]
        merges = original(self, *args)
        for sample, alive in zip(self.samples, before, strict=True):
            sample.alive = alive
        return merges

    patch.setattr(Prefill, "prune", faulty)


@caught_by(oracle, "qwen2_audio", LAYERS)
def one_layer_late(patch: pytest.MonkeyPatch) -> None:
    original = Schedule.__init__

    def faulty(self: Schedule, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.layer = {number + 1: stages for number, stages in self.layer.items()}

    patch.setattr(Schedule, "__init__", faulty)


# -- what is merged, and what early layers add


@caught_by(oracle, "llava_onevision", "vflowopt(keep=0.5)")
def merge_weights_lost(patch: pytest.MonkeyPatch) -> None:
    original = forward.absorb_

    def faulty(features: Any, source: Any, target: Any, weight: Any) -> None:
        original(features, source, target, torch.ones_like(weight))

    for module in (forward, deepstack):
        patch.setattr(module, "absorb_", faulty)


@caught_by(oracle, "llava", "vflowopt(keep=0.5)")
def merge_forgotten(patch: pytest.MonkeyPatch) -> None:
    for module in (forward, deepstack):
        patch.setattr(module, "absorb_", lambda *args: None)


@caught_by(oracle, "qwen3_vl", INPUT)
def deepstack_not_narrowed(patch: pytest.MonkeyPatch) -> None:
    """Rows moved, but the features of the first rows are added."""
    original = DeepStack.add

    def faulty(self: DeepStack, layer: int, hidden: Any, source: Any) -> Any:
        first = None if source is None else torch.arange(source.shape[1]).expand_as(source)
        return original(self, layer, hidden, first)

    patch.setattr(DeepStack, "add", faulty)


@caught_by(oracle, "qwen3_vl", "vflowopt(keep=0.5)")
def deepstack_not_merged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeepStack, "absorb_", lambda self, *args: None)


# -- caches


@caught_by(oracle, "llava", CACHE)
def heads_swapped(patch: pytest.MonkeyPatch) -> None:
    original = Prefill.prune_cache

    def faulty(self: Prefill, *args: Any) -> Any:
        kept = original(self, *args)
        return None if kept is None else (kept[0].flip(1), *kept[1:])

    patch.setattr(Prefill, "prune_cache", faulty)


@caught_by(oracle, "qwen2_audio", CACHE)
def values_of_other_entries(patch: pytest.MonkeyPatch) -> None:
    """Keys are selected, values are just cut to length."""
    original = PrunedLayer.select

    def faulty(self: PrunedLayer, columns: Any) -> None:
        values = self.values
        original(self, columns)
        self.values = values[:, :, -columns.shape[-1] :].contiguous()

    patch.setattr(PrunedLayer, "select", faulty)


@caught_by(contracts.test_kv_bytes_really_fall, "llava", CACHE)
def bytes_not_freed(patch: pytest.MonkeyPatch) -> None:
    """What is kept is a view that holds on to a larger tensor, until decoding copies it."""
    original = PrunedLayer.select

    def faulty(self: PrunedLayer, columns: Any) -> None:
        whole = self.keys.shape[2]
        original(self, columns)
        kept = self.keys.shape[2]
        room = self.keys.new_zeros(*self.keys.shape[:2], whole, self.keys.shape[3])
        room[:, :, :kept] = self.keys
        self.keys = room[:, :, :kept]

    patch.setattr(PrunedLayer, "select", faulty)


@caught_by(contracts.test_a_cropped_cache_goes_on_as_before, "llava", EVERYWHERE, 1)
def length_is_physical(patch: pytest.MonkeyPatch) -> None:
    def faulty(self: PrunedLayer) -> int:
        return 0 if not self.is_initialized else self.keys.shape[2]

    patch.setattr(PrunedLayer, "get_seq_length", faulty)


@caught_by(contracts.test_assisted_decoding_matches_the_oracle, "llava_next", EVERYWHERE)
def rollback_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Tokens that were taken back stay in the cache; only the count is right."""

    def faulty(self: PrunedLayer, tokens_to_remove: int) -> None:
        if self.is_initialized:
            self.seen += min(0, tokens_to_remove)
            self.sequence.end = self.seen

    patch.setattr(PrunedLayer, "crop", faulty)


@caught_by(contracts.test_a_cropped_cache_goes_on_as_before, "llava", EVERYWHERE, 3)
def length_not_rolled_back(patch: pytest.MonkeyPatch) -> None:
    original = PrunedLayer.crop

    def faulty(self: PrunedLayer, tokens_to_remove: int) -> None:
        end = self.sequence.end
        original(self, tokens_to_remove)
        self.sequence.end = end

    patch.setattr(PrunedLayer, "crop", faulty)


@caught_by(contracts.test_a_cropped_cache_goes_on_as_before, "llava", EVERYWHERE, 5)
def rollback_of_one_too_many(patch: pytest.MonkeyPatch) -> None:
    def faulty(self: PrunedLayer, tokens_to_remove: int) -> None:
        stay = self.keys.shape[2] + tokens_to_remove - 1
        self.keys, self.values = self.keys[:, :, :stay], self.values[:, :, :stay]
        self.index = self.index[..., :stay]
        self.seen += tokens_to_remove
        self.sequence.end = self.seen

    patch.setattr(PrunedLayer, "crop", faulty)


@caught_by(contracts.test_beam_search_scores_match_the_oracle, "llava_onevision", EVERYWHERE)
def beams_not_reordered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrunedLayer, "reorder_cache", lambda self, beams: None)


# -- merges at caches

merged_entries = merging.test_merged_entries_match_the_lists
merged_twice = merging.test_merges_of_what_was_merged_match_the_lists


def _absorbed_otherwise(patch: pytest.MonkeyPatch, other: Callable[..., Any]) -> None:
    """Merge entries by other pairs or weights than were decided."""
    original = prefill.absorb_entries

    def faulty(layer: Any, sample: int, source: Any, target: Any, merge: Any) -> None:
        original(layer, sample, *other(source, target, merge))

    patch.setattr(prefill, "absorb_entries", faulty)


@caught_by(merged_entries, "llava_onevision", "per-head", "alone", "sdpa")
def weights_of_keys_used_for_values(patch: pytest.MonkeyPatch) -> None:
    _absorbed_otherwise(patch, lambda *ends: (*ends[:2], replace(ends[2], value_weight=None)))


@caught_by(merged_entries, "qwen2_5_vl", "per-head-mass", "alone", "sdpa")
def merges_of_other_heads(patch: pytest.MonkeyPatch) -> None:
    """Each head absorbs what another one was to absorb."""

    def swapped(source: Any, target: Any, merge: Any) -> Any:
        weights = {"weight": merge.weight.flip(0), "value_weight": merge.value_weight.flip(0)}
        return source.flip(0), target.flip(0), replace(merge, **weights)

    _absorbed_otherwise(patch, swapped)


@caught_by(merged_entries, "qwen2_audio", "alike", "batch", "sdpa")
def merges_of_the_first_sample_alone(patch: pytest.MonkeyPatch) -> None:
    original = prefill.absorb_entries

    def faulty(layer: Any, sample: int, *args: Any) -> None:
        if sample == 0:
            original(layer, sample, *args)

    patch.setattr(prefill, "absorb_entries", faulty)


@caught_by(merged_entries, "llava_onevision", "alike-mass", "alone", "sdpa")
def mass_lost_when_entries_are_selected(patch: pytest.MonkeyPatch) -> None:
    original = PrunedLayer.select

    def faulty(self: PrunedLayer, columns: Any) -> None:
        original(self, columns)
        self.mass = None

    patch.setattr(PrunedLayer, "select", faulty)


@caught_by(merged_entries, "llava_onevision", "per-head-mass", "batch", "eager")
def mass_of_other_entries(patch: pytest.MonkeyPatch) -> None:
    """Entries are selected, their mass is just cut to length."""
    original = PrunedLayer.select

    def faulty(self: PrunedLayer, columns: Any) -> None:
        mass = self.mass
        original(self, columns)
        self.mass = None if mass is None else mass[..., -columns.shape[-1] :]

    patch.setattr(PrunedLayer, "select", faulty)


@caught_by(merged_entries, "qwen3_vl", "alike-mass", "alone", "eager")
def mass_adds_nothing_in_decoding(patch: pytest.MonkeyPatch) -> None:
    original = layers.mask_for_kernel
    patch.setattr(layers, "weighted_mask", lambda *given: original(*given[:-1], False))


@caught_by(merged_twice, "llava_onevision", "alone")
def mass_of_what_was_merged_counts_as_one(patch: pytest.MonkeyPatch) -> None:
    original = prefill.absorb_entries

    def faulty(layer: Any, *args: Any) -> None:
        layer.mass = None
        original(layer, *args)

    patch.setattr(prefill, "absorb_entries", faulty)


@caught_by(merging.test_stages_are_shown_attention_with_mass, "per-head-mass")
def attention_shown_without_mass(patch: pytest.MonkeyPatch) -> None:
    original = rows._blocks
    patch.setattr(
        rows, "_blocks", lambda attended, queries: original(replace(attended, mass=None), queries)
    )


@caught_by(merging.test_later_stages_see_merged_keys)
def stages_see_what_was_collected_before(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collecting, "_is_stored", lambda signal: False)


# -- what stages are shown, and what they promise


@caught_by(attention_at_caches, "llava", "alone", "none")
def query_heads_grouped_wrongly(patch: pytest.MonkeyPatch) -> None:
    """Query head h reads key-value head h % H instead of h // (heads / H)."""
    original = rows._blocks

    def faulty(attended: Any, queries: Any) -> Any:
        heads, kv_heads = attended.query.shape[1], attended.keys.shape[1]
        order = torch.arange(heads).view(-1, kv_heads).T.flatten()
        other = replace(attended, query=attended.query[:, order])
        return original(other, queries)

    patch.setattr(rows, "_blocks", faulty)


@caught_by(attention_at_caches, "qwen2_5_vl", "batch", "none")
def padding_takes_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rows, "query_mask", lambda *args: lambda places: None)


@caught_by(attention_at_caches, "llava_onevision", "alone", signals.BEFORE[1])
def attention_is_of_candidates_alone(patch: pytest.MonkeyPatch) -> None:
    """The softmax runs over media, not over all that a query sees."""
    original = rows.attention_rows

    def faulty(attended: Any, queries: Any, columns: Any, *args: Any) -> Any:
        found = original(attended, queries, columns, *args)
        return [one / one.sum(-1, keepdim=True) for one in found]

    patch.setattr(collecting, "attention_rows", faulty)


@caught_by(signals.test_blocks_of_rows_are_joined, "llava_onevision", pytest.MonkeyPatch())
def a_mean_of_the_last_block(patch: pytest.MonkeyPatch) -> None:
    """Blocks of query rows are not added up."""
    original = rows._Rows.add

    def faulty(self: Any, block: Any) -> None:
        if self._signal.reduce is not None:
            self._parts = []
        original(self, block)

    patch.setattr(rows._Rows, "add", faulty)


@caught_by(attention_at_layers, "qwen2_5_vl", "alone", "none")
def decisions_from_another_layer(patch: pytest.MonkeyPatch) -> None:
    """What the layer about to run attends to is computed from what entered the one before."""
    original = LayerCalls._probe_layer
    entered: list[Any] = []

    def faulty(
        self: LayerCalls, forward: Any, number: int, module: Any, hidden: Any, *args: Any, **kw: Any
    ):
        entered.append(hidden)
        other = entered[-2] if len(entered) > 1 else hidden
        return original(self, forward, number, module, other, *args, **kw)

    patch.setattr(LayerCalls, "_probe_layer", faulty)


@caught_by(signals.test_a_later_prompt_sees_what_came_before, "internvl")
def a_probe_that_forgets_the_past(patch: pytest.MonkeyPatch) -> None:
    original = LayerCalls._probe_layer

    def faulty(self: LayerCalls, forward: Any, *args: Any, **kw: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Forward, "layer", lambda self, number: None)
            return original(self, forward, *args, **kw)

    patch.setattr(LayerCalls, "_probe_layer", faulty)


@caught_by(signals.test_rotation_can_be_left_out, "llava_onevision")
def rotation_left_in(patch: pytest.MonkeyPatch) -> None:
    original = LayerCalls._probe_layer

    def faulty(self: LayerCalls, *args: Any, rotary: bool) -> Any:
        return original(self, *args, rotary=True)

    patch.setattr(LayerCalls, "_probe_layer", faulty)


@caught_by(hidden_states, "llava_onevision", "alone", signals.BEFORE[0])
def input_states_are_those_of_the_layer(patch: pytest.MonkeyPatch) -> None:
    """`Hidden(layer=INPUT)` shows what enters the layer at hand."""
    original = Collector._hidden

    def faulty(self: Collector, signal: Any, *args: Any) -> Any:
        return original(self, Hidden(), *args)

    patch.setattr(Collector, "_hidden", faulty)


@caught_by(hidden_states, "llava_onevision", "batch", signals.BEFORE[1])
def text_located_as_if_nothing_had_left(patch: pytest.MonkeyPatch) -> None:

    def faulty(self: Collector, stored: int) -> Any:
        last = stored - 1
        ahead = stored - self._flight.rows.shape[1]
        return [(one.text + ahead).clamp_max(last) for one in self._samples]

    patch.setattr(Collector, "_text_columns", faulty)


@caught_by(stages.test_merges_of_what_was_merged_match_the_oracle, "llava_onevision")
def merges_by_place_in_the_input(patch: pytest.MonkeyPatch) -> None:
    """At a layer, rows of the input are merged instead of where these tokens are by then."""
    original = Forward._merge

    def faulty_place(self: Flight, sample: int, tokens: Any) -> Any:
        return tokens.clamp_max(self.rows.shape[1] - 1)

    def faulty(self: Forward, *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Flight, "locate", faulty_place)
            return original(self, *args)

    patch.setattr(Forward, "_merge", faulty)


@caught_by(stages.test_merges_match_the_oracle, "qwen3_vl", Layer(0), "alone", "sdpa")
def features_of_early_layers_merged_at_the_input_alone(patch: pytest.MonkeyPatch) -> None:
    original = Forward._merge

    def faulty(self: Forward, hidden: Any, merges: Any) -> Any:
        deepstack = self._deepstack
        found = original(self, hidden, merges)
        self._deepstack = deepstack
        return found

    patch.setattr(Forward, "_merge", faulty)


@caught_by(stages.test_each_modality_alone_matches_the_oracle, "qwen2_5_omni", "cache", "alone")
def others_dropped_with_the_candidates(patch: pytest.MonkeyPatch) -> None:
    """A cache stage that acts on sound alone drops the frames."""
    patch.setattr(prefill, "_without", lambda rows, candidates, kept: kept)


@caught_by(stages.test_no_token_left_matches_the_oracle, "llava_onevision", Layer(2), "batch")
def one_token_always_stays(patch: pytest.MonkeyPatch) -> None:
    original = Prefill.tokens

    def faulty(self: Prefill) -> Any:
        for sample in self.samples:
            if not len(sample.alive):
                sample.alive = torch.zeros(1, dtype=torch.int64)
        return original(self)

    patch.setattr(Prefill, "tokens", faulty)


@caught_by(context.test_encoder_views_are_the_tower_s_attention, "llava", "alone")
def class_token_left_in_the_softmax(patch: pytest.MonkeyPatch) -> None:
    """Its column is dropped, but rows are not normalised again."""

    def faulty(self: StreamedView, query: Any, views: slice, *bias: Any) -> Any:
        scores = (query @ self._key[views].transpose(2, 3)).float() * self._scaling
        yield scores.softmax(dim=-1).mean(dim=1)[..., self._prefix :]

    patch.setattr(StreamedView, "_blocks", faulty)


@caught_by(contracts.test_baselines_keep_the_count_they_were_told, "llava_next", "input", 0.7)
def shares_rounded_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(budget, "count", lambda share, total: max(1, int(share * total)))


@caught_by(contracts.test_only_patches_are_in_the_layout, "llava_next")
def newlines_are_pruned(patch: pytest.MonkeyPatch) -> None:
    """Separators count as patches."""
    original = LlavaNext.items

    def faulty(self: LlavaNext, *args: Any) -> list[Item]:
        return [Item.grid(1, 1, len(item.real), video=False) for item in original(self, *args)]

    patch.setattr(LlavaNext, "items", faulty)


@caught_by(test_adapters.test_align_packs_a_map_as_the_model_packs_a_feature, "qwen2_5_vl", False)
def window_order_not_undone(patch: pytest.MonkeyPatch) -> None:
    """The tower's map stays in the order of its attention windows."""

    def faulty(self: Qwen2_5VL, grids: Any) -> Any:
        merged = sum(frames * rows * columns for frames, rows, columns in grids)
        return torch.arange(merged // self._merge() ** 2)

    patch.setattr(Qwen2_5VL, "_order", faulty)


@caught_by(contracts.test_the_same_input_gives_the_same_selection, "llava_onevision", INPUT)
def draws_from_the_global_generator(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(baselines, "_draws", lambda shape, *args: torch.rand(shape))


@caught_by(contracts.test_a_left_padded_batch_equals_each_alone, "llava", INPUT)
def draws_differ_by_row(patch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    patch.setattr(baselines, "_draws", lambda shape, *args: torch.rand(shape, generator=generator))


# -- what is left behind


@caught_by(contracts.test_the_model_is_as_before, "llava_next_video", INPUT)
def attention_not_restored(patch: pytest.MonkeyPatch) -> None:
    original = hooks.switch_attention

    def faulty(stack: Any, config: Any, *args: Any) -> None:
        name = "_attn_implementation_internal"
        patch.setattr(config, name, getattr(config, name))  # to be put right after the test
        stack.callback(setattr, config, name, "eager")
        original(stack, config, *args)

    patch.setattr(patching, "switch_attention", faulty)


@caught_by(contracts.test_the_model_is_as_before_after_an_exception, "llava", "layer")
def hooks_stay_after_an_exception(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    left: list[ExitStack] = []

    class Leaky(ExitStack):
        def __exit__(self, *error: Any) -> bool:
            if error[0] is None:
                return super().__exit__(*error) or False
            left.append(self.pop_all())
            return False

    patch.setattr(patching, "ExitStack", Leaky)

    def clean() -> None:
        for one in left:
            one.close()

    return clean


# -- later stages, and groups


@caught_by(late.test_what_the_last_pruning_left_can_be_cleaned_up, "llava_onevision", "alone")
def everything_is_called_alive(patch: pytest.MonkeyPatch) -> None:
    """What went through all layers is taken from before they ran."""
    patch.setattr(
        "tokenprune.engine.prompt.Sample.mask", lambda self: torch.ones(len(self.layout)).bool()
    )


@caught_by(
    late.test_stages_after_prefill_match_the_oracle,
    "llava_onevision", "alone", late.SEEN[1], late.BEFORE[1],
)  # fmt: skip
def late_columns_of_the_first_head(patch: pytest.MonkeyPatch) -> None:
    """All heads keep the columns that the first one stores the kept tokens at."""
    original = Entries._columns

    def faulty(self: Entries, sample: Any, kept: Any) -> Any:
        found = original(self, sample, kept)
        return found[:1].expand_as(found)

    patch.setattr(Entries, "_columns", faulty)


@caught_by(
    late.test_stages_while_decoding_match_the_oracle, "llava_onevision", "alone", late.SINCE[0], 3
)
def a_decision_a_step_late(patch: pytest.MonkeyPatch) -> None:
    original = later._is_due
    patch.setattr(later, "_is_due", lambda step, decoded: original(step, decoded - 1))


@caught_by(late.test_candidates_are_of_all_prompts, "llava", Cache(after="prefill"))
def candidates_of_the_last_prompt_alone(patch: pytest.MonkeyPatch) -> None:
    original = entries.join_layouts

    def faulty(prompts: Any, sample: int) -> Any:
        return original(prompts[-1:], sample)

    patch.setattr("tokenprune.engine.late.join_layouts", faulty)


@caught_by(
    groups.test_pruned_groups_match_the_oracle,
    "llava_onevision", groups.RECIPES[1], groups.SIZES[0], "sdpa",
)  # fmt: skip
def a_group_boundary_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Positions of a group are those of the tokens before its own."""
    original = parts.cut_call

    def faulty(kwargs: Any, start: int, stop: int, past: int) -> Any:
        cut = original(kwargs, start, stop, past)
        if start > past and cut.get("position_ids") is not None:
            cut["position_ids"] = cut["position_ids"] - 1
        elif start > past:
            cut["inputs_embeds"] = kwargs["inputs_embeds"][:, start - past - 1 : stop - past - 1]
        return cut

    patch.setattr(run, "cut_call", faulty)


@caught_by(
    groups.test_pruned_groups_match_the_oracle,
    "llava_onevision", groups.RECIPES[3], groups.SIZES[0], "sdpa",
)  # fmt: skip
def what_asks_for_the_text_sees_the_last_group_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Schedule,
        "with_question",
        property(lambda self: Schedule(self.adapter, self.steps)),
    )


@caught_by(sequences.test_a_bookmark_takes_state_and_prompts_back)
def state_not_rolled_back(patch: pytest.MonkeyPatch) -> None:
    original = Sequence.restore

    def faulty(self: Sequence, snapshot: Any) -> None:
        state = getattr(self, "state", {})
        original(self, snapshot)
        self.state = state

    patch.setattr(Sequence, "restore", faulty)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    MUTANTS.check(name)


def test_there_are_enough_mutants() -> None:
    assert len(MUTANTS) >= 40
