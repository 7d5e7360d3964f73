"""Contracts of merges at caches: what entries become, what they stand for, and what is refused."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

from tests.contract import test_sessions
from tests.contract.cache_oracle import replayed_logits
from tests.contract.cases import drawn
from tests.contract.doubles import Absorb, Fold, Spy
from tests.contract.test_contracts import OF_TEXT, beam_kinds, flash, second_turn, shifted
from tests.contract.test_sessions import ask, same
from tests.contract.test_stages import FEW, families
from tokenprune import Session, prune
from tokenprune.adapters.base import adapter_for
from tokenprune.core.context import Context
from tokenprune.core.recipe import Recipe
from tokenprune.core.registry import METHODS, list_methods, method
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.signal import Attention, Keys
from tokenprune.core.site import Cache, Layer
from tokenprune.core.stage import Stage
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.engine.rows import Attended, attention_rows
from tokenprune.errors import RecipeError, UnsupportedModelError
from tokenprune.plan.forecast import Prompt, forecast
from tokenprune.testing.harness import (
    NEW_TOKENS,
    generate,
    logits_of,
    model_of,
    prompt_of,
    replay_of,
    sample_of,
    unpruned,
    windows_of,
)
from tokenprune.testing.oracle import Replay, assert_close, positions_logged, read_decisions
from tokenprune.testing.tiny import FAMILIES, decoder_of

FOLDS = {
    "alike": Fold(),
    "alike-mass": Fold(mass=True),
    "per-head": Fold(per_head=True, apart=True),
    "per-head-mass": Fold(per_head=True, apart=True, mass=True),
}
folds = pytest.mark.parametrize("fold", FOLDS)
watched = test_sessions.watched  # a fixture


def assert_replayed(name: str, recipe: Recipe, kind: str, attention: str = "sdpa") -> Any:
    """Under a recipe the logits are those of the plain lists; returns the report."""
    before = unpruned(name, kind, attention)
    one = before.one
    with prune(one.model, recipe) as report:
        output = generate(one, before.inputs)
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = replayed_logits(one.model, before.inputs, read, replay, before.positions)
    assert_close(logits_of(output), expected[:, before.prompt_length - 1 :])
    return report


def prunes_caches(name: str) -> bool:
    """Whether any layer of a family has a cache that stages may change."""
    return None in windows_of(model_of(name))


# -- what is left equals the second oracle


@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", families())
def test_without_decisions_the_lists_are_the_model(name: str, kind: str) -> None:
    run = unpruned(name, kind)
    expected = replayed_logits(run.one.model, run.inputs, run.read, Replay(), run.positions)
    assert_close(logits_of(run.output), expected[:, run.prompt_length - 1 :])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["alone", "batch"])
@folds
@pytest.mark.parametrize("name", families())
def test_merged_entries_match_the_lists(name: str, fold: str, kind: str, attention: str) -> None:
    report = assert_replayed(name, Recipe(FOLDS[fold]), kind, attention)
    heads = decoder_of(model_of(name).model).config.num_key_value_heads
    assert bool(report.last.decisions) == prunes_caches(name)
    for decision in report.last.decisions:
        pairs = (heads, decision.candidates)
        assert decision.kept.shape == (heads, -(-decision.candidates // 3))
        assert decision.merge is not None and decision.merge.mass == FOLDS[fold].mass
        assert decision.merge.source.shape == decision.merge.weight.shape == pairs


@folds
@pytest.mark.parametrize("name", families())
def test_merges_among_other_stages_match_the_lists(name: str, fold: str) -> None:
    recipe = Recipe(
        Absorb(), "random(keep=0.8 at=1) + random(keep=0.8 at=cache)", FOLDS[fold],
        "random(keep=0.6 at=cache)",
    )  # fmt: skip
    assert_replayed(name, recipe, "batch")


@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", families())
def test_merges_of_what_was_merged_match_the_lists(name: str, kind: str) -> None:
    again = replace(FOLDS["per-head-mass"], at=Cache((0, 2, 3)))
    recipe = Recipe(FOLDS["alike-mass"], again, "random(keep=0.7 at=cache)", Fold(at=Cache((2,))))
    assert_replayed(name, recipe, kind)


@pytest.mark.parametrize("name", families())
def test_a_merge_of_all_heads_matches_the_lists(name: str) -> None:
    """The stage that merges features merges entries, if it is put at a cache."""
    assert_replayed(name, Recipe("random(keep=0.7 at=cache)", Absorb(at=Cache((1, 4)))), "batch")


# -- turns, beams, sessions


@pytest.mark.parametrize("kind", ["alone", "batch"])
@folds
@pytest.mark.parametrize("name", families())
def test_a_second_turn_matches_the_lists(name: str, fold: str, kind: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one, kind)
    recipe = Recipe("random(keep=0.8 at=1)", FOLDS[fold], "random(keep=0.8 at=cache)")
    with positions_logged(decoder_of(one.model)) as log:
        second_turn(one, inputs)
    with prune(one.model, recipe) as report:
        output, length = second_turn(one, inputs)
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = replayed_logits(one.model, inputs, read, replay, log.whole())
    assert_close(logits_of(output), expected[:, length - 1 :])


def two_prompts(name: str, recipe: Recipe) -> Any:
    """An answer, a second prompt with media of its own on the same cache, and what is expected."""
    one = model_of(name)
    first, new = one.inputs(0, 7), one.inputs(3, 5)
    with prune(one.model, recipe) as report:
        begun = generate(one, first)
        tokens = torch.cat([begun.sequences, new["input_ids"]], dim=1)
        inputs = {**new, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        output = generate(one, inputs, **{CACHE_NAME: begun.past_key_values})
    read = output.sequences[:, :-1]
    whole = {key: torch.cat([first[key], new[key]]) for key in new if key not in OF_TEXT}
    whole["input_ids"] = tokens
    replay = replay_of(one, recipe, report.calls, *read.shape)
    shares: dict[int, Tensor] = {}
    expected = replayed_logits(one.model, whole, read, replay, shares=shares)
    return report, logits_of(output), expected[:, tokens.shape[1] - 1 :], shares


@folds
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_audio"])
def test_new_media_on_a_merged_cache_match_the_lists(name: str, fold: str) -> None:
    report, got, expected, _ = two_prompts(name, Recipe("random(keep=0.8 at=1)", FOLDS[fold]))
    assert len(report.calls) == 2 and all(call.decisions for call in report.calls)
    assert_close(got, expected)


@folds
@pytest.mark.parametrize("name", families())
def test_beams_match_the_lists(name: str, fold: str) -> None:
    one = model_of(name)
    kinds = beam_kinds(name)
    if not kinds:
        pytest.skip("transformers cannot repeat its prompts")
    recipe = Recipe(FOLDS[fold], "random(keep=0.7 at=cache)")
    for kind in kinds:
        with prune(one.model, recipe) as report:
            output = generate(one, prompt_of(one, kind), num_beams=2, output_scores=True)
        for row in range(len(output.sequences)):
            calls = sample_of(report.calls, row * 2)
            replay = replay_of(one, recipe, calls, 1, output.sequences.shape[1] - 1)
            single_kind = ("alone", "second")[row] if kind == "batch" else kind
            single = prompt_of(one, single_kind)
            read = single["input_ids"].shape[1] + NEW_TOKENS
            sequence = output.sequences[row : row + 1, -read:]
            replay = shifted(replay, output.sequences.shape[1] - read)
            positions = unpruned(name, single_kind).positions
            logits = replayed_logits(one.model, single, sequence[:, :-1], replay, positions)
            chances = logits[0, -NEW_TOKENS:].log_softmax(-1)
            score = chances.gather(1, sequence[0, -NEW_TOKENS:, None]).sum() / NEW_TOKENS
            assert_close(output.sequences_scores[row], score, "beam scores")


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that recipes can name, for one test only."""
    list_methods()
    monkeypatch.setattr(METHODS, "claims", dict(METHODS.claims))

    @method("folding")
    @dataclass(frozen=True, kw_only=True)
    class Folding(Fold):
        """As `Fold`."""


