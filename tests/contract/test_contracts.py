"""The nine contracts (design, section 3) over the registries of methods and of tiny models.

`make test` runs what `cases.py` calls short; `-m "full or not full"` runs the whole product.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

from tests.contract.beams import failure_of_beams
from tests.contract.cases import (
    CASES,
    COMBINED,
    ELSEWHERE,
    EVERYWHERE,
    MROPE,
    ONE_PER_SITE,
    REFUSALS,
    SEPARATORS,
    THREE,
    drawn,
    keep_all,
    methods_of,
    product,
    refusal,
    uses,
)
from tests.contract.memory import Watch
from tokenprune import prune
from tokenprune.adapters.base import adapter_for, list_models
from tokenprune.core.context import Candidates
from tokenprune.core.recipe import Recipe
from tokenprune.core.registry import list_methods
from tokenprune.core.site import Cache, Input, Layer
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.testing.harness import (
    NEW_TOKENS,
    Run,
    assert_matches_oracle,
    generate,
    logits_of,
    model_of,
    prompt_of,
    pruned,
    replay_of,
    same,
    sample_of,
    second_turn,
    unpruned,
    windows_of,
)
from tokenprune.testing.oracle import assert_close, dense_logits, positions_logged
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import FAMILIES, NAMES, PAD, decoder_of
from tokenprune.testing.tiny.releases import OLD

OF_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Inputs with one entry a token; others have one an image, clip or sound."""

over_product = pytest.mark.parametrize("name, recipe", product())
in_use = pytest.mark.parametrize("name, recipe", uses())


# -- the suite itself


def test_every_method_has_cases() -> None:
    assert {*CASES, *ELSEWHERE} == set(list_methods())
    for method, recipes in CASES.items():
        for text in recipes:
            assert [one.name for one in Recipe.parse(text).methods] == [method]


def test_every_family_has_a_tiny_model() -> None:
    served = {type(adapter_for(model_of(name).model)) for name in NAMES}
    assert served == set(list_models().values())


def test_every_site_is_in_the_short_suite() -> None:
    shape = adapter_for(model_of("llava").model).shape
    for recipes in (ONE_PER_SITE, EVERYWHERE.split(" + ")):
        steps = [step for text in recipes for step in Recipe.parse(text).steps(shape)]
        assert {type(step.stage.site) for step in steps} >= {Input, Layer, Cache}


def test_refusals_name_methods_and_families() -> None:
    for method, name in REFUSALS:
        assert method in CASES and name in NAMES


@pytest.mark.parametrize("name, recipe", product(refused=True))
def test_what_is_on_the_list_of_refusals_is_refused(name: str, recipe: str) -> None:
    one = model_of(name)
    before = snapshot(one.model)
    with pytest.raises(UnsupportedModelError), prune(one.model, recipe):
        generate(one, prompt_of(one))
    assert snapshot(one.model) == before


# -- 1. nothing to prune: bit-identical, and the model as it was


@over_product
def test_keep_all_is_bit_identical(name: str, recipe: str) -> None:
    run = pruned(name, keep_all(recipe))
    assert same(run.output, unpruned(name).output)
    for decision, candidates in run.replay.steps:
        assert torch.equal(decision.kept, candidates), decision


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["alone", "batch"])
def test_the_empty_recipe_is_bit_identical(name: str, kind: str) -> None:
    assert same(pruned(name, "none", kind).output, unpruned(name, kind).output)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_keep_all_forward_is_bit_identical(name: str, use_cache: bool) -> None:
    one = model_of(name)
    inputs = prompt_of(one)
    expected = one.model(**inputs, use_cache=use_cache).logits
    with prune(one.model, keep_all(EVERYWHERE)):
        assert torch.equal(one.model(**inputs, use_cache=use_cache).logits, expected)


@over_product
def test_the_model_is_as_before(name: str, recipe: str) -> None:
    one = model_of(name)
    expected = unpruned(name).output
    before = snapshot(one.model)
    with prune(one.model, recipe):
        generate(one, prompt_of(one), max_new_tokens=2)
    assert snapshot(one.model) == before
    assert same(generate(one, prompt_of(one)), expected)


class Stop(Exception):
    """Raised inside a run."""


