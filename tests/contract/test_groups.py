"""A prompt that is prefilled in groups is the prompt prefilled at once, and pruned as it says."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.contract.cases import drawn
from tests.contract.doubles import Absorb, Clean, Half, Nothing
from tests.contract.test_late import SEEN, SINCE
from tests.contract.test_stages import assert_oracle, families
from tokenprune import prune
from tokenprune.adapters.base import adapter_for
from tokenprune.core.group import Group
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import Attention
from tokenprune.core.site import Cache, Layer
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
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import decoder_of

SIZES = ["groups(size=2)", "groups(size=4)", "groups(size=5 per=token)"]
RECIPES = [
    "uniform(keep=0.5)",
    "random(keep=0.5 at=cache)",
    "uniform(keep=0.8) + random(keep=0.7 at=1) + random(keep=0.6 at=3) + random(keep=0.5 at=cache)",
    "plphp(keep=0.5)",
    "knorm(keep=0.5) + fastv(keep=0.5)",
]


def groups_of(report: Any) -> int:
    groups = report.last.groups
    return 1 if groups is None else int(torch.cat(groups).max()) + 1


def one_clip(name: str) -> dict[str, Any]:
    return prompt_of(model_of(name))


def skip_images_cut_in_two(name: str, size: str) -> None:
    one = model_of(name)
    if adapter_for(one.model).sees_ahead and "token" in size:
        with prune(one.model, size), pytest.raises(RecipeError, match="would cut images in two"):
            generate(one, prompt_of(one))
        pytest.skip("its images see ahead")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", families())
def test_groups_are_the_prompt_at_once(name: str, size: str) -> None:
    skip_images_cut_in_two(name, size)
    before = unpruned(name)
    one = before.one
    state = snapshot(one.model)
    with prune(one.model, size) as report:
        output = generate(one, before.inputs)
    assert torch.equal(output.sequences, before.output.sequences)
    assert_close(logits_of(output), logits_of(before.output))
    assert snapshot(one.model) == state
    assert report.last.media_tokens.after == report.last.media_tokens.before
    if "token" in size:
        assert groups_of(report) == -(-report.last.media_tokens.before // 5)


@pytest.mark.parametrize("size", SIZES[:1] + SIZES[2:])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", families())
def test_with_everything_kept_groups_are_bit_identical(name: str, recipe: str, size: str) -> None:
    skip_images_cut_in_two(name, size)
    one, inputs = model_of(name), one_clip(name)
    kept = re.sub(r"keep=[\d.]+", "keep=1.0", recipe)
    with prune(one.model, size):
        plain = generate(one, inputs)
    with prune(one.model, f"{size} + {kept}"):
        pruned = generate(one, inputs)
    assert torch.equal(logits_of(plain), logits_of(pruned))


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("size", SIZES[:1] + SIZES[2:])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", families())
def test_pruned_groups_match_the_oracle(name: str, recipe: str, size: str, attention: str) -> None:
    skip_images_cut_in_two(name, size)
    report = assert_oracle(name, Recipe(f"{size} + {recipe}"), "alone", attention)
    assert report.last.media_tokens.after < report.last.media_tokens.before
    if "plphp" in recipe:  # it waits for the question, and then looks at all there is
        assert {one.candidates for one in report.last.decisions} == {len(report.last.layouts[0])}
    presence = report.last.presence()
    full = [n for n, window in enumerate(windows_of(model_of(name))) if window is None]
    if len(full) == len(windows_of(model_of(name))):
        stored = report.last.media_entries.double().mean(dim=(1, 2))
        assert float(presence.sum()) == pytest.approx(float(stored[0]), abs=1e-3)


@pytest.mark.parametrize("name", families())
def test_later_stages_see_all_groups(name: str) -> None:
    recipe = Recipe(
        "groups(size=2) + uniform(keep=0.8) + random(keep=0.7 at=2) + random(keep=0.8 at=cache)",
        Clean(),
        Half(
            at=Cache((1, 3), after="prefill"),
            signal=Attention(queries="text", reduce="mean", heads="mean"),
        ),
        Half(at=Cache(after="decode", every=2)),
    )
    assert_oracle(name, recipe, "alone")


@pytest.mark.parametrize("name", families())
def test_extremes_in_groups_match_the_oracle(name: str) -> None:
    skip_images_cut_in_two(name, "groups(size=5 per=token)")
    assert_oracle(name, Recipe("groups(size=5 per=token)", Absorb(), Absorb(at=Layer(2))), "alone")
    assert_oracle(name, Recipe("groups(size=5 per=token)", Nothing(at=Layer(1))), "alone")


@pytest.mark.parametrize("name", families())
def test_a_second_turn_after_groups_matches_the_oracle(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one)
    recipe = Recipe("groups(size=2) + random(keep=0.5) + random(keep=0.7 at=cache)")
    with positions_logged(decoder_of(one.model)) as log:
        second_turn(one, inputs)
    with prune(one.model, recipe) as report:
        output, length = second_turn(one, inputs)
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = dense_logits(one.model, inputs, read, replay, log.whole())
    assert_close(logits_of(output), expected[:, length - 1 :])


@pytest.mark.parametrize("name", families())
@torch.no_grad()
def test_all_logits_are_those_of_the_rows_left(name: str) -> None:
    skip_images_cut_in_two(name, "groups(size=5 per=token)")
    one, inputs = model_of(name), one_clip(name)
    recipe = Recipe("groups(size=5 per=token) + random(keep=0.5)")
    with prune(one.model, recipe) as report:
        got = one.model(**inputs, use_cache=True).logits
    ids = inputs["input_ids"]
    replay = replay_of(one, recipe, report.calls, *ids.shape)
    expected = dense_logits(one.model, inputs, ids, replay)
    rows = report.last.logit_rows
    assert rows.shape == got.shape[:2]
    assert_close(got[0], expected[0][rows[0]])


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_alike_rows_of_a_batch_are_prefilled_together(name: str) -> None:
    one, inputs = model_of(name), one_clip(name)
    recipe = "groups(size=2) + random(keep=0.5) + random(keep=0.5 at=cache)"
    with prune(one.model, recipe):
        alone = generate(one, inputs)
        beams = generate(one, inputs, num_beams=2)
        sampled = generate(one, inputs, num_return_sequences=2, do_sample=True)
    assert alone.sequences.shape[0] == beams.sequences.shape[0] == 1
    assert sampled.sequences.shape[0] == 2
    assert_close(sampled.logits[0][:1], alone.logits[0])


def test_rows_that_end_groups_at_different_places_are_refused() -> None:
    one = model_of("llava_onevision")
    with prune(one.model, "groups(size=2)"):
        with pytest.raises(RecipeError, match="at different places; prefill them one by one"):
            generate(one, prompt_of(one, "batch"))


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"use_cache": False}, "leave out use_cache=False"),
        ({"output_hidden_states": True}, "leave out output_hidden_states"),
    ],
)
def test_what_only_a_whole_prompt_gives_is_refused(settings: dict[str, Any], error: str) -> None:
    one = model_of("llava_onevision")
    with prune(one.model, "groups(size=2)"), torch.no_grad():
        with pytest.raises(RecipeError, match=error):
            one.model(**prompt_of(one), **settings)


def test_groups_and_compact_positions_are_refused() -> None:
    with pytest.raises(RecipeError, match="numbers a whole prompt"):
        with prune(model_of("llava").model, "groups", positions="compact"):
            raise AssertionError("entered")


def test_two_sizes_are_refused() -> None:
    recipe = Recipe("groups(size=2) + groups(size=3)")
    with pytest.raises(RecipeError, match="for groups of 2 frames and .* of 3 frames"):
        with prune(model_of("llava").model, recipe):
            raise AssertionError("entered")
    assert Recipe("groups(size=2) + groups(size=2)").group == Group(2)


def test_a_group_that_splits_a_temporal_patch_is_refused() -> None:
    one = model_of("qwen2_5_vl")
    assert adapter_for(one.model).pictures_per_frame == 2
    with prune(one.model, "groups(size=3)"):
        with pytest.raises(RecipeError, match="give a multiple of 2"):
            generate(one, prompt_of(one))


def test_groups_of_seconds_need_times() -> None:
    one = model_of("llava_onevision")
    with prune(one.model, "groups(size=1 per=second)"):
        with pytest.raises(RecipeError, match="need the times of all media tokens"):
            generate(one, prompt_of(one))


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_sizes_that_are_none_are_refused(size: Any) -> None:
    with pytest.raises(RecipeError, match="must hold at least 1"):
        Group(size)
    with pytest.raises(RecipeError, match="a group is of"):
        replace(Group(2), per="day")


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n < 24 else (pytest.mark.full,)) for n in range(160)]
)
def test_groups_and_later_stages_by_chance_match_the_oracle(seed: int) -> None:
    """A recipe made up by chance, in groups, with stages at later times put in anywhere."""
    name, text, _, attention = drawn(seed, wide=True)
    draw = random.Random(seed)
    size = draw.choice(["none", "groups(size=2)", "groups(size=4)", "groups(size=5 per=token)"])
    if "token" in size and adapter_for(model_of(name).model).sees_ahead:
        size = "groups(size=2)"
    steps: list[Any] = [one for one in text.split(" + ") if one != "none"]
    sites = [Cache(after="prefill"), Cache((1, 2), after="prefill"), Cache(after="decode", every=2)]
    for _ in range(draw.randint(0, 2)):
        site = draw.choice(sites)
        seen = SINCE if site.after == "decode" else SEEN
        steps.insert(draw.randint(0, len(steps)), Half(at=site, signal=draw.choice(seen)))
    assert_oracle(name, Recipe(size, *steps), "alone", attention)
