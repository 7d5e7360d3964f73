"""Beams in transformers itself: which prompts it cannot repeat."""

from __future__ import annotations

from functools import cache

from tokenprune.testing.harness import generate, logits_of, model_of, prompt_of, unpruned
from tokenprune.testing.oracle import assert_close


@cache
def failure_of_beams(name: str, kind: str) -> Exception | None:
    """What goes wrong in transformers, without pruning, where it repeats a prompt for beams."""
    one = model_of(name)
    try:
        output = generate(one, prompt_of(one, kind), num_beams=2, max_new_tokens=1)
        # Until one is chosen, beams of a row see the same.
        assert_close(output.logits[0][::2], logits_of(unpruned(name, kind).output)[:, 0])
    except (AssertionError, ValueError, RuntimeError) as error:
        return error
    return None
