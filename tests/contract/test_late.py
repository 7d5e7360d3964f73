"""Stages at caches after prefill and while decoding match the oracle, whatever was stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.doubles import Clean, Half, Nothing
from tests.contract.test_contracts import OF_TEXT, second_turn
from tests.contract.test_stages import assert_oracle, families
from tokenprune import prune
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import Attention, Hidden, Text
from tokenprune.core.site import Cache, Input, Layer
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.errors import RecipeError, UnsupportedModelError
from tokenprune.testing.harness import (
    generate,
    logits_of,
    model_of,
    prompt_of,
    replay_of,
    windows_of,
)
from tokenprune.testing.oracle import assert_close, dense_logits, positions_logged
from tokenprune.testing.tiny import decoder_of

SEEN = [
    None,
    Attention(reduce="mean", heads="mean"),
    Attention(queries="text", reduce="mean", heads="max"),
    Attention(queries=5, reduce="max", heads="mean"),
]
SINCE = [None, Attention(queries="since", reduce="mean", heads="mean")]
BEFORE = ["none", "random(keep=0.7) + random(keep=0.8 at=2) + random(keep=0.7 at=cache)"]


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("signal", SEEN, ids=str)
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", families())
def test_stages_after_prefill_match_the_oracle(
    name: str, kind: str, signal: Attention | None, before: str
) -> None:
    recipe = Recipe(before, Half(at=Cache(after="prefill"), signal=signal))
    report = assert_oracle(name, recipe, kind)
    late = [one for one in report.last.decisions if one.method == "half"]
    full = [layer for layer, window in enumerate(windows_of(model_of(name))) if window is None]
    samples = len(prompt_of(model_of(name), kind)["input_ids"])
    assert [(one.layer, one.sample) for one in late] == [
        (layer, sample) for layer in full for sample in range(samples)
    ]
    stored = report.last.media_entries[:, full]
    kept = torch.tensor(
        [[one.kept.shape[1] for one in late if one.sample == b] for b in range(samples)]
    )
    assert torch.equal(stored, kept[..., None].expand_as(stored).int())


@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", families())
def test_what_the_last_pruning_left_can_be_cleaned_up(name: str, kind: str) -> None:
    """Entries of tokens that later layers let go leave the caches of earlier layers, too."""
    recipe = Recipe("uniform(keep=0.8) + random(keep=0.5 at=2)", Clean())
    report = assert_oracle(name, recipe, kind)
    if None in windows_of(model_of(name)):
        full = [n for n, window in enumerate(windows_of(model_of(name))) if window is None]
        entries = report.last.media_entries[:, full]
        assert bool((entries == entries[:, :1, :1]).all())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("signal", SINCE, ids=str)
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", families())
def test_stages_while_decoding_match_the_oracle(
    name: str, kind: str, signal: Attention | None, every: int
) -> None:
    site = Cache(after="decode", every=every)
    recipe = Recipe("random(keep=0.8) + random(keep=0.8 at=cache)", Half(at=site, signal=signal))
    report = assert_oracle(name, recipe, kind)
    late = [one for one in report.last.decisions if one.method == "half"]
    lengths = sorted({one.length for one in late})
    # Six tokens are generated, five of them are read again.
    if None in windows_of(model_of(name)):
        assert len(lengths) == 5 // every
        assert [two - one for one, two in zip(lengths, lengths[1:], strict=False)] == [every] * (
            len(lengths) - 1
        )


@pytest.mark.parametrize("name", families())
def test_times_in_one_recipe_match_the_oracle(name: str) -> None:
    recipe = Recipe(
        "uniform(keep=0.8) + plphp(keep=0.7)",
        Half(at=Cache(after="prefill")),
        Half(at=Cache((1, 3), after="decode", every=2), signal=SINCE[1]),
        Nothing(at=Cache((2,), after="decode", every=4)),
    )
    assert_oracle(name, recipe, "batch")


@pytest.mark.parametrize("name", families())
def test_a_second_turn_settles_nothing_anew(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one, "batch")
    recipe = Recipe(Half(at=Cache(after="prefill"), signal=SEEN[2]))
    with positions_logged(decoder_of(one.model)) as log:
        second_turn(one, inputs)
    with prune(one.model, recipe) as report:
        output, length = second_turn(one, inputs)
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = dense_logits(one.model, inputs, read, replay, log.whole())
    assert_close(logits_of(output), expected[:, length - 1 :])
    assert len(report.calls) == 1


@pytest.mark.parametrize("site", [Cache(after="prefill"), Cache(after="decode", every=2)], ids=str)
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_audio"])
def test_candidates_are_of_all_prompts(name: str, site: Cache) -> None:
    """The second prompt's stages choose among the media of the first, too."""
    one = model_of(name)
    first, new = one.inputs(0, 7), one.inputs(3, 5)
    recipe = Recipe("random(keep=0.9)", Half(at=site))
    with prune(one.model, recipe) as report:
        begun = generate(one, first)
        tokens = torch.cat([begun.sequences, new["input_ids"]], dim=1)
        inputs = {**new, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        output = generate(one, inputs, **{CACHE_NAME: begun.past_key_values})
    early, late = (call.layouts[0].position for call in report.calls)
    decisions = [one for one in report.calls[1].decisions if one.method == "half"]
    assert decisions and all(one.of_sequence for one in decisions)
    kept = torch.cat([one.kept.flatten() for one in decisions])
    assert bool(torch.isin(kept, early).any()) and bool(torch.isin(kept, late).any())
    read = output.sequences[:, :-1]
    whole = {key: torch.cat([first[key], new[key]]) for key in new if key not in OF_TEXT}
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = dense_logits(one.model, {**inputs, **whole}, read, replay)
    assert_close(logits_of(output), expected[:, tokens.shape[1] - 1 :])


def test_nothing_happens_without_a_cache() -> None:
    one = model_of("llava")
    with prune(one.model, Half(at=Cache(after="prefill"))) as report, torch.no_grad():
        one.model(**prompt_of(one), use_cache=False)
    assert report.last.decisions == []
    assert any("use_cache=False" in warning for warning in report.last.warnings)


def test_beams_are_exchanged_after_prefill_stages_and_refused_with_decode_stages() -> None:
    one = model_of("llava")
    inputs = prompt_of(one)
    with prune(one.model, Half(at=Cache(after="prefill"))):
        generate(one, inputs, num_beams=2)
    with prune(one.model, Half(at=Cache(after="decode"))):
        with pytest.raises(UnsupportedModelError, match="cannot exchange beams"):
            generate(one, inputs, num_beams=2)


def test_tokens_are_not_taken_back_after_decode_stages() -> None:
    one = model_of("llava")
    with prune(one.model, Half(at=Cache(after="decode"))):
        cache = generate(one, prompt_of(one)).past_key_values
        with pytest.raises(UnsupportedModelError, match="cannot take back generated tokens"):
            cache.crop(-1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cache(after="never"),  # type: ignore[arg-type]
        lambda: Cache(every=2),
        lambda: Cache(after="decode", every=0),
        lambda: Cache(after="decode", every=True),
    ],
)
def test_times_that_are_none_are_refused(make: Any) -> None:
    with pytest.raises(RecipeError, match="must be"):
        make()


@pytest.mark.parametrize(
    "site, signal, error",
    [
        (Cache(after="prefill"), Hidden(), "only their cache is left"),
        (Cache(after="decode"), Text(), "only their cache is left"),
        (Cache(after="decode"), Attention(queries=3), "a decode step has one query"),
        (Cache(after="prefill"), Attention(queries="since"), "no decision before"),
        (Cache(after="prefill"), Attention(queries="own"), "media tokens have asked before"),
        (Cache(after="prefill"), Attention(rotary=False), "what is stored is rotated"),
        (Layer(2), Attention(queries="since"), "no decision before"),
    ],
)
def test_signals_that_are_gone_are_refused(site: Any, signal: Any, error: str) -> None:
    with pytest.raises(RecipeError, match=error):
        signal.check(site)


def test_sites_read_as_words() -> None:
    assert [str(site) for site in (Input(), Cache(), Cache(after="prefill"))] == [
        "input", "cache", "cache after prefill"
    ]  # fmt: skip