SESSIONS = ["folding()", "folding(per_head=true apart=true mass=true)"]
seen = pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])


@seen
@pytest.mark.parametrize("recipe", SESSIONS)
def test_watched_groups_match_the_lists(
    name: str,
    recipe: str,
    watched: Any,
    folding: None,
) -> None:
    run = watched(name)
    with run.session(recipe) as session:
        output = ask(session)
        calls = list(session.report.calls)
    assert len(calls) == 2
    read = output.sequences[:, :-1]
    heads = decoder_of(run.loaded.model).config.num_key_value_heads
    replay = read_decisions(calls, 1, read.shape[1], heads)
    expected = replayed_logits(run.loaded.model, run.inputs, read, replay, run.positions)
    assert_close(logits_of(output), expected[:, run.inputs["input_ids"].shape[1] - 1 :])


@seen
@pytest.mark.parametrize("recipe", SESSIONS)
def test_questions_and_files_leave_a_merged_cache_as_it_was(
    name: str,
    recipe: str,
    watched: Any,
    folding: None,
    tmp_path: Path,
) -> None:
    run = watched(name)
    with run.session(recipe) as session:
        expected = ask(session)
        ask(session, "and who is this?", num_beams=2, num_return_sequences=2)
        assert same(ask(session), expected)
        session.save(tmp_path / "kept.safetensors")
        session.watch(run.video, frames=7)
        longer = ask(session)
    model, processor = run.loaded.model, run.loaded.processor
    with Session.load(tmp_path / "kept.safetensors", model, processor) as session:
        assert same(ask(session), expected)
        session.watch(run.video, frames=7)
        assert same(ask(session), longer)


