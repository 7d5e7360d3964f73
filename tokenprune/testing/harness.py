"""Runs that contracts look at, pruned and not; those by name are made once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapters.base import adapter_for
from tokenprune.core.layout import MODALITIES
from tokenprune.core.recipe import Recipe
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.engine.patch import prune
from tokenprune.testing import tiny
from tokenprune.testing.oracle import (
    Replay,
    assert_close,
    dense_logits,
    positions_logged,
    read_decisions,
)
from tokenprune.testing.tiny import decoder_of

__all__ = [
    "NEW_TOKENS",
    "Run",
    "assert_matches_oracle",
    "codes_of",
    "forget_pruned_runs",
    "generate",
    "logits_of",
    "model_of",
    "prompt_of",
    "pruned",
    "replay_of",
    "same",
    "sample_of",
    "second_turn",
    "unpruned",
    "windows_of",
]

NEW_TOKENS = 6
"""Tokens that are generated where nothing else is said."""


def model_of(name: str, attention: str = "sdpa") -> tiny.Tiny:
    """The tiny model of this name, shared by all tests."""
    return _model_of(name, attention)


@cache
def _model_of(name: str, attention: str) -> tiny.Tiny:
    one = tiny.build(name, attention=attention)
    with torch.no_grad():  # in its first forward transformers puts hooks into a model, for good
        one.model(**one.inputs())
    return one


def prompt_of(one: tiny.Tiny, kind: str = "alone") -> dict[str, Any]:
    """A prompt: "alone", "second" or the left-padded "batch" of the two."""
    if kind == "batch":
        return one.batch()
    return one.inputs(1, 4, short=True) if kind == "second" else one.inputs(0, 7)


@torch.no_grad()
def generate(one: tiny.Tiny, inputs: Mapping[str, Any], **settings: Any) -> Any:
    """Greedy decoding with the logits of each step."""
    defaults = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return one.model.generate(
        **inputs,
        suppress_tokens=one.suppress,
        return_dict_in_generate=True,
        output_logits=True,
        **{**defaults, **settings},
    )


def logits_of(output: Any) -> Tensor:
    """`[B, T, V]` of a generation."""
    return torch.stack(output.logits, dim=1)


def same(one: Any, other: Any) -> bool:
    """Whether two generations are bit-identical."""
    return torch.equal(one.sequences, other.sequences) and torch.equal(
        logits_of(one), logits_of(other)
    )


def second_turn(one: tiny.Tiny, inputs: Mapping[str, Any]) -> tuple[Any, int]:
    """Answer, then answer a further question with the cache of the first.

    Returns:
        The second generation, and the length of its prompt.
    """
    first = generate(one, inputs)
    generator = torch.Generator().manual_seed(9)
    question = torch.randint(5, 140, (len(first.sequences), 5), generator=generator)
    tokens = torch.cat([first.sequences, question], dim=1)
    grown = tokens.shape[1] - inputs["input_ids"].shape[1]
    more = {"input_ids": tokens}
    more["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, grown))
    return generate(one, more, **{CACHE_NAME: first.past_key_values}), tokens.shape[1]


@dataclass(frozen=True)
class Run:
    """A generation, pruned or not."""

    one: tiny.Tiny
    recipe: str | Recipe
    inputs: dict[str, Any]
    output: Any
    calls: list[Any]
    positions: Tensor | None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, padding included."""
        length: int = self.inputs["input_ids"].shape[1]
        return length

    @property
    def read(self) -> Tensor:
        """`[B, S]`, the tokens that were fed to the model: all but the last one."""
        sequences: Tensor = self.output.sequences
        return sequences[:, :-1]

    @property
    def replay(self) -> Replay:
        """What was decided, as masks."""
        return replay_of(self.one, self.recipe, self.calls, *self.read.shape)


def unpruned(name: str, kind: str = "alone", attention: str = "sdpa") -> Run:
    """The same prompt without tokenprune."""
    return _unpruned(name, kind, attention)


@cache
def _unpruned(name: str, kind: str, attention: str) -> Run:
    one = model_of(name, attention)
    inputs = prompt_of(one, kind)
    with positions_logged(decoder_of(one.model)) as log:
        output = generate(one, inputs)
    return Run(one, "none", inputs, output, [], log.whole())


def pruned(name: str, recipe: str, kind: str = "alone", attention: str = "sdpa") -> Run:
    """A prompt answered under a recipe."""
    return _pruned(name, recipe, kind, attention)


@cache
def _pruned(name: str, recipe: str, kind: str, attention: str) -> Run:
    before = unpruned(name, kind, attention)
    one = before.one
    with prune(one.model, recipe) as report:
        output = generate(one, before.inputs)
    return Run(one, recipe, before.inputs, output, report.calls, before.positions)


def forget_pruned_runs() -> None:
    """Run anew what is asked for next: the engine has changed."""
    _pruned.cache_clear()


def windows_of(one: tiny.Tiny) -> list[int | None]:
    """How far back the queries of each layer look; None for layers with full attention."""
    config = decoder_of(one.model).config
    types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in types]


def codes_of(one: tiny.Tiny, recipe: str | Recipe) -> dict[int, frozenset[int]]:
    """Codes of the modalities that each step of a recipe acts on."""
    steps = Recipe(recipe).steps(adapter_for(one.model).shape)
    return {
        step.number: frozenset(MODALITIES[name] for name in step.stage.acts_on) for step in steps
    }


def replay_of(
    one: tiny.Tiny, recipe: str | Recipe, calls: Iterable[Any], samples: int, length: int
) -> Replay:
    """Recorded decisions as masks."""
    kv_heads = decoder_of(one.model).config.num_key_value_heads
    return read_decisions(calls, samples, length, kv_heads, codes_of(one, recipe))


def sample_of(calls: Iterable[Any], row: int) -> list[Any]:
    """Calls with one row of the batch only, as row 0."""
    return [
        SimpleNamespace(
            layouts=[call.layouts[row]],
            length=call.length,
            decisions=[
                SimpleNamespace(**{**vars(decision), "sample": 0})
                for decision in call.decisions
                if decision.sample == row
            ],
        )
        for call in calls
    ]


def assert_matches_oracle(run: Run) -> None:
    """Prefill and decoding logits are those of the dense model with the same tokens masked."""
    expected = dense_logits(run.one.model, run.inputs, run.read, run.replay, run.positions)
    assert_close(logits_of(run.output), expected[:, run.prompt_length - 1 :])