TOWERS = (
    "visual",
    "vision_tower",
    "vision_model",
    "video_tower",
    "audio_tower",
    "encoder",
    "embed_tokens_extend",
)
"""What base models call the tower that they run first."""


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("where", ["tower", "layer", "decoding", "block"])
def test_the_model_is_as_before_after_an_exception(name: str, where: str) -> None:
    one = model_of(name)
    expected = unpruned(name).output
    before = snapshot(one.model)
    count = 0

    def fail(module: nn.Module, *args: Any) -> None:
        nonlocal count
        count += 1
        if where != "decoding" or count == 3:
            raise Stop

    module = decoder_of(one.model).layers[3]
    if where == "tower":
        base = adapter_for(one.model).base_model
        module = next(getattr(base, name) for name in TOWERS if hasattr(base, name))
    recipe = EVERYWHERE if refusal("vflowopt", name) else EVERYWHERE + " + vflowopt(keep=0.9)"
    with pytest.raises(Stop), prune(one.model, recipe):
        if where == "block":
            generate(one, prompt_of(one))
            raise Stop
        handle = module.register_forward_pre_hook(fail)
        try:
            generate(one, prompt_of(one))
        finally:
            handle.remove()
    assert snapshot(one.model) == before
    assert same(generate(one, prompt_of(one)), expected)
    # And it can be pruned again.
    again = pruned(name, EVERYWHERE)
    with prune(one.model, EVERYWHERE):
        assert same(generate(one, prompt_of(one)), again.output)


def test_two_patches_at_once_are_refused() -> None:
    one = model_of("llava")
    with prune(one.model, "none"), pytest.raises(UnsupportedModelError, match="already inside"):
        with prune(one.model, "none"):
            pass
    assert same(generate(one, prompt_of(one)), unpruned("llava").output)


def test_two_models_can_be_pruned_at_once() -> None:
    first, second = model_of("llava"), model_of("qwen3_vl")
    with prune(first.model, EVERYWHERE), prune(second.model, EVERYWHERE):
        one, other = generate(first, prompt_of(first)), generate(second, prompt_of(second))
    assert same(one, pruned("llava", EVERYWHERE).output)
    assert same(other, pruned("qwen3_vl", EVERYWHERE).output)


# -- 2. what remains equals the oracle


@over_product
def test_prefill_and_decoding_match_the_oracle(name: str, recipe: str) -> None:
    run = pruned(name, recipe)
    assert_matches_oracle(run)
    # Agreement would mean nothing if pruning had not moved the logits.
    moved = (logits_of(run.output) - logits_of(unpruned(name).output)).abs().max()
    assert moved > 1e-3


@over_product
def test_a_left_padded_batch_matches_the_oracle(name: str, recipe: str) -> None:
    assert_matches_oracle(pruned(name, recipe, "batch"))


@pytest.mark.parametrize("name, recipe", uses([EVERYWHERE, COMBINED[1]], tuple(FAMILIES)))
@pytest.mark.parametrize("kind", ["alone", "batch"])
def test_eager_attention_matches_the_oracle(name: str, recipe: str, kind: str) -> None:
    assert_matches_oracle(pruned(name, recipe, kind, "eager"))


@pytest.mark.parametrize("name", NAMES)
def test_eager_attention_keep_all_is_bit_identical(name: str) -> None:
    run = pruned(name, keep_all(EVERYWHERE), "alone", "eager")
    assert same(run.output, unpruned(name, "alone", "eager").output)


def flash(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """All that flash kernels can express: which keys are valid, and queries at the end of them."""
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), keys) and attention_mask.dtype == torch.bool
    if position_ids is not None and len(query) == 1 and queries > 1:
        assert (position_ids.diff() == 1).all(), "taken for packed sequences"
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :]
    share = query.shape[1] // key.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(share, 1),
        value.repeat_interleave(share, 1),
        attn_mask=visible,
        scale=scaling,
    )
    flash.calls += 1
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("name, recipe", uses([EVERYWHERE, *ONE_PER_SITE[:1]], tuple(FAMILIES)))
@pytest.mark.parametrize("kind", ["alone", "batch"])
def test_flash_attention_matches_sdpa(
    name: str, recipe: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pruned(name, recipe, kind).output
    one = model_of(name)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_emulated", flash)
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, "flash_emulated", flash_attention_mask)
    config = decoder_of(one.model).config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_emulated")
    flash.calls = 0
    with prune(one.model, recipe):
        output = generate(one, prompt_of(one, kind))
    # In a batch, blocks of images, windows and heads of different holes are all beyond the kernels.
    assert flash.calls > 0 or any(windows_of(one))
    assert torch.equal(output.sequences, expected.sequences)
    assert_close(logits_of(output), logits_of(expected))