# -- nothing to merge, and bytes


@dataclass(frozen=True, eq=False)
class Itself(Stage):
    """Keeps all there is; each entry absorbs itself, or pairs of weight 0 stand in for others."""

    weight: float = 1.0
    mass: bool = False

    site = Cache()
    name = "itself"

    def select(self, context: Context) -> Selection:
        index = torch.arange(len(context))
        weight = torch.full((len(context),), self.weight)
        target = index if self.weight else torch.zeros_like(index)
        return Selection(index, Merge(index, target, weight, mass=self.mass))


@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("stage", [Itself(), Itself(0.0, True)], ids=["itself", "filling"])
@pytest.mark.parametrize("name", families())
def test_merging_nothing_is_bit_identical(name: str, stage: Stage, kind: str) -> None:
    before = unpruned(name, kind)
    with prune(before.one.model, stage):
        output = generate(before.one, before.inputs)
    assert torch.equal(logits_of(output), logits_of(before.output))
    assert all(layer.mass is None for layer in output.past_key_values.layers)


def test_a_mass_of_one_changes_nothing() -> None:
    before = unpruned("llava")
    with prune(before.one.model, Itself(1.0, True)):
        output = generate(before.one, before.inputs)
    assert_close(logits_of(output), logits_of(before.output))
    assert all(bool((layer.mass == 1).all()) for layer in output.past_key_values.layers)


