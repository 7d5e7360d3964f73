"""The global random generators, which no method may depend on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

__all__ = ["disturb", "restored"]


def disturb(seed: int) -> None:
    """Put the global generators into a state of their own."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def restored() -> Iterator[None]:
    """After the `with` block they are as before it."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