@in_use
@torch.no_grad()
def test_a_ready_mask_of_the_user_matches_the_oracle(name: str, recipe: str) -> None:
    one = model_of(name)
    inputs = dict(prompt_of(one))
    del inputs["attention_mask"]
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    mask[:, :, 10:, 2] = False  # a text token that later ones do not see
    inputs["attention_mask"] = mask
    if unpruned(name).positions is not None:  # transformers needs a 2-D mask to make them
        inputs["position_ids"] = unpruned(name).positions[..., :length]
    with prune(one.model, recipe) as report:
        got = one.model(**inputs, use_cache=True).logits
    replay = replay_of(one, recipe, report.calls, 1, length)
    expected = dense_logits(one.model, inputs, inputs["input_ids"], replay)
    assert_close(got[:, -1], expected[:, -1])


# -- 3. exact counts


def round_half_up(share: float | int, total: int) -> int:
    """The one rounding rule, in decimal: 0.7 of 45 is 31.5 and so 32."""
    if isinstance(share, int):
        return min(share, total)
    return min(total, max(1, math.floor(round(share * total, 6) + 0.5)))


@over_product
def test_a_stage_keeps_what_it_promised(name: str, recipe: str) -> None:
    run = pruned(name, recipe)
    shape = adapter_for(run.one.model).shape
    steps = Recipe.parse(recipe).steps(shape)
    layout = run.calls[0].layouts[0]
    for decision, candidates in run.replay.steps:
        at_cache = isinstance(decision.site, Cache)
        acted = [
            step.stage
            for step in steps
            if step.number == decision.step and step.stage.site == decision.site
        ]
        assert acted, decision
        assert {stage.name for stage in acted} == {decision.method}
        rows = torch.searchsorted(layout.position, candidates)
        layer = decision.layer if at_cache or isinstance(decision.site, Layer) else None
        there = Candidates(layout=layout, rows=rows, shape=shape, layer=layer)
        budgets = [stage.budget(there) for stage in acted]
        kept = decision.kept.shape[-1]
        assert any(budget.least <= kept <= budget.most for budget in budgets), decision


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", ["input", "2", "cache"])
@pytest.mark.parametrize("keep", [0.25, 0.7, 3, 10_000])
def test_baselines_keep_the_count_they_were_told(name: str, at: str, keep: float | int) -> None:
    for method in ("random", "uniform"):
        run = pruned(name, f"{method}(keep={keep} at={at})")
        total = len(run.calls[0].layouts[0])
        layers = windows_of(run.one).count(None)
        assert len(run.calls[0].decisions) == (layers if at == "cache" else 1)
        for decision in run.calls[0].decisions:
            assert decision.candidates == total
            assert decision.kept.shape[-1] == round_half_up(keep, total)


@over_product
def test_the_cache_holds_what_was_decided(name: str, recipe: str) -> None:
    for kind in ("alone", "batch"):
        run = pruned(name, recipe, kind)
        [call] = run.calls
        samples, length = run.read.shape
        for layer in range(decoder_of(run.one.model).config.num_hidden_layers):
            left = media_left(run, layer)
            assert torch.equal(call.media_entries[:, layer], left.sum(-1).to(torch.int32)), layer
        assert call.length == run.prompt_length


def media_left(run: Run, layer: int) -> Tensor:
    """`[B, H, S]`: media tokens that a layer's cache holds after the prefill."""
    samples, length = run.read.shape
    kv_heads = decoder_of(run.one.model).config.num_key_value_heads
    left = torch.zeros(samples, kv_heads, length, dtype=torch.bool)
    replay = run.replay
    for sample, layout in enumerate(run.calls[0].layouts):
        left[sample, :, layout.position] = True
        left[sample] &= ~replay.gone_at(layer, sample, length)
    for at, _, dropped in replay.dropped:
        if at == layer:
            left &= ~dropped
    left[..., : forgotten(run, layer) + 1] = False
    return left


SLACK = 64
"""Tokens beyond its window that a layer remembers, so that they can be taken back."""


def forgotten(run: Run, layer: int, steps: int = 0) -> int:
    """The last token that a layer with a sliding window forgets, -1 if there is none.

    It forgets once it holds its window and twice the slack.

    Args:
        steps: Of decoding, after the prefill.
    """
    window = windows_of(run.one)[layer]
    if window is None:
        return -1
    samples, length = run.read.shape
    gone = torch.stack([run.replay.gone_at(layer, sample, length) for sample in range(samples)])
    real = nn.functional.pad(run.inputs["attention_mask"], (0, length - run.prompt_length), value=1)
    packed, last = bool(gone.any()), -1  # padding has columns until tokens are cut
    for read in range(run.prompt_length, run.prompt_length + steps + 1):
        left = (real.bool() & ~gone)[:, last + 1 : read]
        if (left.sum(dim=1).max() if packed else read) >= window + 2 * SLACK:
            packed, last = True, read - window - SLACK
    return last


# -- 4. batches, beams, turns, streams, assisted decoding


