"""What outlives a forward: prompts and the state of stages, beside the cache they go with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tokenprune import prune
from tokenprune.core.context import Lifetime
from tokenprune.core.selection import Selection
from tokenprune.core.site import Cache, Input, Layer, Site
from tokenprune.core.stage import Stage
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.engine.rollback import Bookmark
from tokenprune.testing.harness import generate, model_of, prompt_of
from tokenprune.testing.oracle import assert_close


@dataclass
class Count:
    """How often a stage has acted, and on how many tokens."""

    times: int = 0
    tokens: torch.Tensor = field(default_factory=lambda: torch.zeros(1))


@dataclass(frozen=True, eq=False)
class Counting(Stage):
    """Keeps everything, and counts; notes what it has counted."""

    site: Site = Input()
    lives: Lifetime = "prompt"
    seen: list[tuple[int, float]] = field(default_factory=list)

    name = "counting"

    def select(self, context: Any) -> Selection:
        count = context.state(Count, lives=self.lives)
        count.times += 1
        count.tokens += len(context)
        self.seen.append((count.times, float(count.tokens)))
        return Selection(torch.arange(len(context)))


def two_prompts(stages: list[Counting], *, bookmark: bool = False) -> Any:
    """A prompt, and another on its cache, which a bookmark may be made between."""
    one = model_of("llava")
    with prune(one.model, *stages), torch.no_grad():
        cache = one.model(**prompt_of(one), use_cache=True).past_key_values
        mark = Bookmark(cache) if bookmark else None
        append(one, cache)
    return one, cache, mark


def append(one: Any, cache: Any) -> Any:
    new = one.inputs(3, 5)
    length = cache.get_seq_length() + new["input_ids"].shape[1]
    mask = torch.ones(1, length, dtype=torch.int64)
    return one.model(**{**new, "attention_mask": mask, CACHE_NAME: cache}, use_cache=True)


def test_state_lives_as_long_as_it_says() -> None:
    short, long = Counting(lives="prompt"), Counting(lives="sequence")
    two_prompts([short, long])
    assert [times for times, _ in short.seen] == [1, 1]
    assert [times for times, _ in long.seen] == [1, 2]
    assert long.seen[1][1] > long.seen[0][1] == short.seen[0][1]


def test_a_fresh_cache_has_no_state() -> None:
    stage = Counting(lives="sequence")
    two_prompts([stage])
    two_prompts([stage])
    assert [times for times, _ in stage.seen] == [1, 2, 1, 2]


def test_stages_of_one_step_share_state_and_steps_do_not() -> None:
    first, second = Counting(site=Layer(1)), Counting(site=Layer(1))
    cache = Counting(site=Cache())
    one = model_of("llava")
    with prune(one.model, first, second, cache):
        generate(one, prompt_of(one))
    assert first.seen == second.seen
    layers = one.model.config.get_text_config().num_hidden_layers
    assert [times for times, _ in cache.seen] == list(range(1, layers + 1))


@pytest.mark.parametrize("lives", ["prompt", "sequence"])
def test_rows_of_a_batch_have_state_of_their_own(lives: Lifetime) -> None:
    stage = Counting(lives=lives)
    one = model_of("llava")
    with prune(one.model, stage):
        generate(one, prompt_of(one, "batch"))
    assert [times for times, _ in stage.seen] == [1, 1]


def test_a_bookmark_takes_state_and_prompts_back() -> None:
    stage = Counting(lives="sequence")
    one, cache, mark = two_prompts([stage], bookmark=True)
    sequence = cache.layers[0].sequence
    assert [prompt.start for prompt in sequence.prompts] == [
        0,
        prompt_of(one)["input_ids"].shape[1],
    ]
    mark.restore()
    assert [prompt.start for prompt in sequence.prompts] == [0]
    with prune(one.model, stage), torch.no_grad():
        append(one, cache)
        mark.restore()
        append(one, cache)
    assert [times for times, _ in stage.seen] == [1, 2, 2, 2]
    assert len({tokens for _, tokens in stage.seen[1:]}) == 1


def test_a_cropped_cache_forgets_prompts_beyond_its_end() -> None:
    one, cache, _ = two_prompts([Counting()])
    sequence = cache.layers[0].sequence
    second = sequence.prompts[1].start
    cache.crop(second + 1)
    assert len(sequence.prompts) == 2  # some of it is left
    cache.crop(second)
    assert [prompt.start for prompt in sequence.prompts] == [0]
    cache.reset()
    assert sequence.prompts == [] and sequence.end == 0


def test_a_restored_cache_goes_on_as_if_nothing_had_been() -> None:
    one = model_of("llava")
    recipe = "uniform(keep=0.6) + random(keep=0.5 at=cache)"
    with prune(one.model, recipe), torch.no_grad():
        cache = one.model(**prompt_of(one), use_cache=True).past_key_values
        mark = Bookmark(cache)
        first = append(one, cache).logits
        mark.restore()
        assert_close(append(one, cache).logits, first)
