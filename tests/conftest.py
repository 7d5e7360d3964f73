"""What every test relies on."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch

# Tiny tensors gain nothing from threads, and lose much where cores are shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def restore_random_state() -> Iterator[None]:
    """Start each test from fixed seeds, and leave global random state as it was found."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a family's tiny checkpoint; each is saved once. Do not write to it."""
    from tests.checkpoints import save_checkpoint

    @functools.cache
    def folder(name: str) -> Path:
        return save_checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name)

    return folder
