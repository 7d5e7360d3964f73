"""Layers with a sliding window: what they show, forget, and take back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.sequence import Sequence
from tokenprune.errors import UnsupportedModelError

WINDOW, SLACK = 8, 64


def step(layer: PrunedLayer, rows: list[list[int]], end: int) -> Tensor:
    """Feed a layer tokens whose keys are their logical indices, -1 for holes; returns the keys."""
    index = torch.tensor(rows)
    layer.sequence.rows, layer.sequence.end = index, end
    layer.sequence.holes = bool((index < 0).any())
    keys = index[:, None, :, None].float()
    shown, _ = layer.update(keys, keys.clone())
    layer.evict()
    layer.sequence.rows = None
    return shown[:, 0, :, 0]


def filled(tokens: int) -> PrunedLayer:
    layer = PrunedLayer(Sequence(), WINDOW)
    step(layer, [list(range(tokens))], tokens)
    return layer


def test_queries_are_shown_their_window_only() -> None:
    layer = filled(50)
    assert layer.keys.shape[2] == 50, "nothing is forgotten yet"
    assert step(layer, [[50]], 51).tolist() == [[43, 44, 45, 46, 47, 48, 49, 50]]
    assert layer.shown is not None and layer.shown[0, 0].tolist() == list(range(43, 51))
    # Three tokens came, of which one is left: what the first of them saw is shown, too.
    assert step(layer, [[53]], 54).tolist() == [[*range(42, 51), 53]]


def test_a_full_layer_shows_all() -> None:
    layer = PrunedLayer(Sequence())
    step(layer, [list(range(300))], 300)
    assert step(layer, [[300]], 301).shape[1] == 301


@pytest.mark.parametrize("tokens", [WINDOW + 2 * SLACK - 1, WINDOW + 2 * SLACK, 300])
def test_a_window_forgets_in_steps(tokens: int) -> None:
    layer = filled(tokens)
    if tokens < WINDOW + 2 * SLACK:
        assert layer.keys.shape[2] == tokens
    else:
        assert layer.keys[0, 0, :, 0].tolist() == list(range(tokens - WINDOW - SLACK + 1, tokens))
    assert layer.get_seq_length() == tokens


def test_a_window_of_pruned_rows_forgets_by_place() -> None:
    """Every third token is left in the first sample, every second in the other."""
    layer = PrunedLayer(Sequence(), WINDOW)
    sparse, dense = list(range(2, 450, 3)), list(range(1, 450, 2))
    rows = [[-1] * (len(dense) - len(sparse)) + sparse, dense]
    step(layer, rows, 450)
    assert layer.index is not None
    first = 450 - WINDOW - SLACK
    for sample, tokens in enumerate((sparse, dense)):
        stored = [at for at in layer.index[sample, 0].tolist() if at >= 0]
        assert stored == [at for at in tokens if at > first]


@pytest.mark.parametrize("back", [1, SLACK])
def test_what_is_taken_back_leaves_a_whole_window(back: int) -> None:
    layer = filled(300)
    layer.crop(-back)
    end = 300 - back
    assert layer.get_seq_length() == end
    assert step(layer, [[end]], end + 1).tolist() == [list(range(end - WINDOW + 1, end + 1))]


def test_more_than_a_window_remembers_cannot_be_taken_back() -> None:
    layer = filled(300)
    with pytest.raises(UnsupportedModelError, match="cannot take back 65 tokens: .*window of 8"):
        layer.crop(-SLACK - 1)
    assert layer.get_seq_length() == 300


def test_all_can_be_taken_back_while_nothing_is_forgotten() -> None:
    layer = filled(100)
    layer.crop(-95)
    assert layer.keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_reset_window_starts_anew() -> None:
    layer: Any = filled(300)
    layer.reset()
    assert (layer.get_seq_length(), layer.index.shape[-1]) == (0, 0)
    step(layer, [list(range(20))], 20)
    layer.crop(-15)
    assert layer.get_seq_length() == 5
