"""Stages that go to extremes: no token left, merges at layers, some kinds of media alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.contract.cases import MROPE, NAMES, SOUND_ONLY, drawn
from tests.contract.doubles import Absorb, Nothing
from tokenprune import prune
from tokenprune.adapters.base import adapter_for
from tokenprune.core.layout import MODALITIES, Modality
from tokenprune.core.recipe import Recipe
from tokenprune.core.site import Cache, Input, Layer, Site
from tokenprune.errors import RecipeError
from tokenprune.testing.harness import (
    generate,
    logits_of,
    model_of,
    prompt_of,
    replay_of,
    second_turn,
    unpruned,
    windows_of,
)
from tokenprune.testing.oracle import assert_close, dense_logits, positions_logged
from tokenprune.testing.tiny import FAMILIES, decoder_of

SITES = [Input(), Layer(0), Layer(2), Layer(4), Cache(), Cache((1, 4))]
FEW = ("llava_onevision", "qwen2_5_vl", "qwen2_audio", "qwen3_vl")
"""Families that run everything in the short suite: the last adds features at early layers."""
MIXED = ("qwen2_5_omni", "qwen3_omni_moe", "phi4_multimodal")
"""Families that see and hear in one prompt."""


def assert_oracle(name: str, recipe: Recipe, kind: str, attention: str = "sdpa") -> Any:
    """Under a recipe the logits are those of the dense model; returns the report."""
    before = unpruned(name, kind, attention)
    one = before.one
    with prune(one.model, recipe) as report:
        output = generate(one, before.inputs)
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = dense_logits(one.model, before.inputs, read, replay, before.positions)
    assert_close(logits_of(output), expected[:, before.prompt_length - 1 :])
    return report


def families(*others: str) -> list[Any]:
    """All families, and `others`; those beyond the few in the full suite alone."""
    names = dict.fromkeys([*FEW, *FAMILIES, *others])
    return [pytest.param(n, marks=() if n in FEW else (pytest.mark.full,)) for n in names]


# -- nothing left


@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("name", families())
def test_no_token_left_matches_the_oracle(name: str, site: Site, kind: str) -> None:
    report = assert_oracle(name, Recipe(Nothing(at=site)), kind)
    decisions = report.last.decisions
    windows = windows_of(model_of(name))
    forgetful = isinstance(site, Cache) and all(
        windows[layer] is not None for layer in site.layers or range(len(windows))
    )
    assert bool(decisions) != forgetful  # layers with a window forget by themselves
    assert all(one.kept.shape[-1] == 0 for one in decisions)
    if not isinstance(site, Cache):
        layer = site.index if isinstance(site, Layer) else 0
        assert int(report.last.media_entries[:, layer:].sum()) == 0


@pytest.mark.parametrize("name", families())
def test_stages_after_the_last_token_has_gone_have_nothing_to_do(name: str) -> None:
    recipe = Recipe(Nothing(at=Layer(1)), "random(keep=0.5 at=3) + random(keep=0.5 at=cache)")
    report = assert_oracle(name, recipe, "batch")
    # The cache of the layer before it still holds tokens, unless it forgets by itself.
    held = {0} if windows_of(model_of(name))[0] is None else set()
    assert {one.layer for one in report.last.decisions} == {1, *held}


@pytest.mark.parametrize("name", families())
def test_a_second_turn_without_any_media_left_matches_the_oracle(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one, "batch")
    recipe = Recipe(Nothing(at=Layer(2)), Nothing(at=Cache((0,))))
    with positions_logged(decoder_of(one.model)) as log:
        second_turn(one, inputs)
    with prune(one.model, recipe) as report:
        output, length = second_turn(one, inputs)
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = dense_logits(one.model, inputs, read, replay, log.whole())
    assert_close(logits_of(output), expected[:, length - 1 :])


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_no_token_left_with_compact_positions_is_a_prompt_without_media(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one)
    with prune(one.model, Nothing(), positions="compact") as report:
        got = generate(one, inputs)
    text = inputs["input_ids"].clone()
    text[0, report.last.layouts[0].position] = -1
    text = text[text >= 0][None]
    plain = generate(one, {"input_ids": text, "attention_mask": torch.ones_like(text)})
    assert_close(logits_of(got), logits_of(plain))


# -- merges


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("site", SITES[:4], ids=str)
@pytest.mark.parametrize("name", families("llava_next", "llava_pixtral"))
def test_merges_match_the_oracle(name: str, site: Site, kind: str, attention: str) -> None:
    report = assert_oracle(name, Recipe(Absorb(at=site)), kind, attention)
    assert all(one.merge is not None for one in report.last.decisions)


@pytest.mark.parametrize("name", families())
def test_merges_of_what_was_merged_match_the_oracle(name: str) -> None:
    recipe = Recipe(
        Absorb(), "uniform(keep=0.7 at=1)", Absorb(at=Layer(1)), Absorb(at=Layer(3)),
        "random(keep=0.5 at=cache)",
    )  # fmt: skip
    assert_oracle(name, recipe, "batch")


def test_merges_at_caches_are_not_for_this_oracle() -> None:
    """They are carried out, and `test_cache_merges.py` replays them."""
    with pytest.raises(AssertionError, match="masks cannot replay merges in caches"):
        assert_oracle("llava", Recipe(Absorb(at=Cache())), "alone")


# -- some kinds of media alone


def kinds_in(name: str) -> list[Modality]:
    one = model_of(name)
    with prune(one.model, "none") as report, torch.no_grad():
        one.model(**prompt_of(one))
    codes = report.last.layouts[0].modality.unique().tolist()
    return [kind for kind, code in MODALITIES.items() if code in codes]


WHERE = ["input", 0, 2, "cache"]


@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("at", WHERE)
@pytest.mark.parametrize("name", MIXED)
def test_each_modality_alone_matches_the_oracle(name: str, at: str | int, kind: str) -> None:
    present = kinds_in(name)
    assert len(present) > 1 or name == "phi4_multimodal"
    for on in present:
        report = assert_oracle(name, Recipe(f"random(keep=0.4 on={on} at={at})"), kind)
        for decision in report.last.decisions:
            layout = report.last.layouts[decision.sample]
            mine = int((layout.modality == MODALITIES[on]).sum())
            assert decision.candidates == mine


@pytest.mark.parametrize("at", WHERE)
@pytest.mark.parametrize("name", MIXED)
def test_a_budget_for_each_modality_is_two_steps(name: str, at: str | int) -> None:
    one = model_of(name)
    inputs = prompt_of(one, "batch")
    with prune(one.model, f"uniform(keep.audio=0.5 keep.video=0.2 keep.image=0.2 at={at})") as two:
        together = generate(one, inputs)
    apart = f"uniform(keep=0.5 on=audio at={at}) + uniform(keep=0.2 on=image/video at={at})"
    with prune(one.model, apart):
        one_by_one = generate(one, inputs)
    assert torch.equal(logits_of(together), logits_of(one_by_one))
    assert two.media_tokens.after < two.media_tokens.before


def test_heads_that_hold_different_numbers_of_a_modality_are_refused() -> None:
    one = model_of("qwen2_5_omni")
    with prune(one.model, "random(keep=0.4 at=cache) + random(keep=0.5 on=audio at=cache)"):
        with pytest.raises(RecipeError, match="put the stage that acts on some modalities first"):
            generate(one, prompt_of(one))


# -- by chance


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n < 24 else (pytest.mark.full,)) for n in range(160)]
)
def test_extremes_among_others_match_the_oracle(seed: int) -> None:
    """A recipe made up by chance, with stages of these kinds put in anywhere."""
    name, text, kind, attention = drawn(seed, wide=True)
    draw = random.Random(seed)
    steps: list[Any] = [one for one in text.split(" + ") if one != "none"]
    modalities = adapter_for(model_of(name).model).modalities
    for _ in range(draw.randint(1, 2)):
        on = draw.choice([None, draw.choice(modalities)])
        site = draw.choice([Input(), Layer(draw.randint(0, 4)), Cache()])
        stage = Nothing(at=site, on=on)
        if not isinstance(site, Cache) and draw.random() < 0.7:
            stage = Absorb(at=site, on=on)
        steps.insert(draw.randint(0, len(steps)), stage)
    try:
        assert_oracle(name, Recipe(*steps), kind, attention)
    except RecipeError as error:
        assert "acts on" in str(error) and "key-value heads hold" in str(error)


def test_the_lists_of_families_are_of_families() -> None:
    assert {*FEW, *MIXED} <= {*NAMES} and not {*MROPE} & {*SOUND_ONLY}