@over_product
def test_a_left_padded_batch_equals_each_alone(name: str, recipe: str) -> None:
    batch = pruned(name, recipe, "batch")
    for row, kind in enumerate(("alone", "second")):
        alone = pruned(name, recipe, kind)
        shift = batch.prompt_length - alone.prompt_length
        unpadded = logits_of(unpruned(name, kind).output)[0]
        if OLD and (logits_of(unpruned(name, "batch").output)[row] - unpadded).abs().max() > 1e-3:
            pytest.skip("this release of transformers lets padding of this family leak")
        mine = [one for one in batch.calls[0].decisions if one.sample == row]
        assert len(mine) == len(alone.calls[0].decisions)
        for one, other in zip(mine, alone.calls[0].decisions, strict=True):
            assert torch.equal(one.kept, other.kept + shift), (one, other)
        assert_close(logits_of(batch.output)[row], logits_of(alone.output)[0])


@pytest.mark.parametrize("name, recipe", uses([EVERYWHERE, "plphp(keep=0.4)"]))
def test_beam_search_scores_match_the_oracle(name: str, recipe: str) -> None:
    one = model_of(name)
    kinds = beam_kinds(name)
    if not kinds:
        pytest.skip("transformers cannot repeat its prompts")
    for kind in kinds:
        inputs = prompt_of(one, kind)
        beams = 3
        with prune(one.model, recipe) as report:
            output = generate(one, inputs, num_beams=beams, output_scores=True)
        for row in range(len(output.sequences)):
            replay = replay_of(
                one, recipe, sample_of(report.calls, row * beams), 1, output.sequences.shape[1] - 1
            )
            single_kind = ("alone", "second")[row] if kind == "batch" else kind
            single = prompt_of(one, single_kind)
            sequence = output.sequences[row : row + 1, -(single["input_ids"].shape[1] + 6) :]
            shift = output.sequences.shape[1] - sequence.shape[1]
            replay = shifted(replay, shift)
            positions = unpruned(name, single_kind).positions
            logits = dense_logits(one.model, single, sequence[:, :-1], replay, positions)
            chances = logits[0, -NEW_TOKENS:].log_softmax(-1)
            score = chances.gather(1, sequence[0, -NEW_TOKENS:, None]).sum() / NEW_TOKENS
            assert_close(output.sequences_scores[row], score, "beam scores")


def beam_kinds(name: str) -> tuple[str, ...]:
    """Prompts that transformers can repeat for beams; `test_generate.py` has the others."""
    kinds = [("alone", "batch"), ("second",)]
    right = (k for k in kinds if not any(failure_of_beams(name, kind) for kind in k))
    return next(right, ())


def shifted(replay: Any, by: int) -> Any:
    """A replay for the sequence without its first tokens, which were padding."""
    replay.gone = {layer: mask[:, by:] for layer, mask in replay.gone.items()}
    replay.dropped = [(at, start - by, mask[..., by:]) for at, start, mask in replay.dropped]
    replay.merges = {
        layer: [(sample, source - by, target - by, weight) for sample, source, target, weight in m]
        for layer, m in replay.merges.items()
    }
    replay.absorbed = [
        (at, start - by, sample, replace(m, source=m.source - by, target=m.target - by))
        for at, start, sample, m in replay.absorbed
    ]
    return replay


@in_use
def test_several_return_sequences_match_the_oracle(name: str, recipe: str) -> None:
    one = model_of(name)
    kind = next(iter(beam_kinds(name)), None)
    if kind is None:
        pytest.skip("transformers cannot repeat its prompts")
    inputs = prompt_of(one, kind)
    torch.manual_seed(5)
    with prune(one.model, recipe) as report:
        output = generate(one, inputs, do_sample=True, num_return_sequences=3, temperature=2.0)
    assert len(output.sequences.unique(dim=0)) == 3
    positions = unpruned(name, kind).positions
    for row, sequence in enumerate(output.sequences[:, :-1]):
        replay = replay_of(one, recipe, sample_of(report.calls, row), 1, len(sequence))
        expected = dense_logits(one.model, inputs, sequence[None], replay, positions)
        assert_close(logits_of(output)[row], expected[0, -NEW_TOKENS:])


@pytest.mark.parametrize("name, recipe", uses(names=tuple(FAMILIES)))
@pytest.mark.parametrize("kind", ["alone", "batch"])
def test_a_second_turn_matches_the_oracle(name: str, recipe: str, kind: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one, kind)
    with positions_logged(decoder_of(one.model)) as log:
        second_turn(one, inputs)
    with prune(one.model, recipe) as report:
        output, length = second_turn(one, inputs)
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = dense_logits(one.model, inputs, read, replay, log.whole())
    assert_close(logits_of(output), expected[:, length - 1 :])