@folds
@pytest.mark.parametrize("name", families())
def test_merged_caches_take_fewer_bytes(name: str, fold: str) -> None:
    one = model_of(name)
    with prune(one.model, FOLDS[fold]) as report:
        output = generate(one, prompt_of(one))
    total, windows = len(report.last.layouts[0]), windows_of(one)
    layers = [
        layer
        for layer, window in zip(output.past_key_values.layers, windows, strict=True)
        if window is None
    ]
    fewer = 0
    for layer in layers:
        stored = (layer.keys, layer.values)
        assert layer.keys.shape[2] == layer.seen - total + -(-total // 3)
        assert [one.untyped_storage().nbytes() for one in stored] == [one.nbytes for one in stored]
        entry = sum(one.nbytes for one in stored) // layer.keys.shape[2]
        fewer += entry * (total - -(-total // 3))
    if None in windows and not any(windows):
        assert report.kv_bytes.before - report.kv_bytes.after == fewer


@folds
@pytest.mark.parametrize("name", families())
def test_a_plan_counts_what_will_be_left(name: str, fold: str) -> None:
    one = model_of(name)
    inputs, adapter = prompt_of(one), adapter_for(one.model)
    with prune(one.model, FOLDS[fold]) as report:
        generate(one, inputs, max_new_tokens=1)
    steps = Recipe(FOLDS[fold]).steps(adapter.shape)
    planned = forecast(Prompt.of(adapter, inputs), steps)
    assert planned.exact == [True]
    assert torch.equal(planned.call.media_entries, report.last.media_entries)
    assert planned.call.kv_bytes_after == report.last.kv_bytes_after


# -- mass


@pytest.mark.parametrize("fold", ["alike-mass", "per-head-mass"])
def test_flash_kernels_are_replaced_and_the_report_says_so(
    fold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model_of("llava")
    with prune(one.model, FOLDS[fold]):
        expected = generate(one, prompt_of(one))
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_emulated", flash)
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, "flash_emulated", flash_attention_mask)
    config = decoder_of(one.model).config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_emulated")
    flash.calls = 0
    with prune(one.model, FOLDS[fold]) as report:
        output = generate(one, prompt_of(one))
    assert flash.calls == config.num_hidden_layers  # all of the prefill, and nothing after it
    assert torch.equal(output.sequences, expected.sequences)
    assert_close(logits_of(output), logits_of(expected))
    assert report.last.warnings == [
        "flash_emulated cannot express the pruned mask: sdpa served instead"
    ]


@pytest.mark.parametrize("fold", ["alike-mass", "per-head-mass"])
def test_stages_are_shown_attention_with_mass(fold: str) -> None:
    signal = Attention(queries=2, reduce=None, heads=None)
    spy = Spy(site=Cache(), needs=(signal,))
    # What is collected before a layer runs, from the cache as it is by then.
    ahead = Spy(site=Layer(2), needs=(signal,))
    report, _, _, shares = two_prompts("llava", Recipe(spy, ahead, FOLDS[fold]))
    first, second = report.calls
    assert max(call.length for call in report.calls) == second.length
    checked = 0
    for context, found in [*spy.seen, *ahead.seen]:
        position = context.layout.position
        length = second.length if int(position[0]) >= first.length else first.length
        layer = shares[context.layer if context.layer is not None else 2][0]
        assert_close(found[signal], layer[:, length - 2 : length][..., position], "attention")
        checked += 1
    assert checked == 2 * (len(shares) + 1)


def test_one_entry_of_mass_n_takes_the_attention_of_n() -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 6, 8, generator=draw) for _ in range(2))
    keys[:, :, 2:5] = keys[:, :, 2:3]
    query = torch.randn(1, 4, 1, 8, generator=draw)
    index, rows = torch.arange(6)[None, None], torch.tensor([[5]])
    signal = Attention(queries=1, reduce=None, heads=None)

    def shown(chosen: list[int], mass: Tensor | None) -> Tensor:
        attended = Attended(
            query,
            keys[:, :, chosen],
            values[:, :, chosen],
            None,
            rows,
            index[..., chosen],
            {},
            mass,
        )
        every = torch.arange(len(chosen))
        return attention_rows(attended, [torch.tensor([0])], [every], signal, False)[0]

    alone = shown([0, 1, 2, 3, 4, 5], None)[:, 0]  # [heads, 6]
    merged = shown([0, 1, 2, 5], torch.tensor([[[1.0, 1, 3, 1]]]))[:, 0]
    torch.testing.assert_close(merged[:, 2], alone[:, 2:5].sum(-1))
    torch.testing.assert_close(merged[:, [0, 1, 3]], alone[:, [0, 1, 5]])


def test_later_stages_see_merged_keys() -> None:
    """Also if they were collected before, for a stage at the next layer."""
    first, last = Spy(site=Cache((1,))), Spy(site=Cache((1,)), needs=(Keys(),))
    before = Spy(site=Cache((1,)), needs=(Keys(),))
    collecting = Spy(site=Layer(2), needs=(Keys(layer=-1),))
    one = model_of("llava")
    with prune(one.model, Recipe(before, Fold(at=Cache((1,))), last, first, collecting)):
        generate(one, prompt_of(one), max_new_tokens=1)
    [(_, old)], [(_, new)], [(_, told)] = before.seen, last.seen, collecting.seen
    keys = old[Keys()]  # [H, N, d]
    whole = keys.shape[1] // 3 * 3
    parts = keys[:, :whole].unflatten(1, (-1, 3))  # [H, n, 3, d]
    expected = 1.25 * parts[:, :, 0] + 0.5 * parts[:, :, 1] - 0.25 * parts[:, :, 2]
    torch.testing.assert_close(new[Keys()][:, : whole // 3], expected)
    torch.testing.assert_close(told[Keys(layer=-1)], keys)  # what the layer attended with


# -- taking tokens back


@torch.no_grad()
def test_a_crop_that_parts_what_was_merged_is_refused() -> None:
    one = model_of("llava")
    with prune(one.model, Fold(mass=True)) as report:

        def cropped(length: int) -> Any:
            cache = one.model(**prompt_of(one), use_cache=True).past_key_values
            total = cache.get_seq_length()
            try:
                cache.crop(length - total)
            finally:
                assert len({layer.seen for layer in cache.layers}) == 1, "some went back"
            return cache

        total = cropped(1000).get_seq_length()
        position = report.last.layouts[0].position.tolist()
        groups = [position[at : at + 3] for at in range(0, len(position), 3)]
        inside = {at for one in groups for at in range(one[0] + 1, one[-1] + 1)}
        assert 10 < len(inside) < total // 2 + 10
        for length in range(1, total):
            if length in inside:
                with pytest.raises(
                    UnsupportedModelError, match=f"back to {length} tokens: some fr"
                ):
                    cropped(length)
            else:
                assert cropped(length).get_seq_length() == length


@torch.no_grad()
def test_a_cache_goes_on_after_a_crop_and_after_a_refused_one() -> None:
    run = unpruned("llava")
    one, length = run.one, run.prompt_length
    recipe = Recipe(FOLDS["per-head-mass"])
    with prune(one.model, recipe) as report:
        cache = one.model(**run.inputs, use_cache=True).past_key_values
        position = report.last.layouts[0].position
        with pytest.raises(UnsupportedModelError, match="merged into one entry"):
            cache.crop(int(position[1]) - length)
        assert cache.get_seq_length() == length
        cache.crop(-3)
        tokens = run.read[:, length - 3 :]
        got = one.model(input_ids=tokens, **{CACHE_NAME: cache}, use_cache=True).logits
        cache.crop(int(position[0]) - run.read.shape[1])  # before all that was merged
        text = run.read[:, length:]
        plain = one.model(input_ids=text, **{CACHE_NAME: cache}, use_cache=True).logits
    replay = replay_of(one, recipe, report.calls, *run.read.shape)
    replay.dropped = [(layer, length - 3, mask) for layer, _, mask in replay.dropped]
    replay.absorbed = [(layer, length - 3, *rest) for layer, _, *rest in replay.absorbed]
    expected = replayed_logits(one.model, run.inputs, run.read, replay, run.positions)
    assert_close(got, expected[:, length - 3 :])
    ids = torch.cat([run.read[:, : int(position[0])], text], dim=1)
    assert_close(plain, one.model(input_ids=ids).logits[:, -text.shape[1] :])


# -- what is refused


@dataclass(frozen=True, eq=False)
class Merging(Stage):
    """Keeps the first two of three candidates, and merges as it is told."""

    merge: Merge
    site: Any = Cache()

    name = "merging"

    def select(self, context: Context) -> Selection:
        return Selection(torch.tensor([0, 1]), self.merge)


ONE, TWO = torch.tensor([1]), torch.tensor([2])
HEADS = torch.zeros(7, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("merge", "site", "message"),
    [
        (Merge(ONE, TWO, torch.ones(1)), Cache(), "merges into tokens that it does not keep"),
        (Merge(-ONE, ONE, torch.ones(1)), Cache(), "merges others than its 32 candidates"),
        (Merge(ONE, ONE * 32, torch.zeros(1)), Cache(), "merges others than its 32 candidates"),
        (Merge(TWO, ONE, torch.tensor([torch.nan])), Cache(), "weights that are not finite"),
        (
            Merge(TWO, ONE, torch.ones(1), torch.tensor([torch.inf])),
            Cache(),
            "weights that are not finite",
        ),
        (Merge(HEADS, HEADS, HEADS.float()), Cache(), r"must merge \[M\] or \[2, M\] pairs, got"),
        (Merge(HEADS, HEADS, HEADS.float()), Layer(1), "pairs for each head, value_weight and m"),
        (Merge(TWO, ONE, torch.ones(1), mass=True), Layer(1), "value_weight and mass are for cach"),
        (Merge(TWO, ONE, torch.ones(1), torch.ones(1)), Layer(1), "value_weight and mass are for"),
    ],
)
def test_what_cannot_be_merged_is_refused(merge: Merge, site: Any, message: str) -> None:
    one = model_of("llava")
    with pytest.raises(RecipeError, match=message), prune(one.model, Merging(merge, site)):
        generate(one, prompt_of(one))


# -- by chance


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n < 20 else (pytest.mark.full,)) for n in range(100)]
)
def test_merges_in_a_recipe_made_up_by_chance_match_the_lists(seed: int) -> None:
    name, text, kind, attention = drawn(1000 + seed)
    draw = random.Random(seed)
    steps: list[Any] = [one for one in text.split(" + ") if one != "none"]
    modalities = adapter_for(model_of(name).model).modalities
    for _ in range(draw.randint(1, 3)):
        fold = Fold(
            at=draw.choice([Cache(), Cache((0, 3)), Cache((1, 2, 4))]),
            on=draw.choice([None, None, draw.choice(modalities)]),
            mass=draw.random() < 0.6,
            per_head=draw.random() < 0.6,
            apart=draw.random() < 0.5,
        )
        steps.insert(draw.randint(0, len(steps)), fold)
    try:
        assert_replayed(name, Recipe(*steps), kind, attention)
    except RecipeError as error:
        assert "acts on" in str(error) and "key-value heads hold" in str(error)


def test_the_short_suite_has_families() -> None:
    assert {*FEW} <= {*FAMILIES}