@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=() if n < 20 else (pytest.mark.full,)) for n in range(120)],
)
def test_two_turns_under_a_recipe_made_up_by_chance(seed: int) -> None:
    name, recipe, kind, attention = drawn(seed, wide=True)
    one = model_of(name, attention)
    inputs = prompt_of(one, kind)
    with positions_logged(decoder_of(one.model)) as log:
        second_turn(one, inputs)
    with prune(one.model, recipe) as report:
        output, length = second_turn(one, inputs)
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = dense_logits(one.model, inputs, read, replay, log.whole())
    assert_close(logits_of(output), expected[:, length - 1 :])


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_audio"])
def test_new_media_on_a_pruned_cache_match_the_oracle(name: str) -> None:
    """The second turn brings media of its own, and is pruned again."""
    one = model_of(name)
    first, new = one.inputs(0, 7), one.inputs(3, 5)
    with prune(one.model, EVERYWHERE) as report:
        begun = generate(one, first)
        tokens = torch.cat([begun.sequences, new["input_ids"]], dim=1)
        inputs = {**new, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        output = generate(one, inputs, **{CACHE_NAME: begun.past_key_values})
    assert len(report.calls) == 2
    assert report.calls[1].layouts[0].position.min() > begun.sequences.shape[1]
    read = output.sequences[:, :-1]
    whole = {key: torch.cat([first[key], new[key]]) for key in new if key not in OF_TEXT}
    whole["input_ids"] = tokens
    replay = replay_of(one, EVERYWHERE, report.calls, *read.shape)
    expected = dense_logits(one.model, whole, read, replay)
    assert_close(logits_of(output), expected[:, tokens.shape[1] - 1 :])


@pytest.mark.parametrize("name, recipe", uses(names=tuple(FAMILIES)))
def test_assisted_decoding_matches_the_oracle(name: str, recipe: str) -> None:
    """Prompt look-up guesses wrongly at times, so tokens are taken back."""
    taken_back = []
    crop = DynamicCache.crop

    def watched(cache: DynamicCache, count: int) -> None:
        length = cache.get_seq_length()
        crop(cache, count)
        taken_back.append(length - cache.get_seq_length())

    one = model_of(name)
    guesses = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    guesses["eos_token_id"] = PAD  # older releases need one; it is suppressed
    for seed in range(2, 8):
        taken_back.clear()
        inputs = one.inputs(seed, 60)  # much text, so that guesses are made
        with prune(one.model, recipe) as report, pytest.MonkeyPatch.context() as patch:
            patch.setattr(DynamicCache, "crop", watched)
            output = generate(one, inputs, max_new_tokens=24, **guesses)
        if max(taken_back) > 0:
            break
    assert max(taken_back) > 0, "no guess was wrong: nothing was cropped"
    read = output.sequences[:, :-1]
    steps = len(output.logits)  # older releases go a step too far
    with positions_logged(decoder_of(one.model)) as log:
        generate(one, inputs, max_new_tokens=steps)
    replay = replay_of(one, recipe, report.calls, *read.shape)
    # The first guesses are part of the prefill. Those that were wrong are read again after it.
    start = report.calls[0].length - taken_back[0]
    replay.dropped = [(layer, start, mask) for layer, _, mask in replay.dropped]
    expected = dense_logits(one.model, inputs, read, replay, log.whole())
    assert_close(logits_of(output), expected[:, -steps:])


@pytest.mark.parametrize("name, recipe", uses(names=tuple(FAMILIES)))
@pytest.mark.parametrize("back", [1, 3, 5])
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_before(name: str, recipe: str, back: int) -> None:
    """Take back some tokens, once within the answer and once into the prompt's closing text."""
    one = model_of(name)
    run = pruned(name, recipe)
    length, tokens = run.prompt_length, run.read
    position = run.positions

    def feed(cache: Any, start: int, stop: int) -> Tensor:
        more = {} if position is None else {"position_ids": position[..., start:stop]}
        return one.model(
            input_ids=tokens[:, start:stop], **{CACHE_NAME: cache}, use_cache=True, **more
        ).logits

    with prune(one.model, recipe):
        cache = one.model(**run.inputs, use_cache=True).past_key_values
        total = tokens.shape[1]
        first = torch.cat([feed(cache, at, at + 1) for at in range(length, total)], dim=1)
        cache.crop(-back)
        assert cache.get_seq_length() == total - back
        again = torch.cat([feed(cache, at, at + 1) for at in range(total - back, total)], dim=1)
        assert_close(again, first[:, -back:], "logits after a crop")
        cache.crop(-back - (total - length))
        assert cache.get_seq_length() == length - back
        rest = feed(cache, length - back, total)
    assert_close(first, logits_of(run.output)[:, 1:])
    # The closing text is read anew, and this time after entries were dropped from the cache.
    replay = run.replay
    replay.dropped = [(layer, length - back, mask) for layer, _, mask in replay.dropped]
    expected = dense_logits(one.model, run.inputs, tokens, replay, position)
    assert_close(rest, expected[:, length - back :], "logits after a crop into the prompt")


class Stream:
    """Collects what a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@in_use
def test_streaming_gives_the_same_tokens(name: str, recipe: str) -> None:
    run = pruned(name, recipe)
    stream = Stream()
    with prune(run.one.model, recipe):
        generate(run.one, run.inputs, streamer=stream)
    assert stream.ended and stream.tokens == run.output.sequences[0].tolist()


@pytest.mark.parametrize("name, recipe", uses(names=tuple(FAMILIES)))
@torch.no_grad()
def test_a_forward_without_cache_matches_the_oracle(name: str, recipe: str) -> None:
    one = model_of(name)
    for kind in ("alone", "batch"):
        inputs = prompt_of(one, kind)
        for given in (inputs, {k: v for k, v in inputs.items() if k != "attention_mask"}):
            if kind == "batch" and given is not inputs:
                continue
            # Without a mask some families fall back to plain positions.
            with positions_logged(decoder_of(one.model)) as log:
                one.model(**given, use_cache=False)
            with prune(one.model, recipe) as report:
                got = one.model(**given, use_cache=False).logits
            replay = replay_of(one, recipe, report.calls, *inputs["input_ids"].shape)
            assert not replay.dropped, "there was no cache to prune"
            position = log.whole()
            if position is None:
                position = torch.arange(inputs["input_ids"].shape[1])[None]
            expected = dense_logits(one.model, inputs, inputs["input_ids"], replay, position)
            assert_close(got[:, -1], expected[:, -1])


@pytest.mark.parametrize("name, recipe", uses(names=tuple(FAMILIES)))
def test_generating_without_cache_matches_the_oracle(name: str, recipe: str) -> None:
    """Each step is a prefill of its own, with decisions of its own."""
    one = model_of(name)
    inputs = prompt_of(one)
    steps = 3
    with positions_logged(decoder_of(one.model)) as log:
        generate(one, inputs, max_new_tokens=steps, use_cache=False)
    with prune(one.model, recipe) as report:
        output = generate(one, inputs, max_new_tokens=steps, use_cache=False)
    assert len(report.calls) == steps
    for step, call in enumerate(report.calls):
        read = output.sequences[:, : inputs["input_ids"].shape[1] + step]
        replay = replay_of(one, recipe, [call], *read.shape)
        expected = dense_logits(one.model, inputs, read, replay, log.seen[step])
        assert_close(logits_of(output)[:, step], expected[:, -1])


def quantized(one: Any) -> Any:
    try:
        return QuantizedCache("fp8", decoder_of(one.model).config)
    except ValueError as error:
        if "Unknown quantization backend" not in str(error):
            raise
        pytest.skip("this release of transformers quantises only with other packages")


def static(one: Any) -> Any:
    return StaticCache(decoder_of(one.model).config, max_cache_len=256)


def foreign(one: Any) -> Any:
    with torch.no_grad():
        return one.model(**prompt_of(one), use_cache=True).past_key_values


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("make", [quantized, static])
def test_other_caches_are_refused_before_any_work(name: str, make: Any) -> None:
    one = model_of(name)
    if make is quantized and any(windows_of(one)):
        with pytest.raises(ValueError, match="only full attention"):
            make(one)  # transformers refuses this one itself
        return
    before = snapshot(one.model)
    worked = []
    layer = decoder_of(one.model).layers[0]
    with pytest.raises(UnsupportedModelError, match="needs a DynamicCache"):
        with prune(one.model, EVERYWHERE):
            handle = layer.self_attn.register_forward_pre_hook(lambda *_: worked.append(1))
            try:
                generate(one, prompt_of(one), **{CACHE_NAME: make(one)})
            finally:
                handle.remove()
    assert not worked
    assert snapshot(one.model) == before
    assert same(generate(one, prompt_of(one)), unpruned(name).output)


def test_a_cache_by_name_is_refused() -> None:
    one = model_of("llava")
    with pytest.raises(UnsupportedModelError), prune(one.model, EVERYWHERE):
        generate(one, prompt_of(one), cache_implementation="static")
    assert same(generate(one, prompt_of(one)), unpruned("llava").output)


def test_a_cache_filled_by_others_is_refused() -> None:
    one = model_of("llava")
    cache = foreign(one)
    tokens = torch.cat([prompt_of(one)["input_ids"], torch.tensor([[7]])], dim=1)
    with pytest.raises(UnsupportedModelError, match="already holds"), prune(one.model, EVERYWHERE):
        generate(one, {"input_ids": tokens}, **{CACHE_NAME: cache})


@pytest.mark.parametrize("name", THREE)
def test_a_pruned_cache_is_refused_outside(name: str) -> None:
    """Its stored tokens are not the sequence that a plain model would take them for."""
    one = model_of(name)
    run = pruned(name, EVERYWHERE)
    with prune(one.model, EVERYWHERE):
        cache = generate(one, prompt_of(one)).past_key_values
    tokens = torch.cat([run.output.sequences, torch.tensor([[7]])], dim=1)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with pytest.raises(TokenPruneError):
        generate(one, inputs, **{CACHE_NAME: cache})


# -- 5. memory


@pytest.mark.parametrize("name, recipe", uses([EVERYWHERE, *ONE_PER_SITE, "plphp(keep=0.5)"]))
@torch.no_grad()
def test_no_square_tensor_and_no_higher_peak(name: str, recipe: str) -> None:
    """No tensor of S x S elements, and never more bytes alive than without pruning."""
    one = model_of(name)
    inputs = repeated(prompt_of(one), 12)
    length = inputs["input_ids"].shape[1]
    config = decoder_of(one.model).config
    with Watch() as plain:
        one.model(**inputs, use_cache=True, logits_to_keep=1)
    with prune(one.model, recipe), Watch() as lean:
        one.model(**inputs, use_cache=True, logits_to_keep=1)

    def square(shape: tuple[int, ...]) -> bool:
        return sum(size > 0.9 * length for size in shape) > 1

    if not any(map(square, plain.shapes)):  # blocks of images need masks, unpruned too
        assert not any(map(square, lean.shapes)), "[S, S]"
    head_width = config.hidden_size // config.num_attention_heads
    layer_bytes = 2 * config.num_key_value_heads * length * head_width * 4
    assert lean.peak_bytes <= plain.peak_bytes + layer_bytes


def repeated(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    """A long prompt: the same one several times over, with as many media."""
    return {
        key: torch.cat([value] * times, dim=1 if key in OF_TEXT else 0)
        if isinstance(value, Tensor)
        else value
        for key, value in inputs.items()
    }


# -- 6. markers, separators and text


@pytest.mark.parametrize("name", NAMES)
def test_only_patches_are_in_the_layout(name: str) -> None:
    run = pruned(name, EVERYWHERE)
    [call] = run.calls
    position = call.layouts[0].position
    ids = run.inputs["input_ids"][0]
    tokens = set(adapter_for(run.one.model).token_ids().values())
    placeholders = sum(int((ids == token).sum()) for token in tokens)
    assert set(ids[position].tolist()) <= tokens
    assert placeholders - len(position) == SEPARATORS.get(name, 0)
    assert (position.diff() > 0).all()


@over_product
def test_what_is_no_patch_is_never_pruned(name: str, recipe: str) -> None:
    run = pruned(name, recipe, "batch")
    for sample, layout in enumerate(run.calls[0].layouts):
        patches = torch.zeros(run.read.shape[1], dtype=torch.bool)
        patches[layout.position] = True
        assert not (run.replay.gone_at(99, sample, len(patches)) & ~patches).any()
        for _, _, dropped in run.replay.dropped:
            assert not (dropped[sample] & ~patches).any()
        for decision in run.calls[0].decisions:
            if decision.sample == sample:
                assert decision.candidates <= len(layout)


# -- 7. positions


@pytest.mark.parametrize("name, recipe", uses([EVERYWHERE, *ONE_PER_SITE], tuple(FAMILIES)))
@pytest.mark.parametrize("kind", ["alone", "batch"])
def test_compact_positions_match_the_oracle(name: str, recipe: str, kind: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one, kind)
    if name.startswith(MROPE):
        before = snapshot(one.model)
        with pytest.raises(TokenPruneError, match="one-dimensional"):
            with prune(one.model, recipe, positions="compact"):
                pass
        assert snapshot(one.model) == before
        return
    with positions_logged(decoder_of(one.model)) as log:
        second_turn(one, inputs)
    with prune(one.model, recipe, positions="compact") as report:
        first = generate(one, inputs)
        output, length = second_turn(one, inputs)
    for turn, start, call in ((first, inputs["input_ids"].shape[1], 0), (output, length, 1)):
        read = turn.sequences[:, :-1]
        replay = replay_of(one, recipe, [report.calls[call]], *read.shape)
        gone = torch.zeros(read.shape, dtype=torch.int64)
        for decision, candidates in replay.steps:
            if isinstance(decision.site, Input):
                lost = candidates[~torch.isin(candidates, decision.kept)]
                gone[decision.sample, lost] = 1
        positions = torch.arange(read.shape[1])[None] if log.whole() is None else log.whole()
        positions = positions[:, : read.shape[1]] - (gone.cumsum(1) - gone)
        expected = dense_logits(one.model, inputs, read, replay, positions)
        assert_close(logits_of(turn), expected[:, start - 1 :])


# Windows, and the blocks of Gemma's images, go on counting the tokens of the unpruned sequence.
@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if not name.startswith((*MROPE, "gemma3", "aya_vision_windows"))],
)
@torch.no_grad()
def test_compact_positions_are_those_of_a_shorter_input(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one)
    model = decoder_of(one.model)
    embeddings = []
    with prune(one.model, "random(keep=0.4)", positions="compact") as report:
        # After the engine's hook: some models are given ids, and embed them within.
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: embeddings.append(kwargs["inputs_embeds"]),
            with_kwargs=True,
        )
        output = generate(one, inputs)
        handle.remove()
    replay = replay_of(one, "random(keep=0.4)", report.calls, *output.sequences[:, :-1].shape)
    stays = ~replay.gone[0][0]
    shorter = torch.cat(embeddings, dim=1)[:, stays]
    hidden = model(inputs_embeds=shorter, use_cache=False).last_hidden_state
    expected = one.model.get_output_embeddings()(hidden)
    assert_close(logits_of(output), expected[:, -NEW_TOKENS:])


def test_compact_positions_without_cache_and_mask() -> None:
    """Repeated positions look like packed sequences to transformers where nothing else is given."""
    one = model_of("llava")
    inputs = prompt_of(one)
    bare = {key: value for key, value in inputs.items() if key != "attention_mask"}
    with torch.no_grad(), prune(one.model, "random(keep=0.4)", positions="compact"):
        with_cache = one.model(**inputs).logits
        without = one.model(**bare, use_cache=False).logits
    assert_close(without, with_cache)


# -- 8. bytes


@over_product
def test_kv_bytes_really_fall(name: str, recipe: str) -> None:
    run = pruned(name, recipe)
    samples, length = run.read.shape
    heads = decoder_of(run.one.model).config.num_key_value_heads
    cache = run.output.past_key_values
    entry = 4 * (cache.layers[0].keys.shape[-1] + cache.layers[0].values.shape[-1])
    position = run.calls[0].layouts[0].position
    windows = windows_of(run.one)

    def full_bytes(tokens: int) -> int:
        return entry * heads * sum(min(tokens, window or tokens) for window in windows)

    stored = []
    for steps in (0, length - run.prompt_length):
        stored.append(0)
        for number, window in enumerate(windows):
            start = forgotten(run, number, steps) + 1
            left = int(media_left(run, number)[..., start:].sum())
            left += heads * (run.prompt_length + steps - start - int((position >= start).sum()))
            stored[-1] += entry * left
            if window is not None:  # more than the window, but never much more
                assert left < heads * (window + 2 * SLACK)
    prefill, expected = stored
    assert stored_bytes(cache) == expected
    assert stored_bytes(unpruned(name).output.past_key_values) == full_bytes(length)
    assert run.calls[0].kv_bytes_after == prefill
    assert run.calls[0].kv_bytes_before == full_bytes(run.prompt_length)
    assert expected < entry * heads * len(windows) * length


def stored_bytes(cache: Any) -> int:
    """Bytes of the storages behind a cache's tensors."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


# -- 9. determinism


@over_product
def test_the_same_input_gives_the_same_selection(name: str, recipe: str) -> None:
    first = pruned(name, recipe)
    torch.rand(7)  # the state of the global generator has no say
    with prune(first.one.model, recipe) as report:
        again = generate(first.one, first.inputs)
    assert same(again, first.output)
    decisions = [call.decisions for call in (first.calls[0], report.calls[0])]
    for one, other in zip(*decisions, strict=True):
        assert one.method == other.method and torch.equal(one.kept, other.kept)


def test_random_stages_take_a_seed() -> None:
    kept = [
        pruned("llava", f"random(keep=0.5 at={at} seed={seed})").calls[0].decisions[0].kept
        for at in ("input", "cache")
        for seed in (1, 2)
    ]
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[2], kept[3])
    assert not torch.equal(kept[2][0], kept[2][1]), "heads draw for themselves"


def test_methods_of_reads_recipes() -> None:
    assert methods_of(COMBINED[1]) == ["vflowopt", "plphp"]
    assert methods_of("none") == []
