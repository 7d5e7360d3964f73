"""Beams and several return sequences: each row as it is alone, or a refusal before any work.

`generate` repeats a prompt and its media. The grid is of what rows may hold: nothing, one picture
or sound, several; of equal sizes and of different ones; of one part (a window, a tile) or several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.cases import EVERYWHERE
from tests.releases import NEWEST
from tokenprune import prune
from tokenprune.errors import UnsupportedModelError
from tokenprune.testing.harness import generate, model_of
from tokenprune.testing.oracle import assert_close
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    PAD,
    VISION_END,
    VISION_START,
)
from tokenprune.testing.tiny.base import merged, noise, patches
from tokenprune.testing.tiny.hearing import mask_of
from tokenprune.testing.tiny.releases import RELEASE

Media = dict[str, Tensor]
Maker = Callable[[list[int], list[torch.Generator]], tuple[list[list[int]], Media]]
"""Makes, of the sizes (0 or 1) of some media and what to draw each from, their placeholders and
what a processor would return for all of them."""


def windows(lengths: list[int], width: int, generators: list[torch.Generator]) -> Tensor:
    """Sounds `[n, 16, width]`, padded."""
    made = [noise(generator, 1, 16, width) for generator in generators]
    return torch.cat(made) * mask_of(lengths, width)[:, None]


def heard(tokens: int) -> list[int]:
    return [AUDIO_START] + [AUDIO] * tokens + [AUDIO_END]


def qwen2_audio(sizes: list[int], generators: list[torch.Generator]) -> tuple[Any, Media]:
    frames = [(80, 60)[size] for size in sizes]
    return [heard(count // 4) for count in frames], {
        "input_features": windows(frames, 100, generators),
        "feature_attention_mask": mask_of(frames, 100),
    }


def qwen2_5_omni(sizes: list[int], generators: list[torch.Generator]) -> tuple[Any, Media]:
    frames = [(80, 48)[size] for size in sizes]
    return [heard(count // 4) for count in frames], {
        "input_features": windows(frames, 80, generators),
        "feature_attention_mask": mask_of(frames, 80),
    }


def audioflamingo3(sizes: list[int], generators: list[torch.Generator]) -> tuple[Any, Media]:
    """The larger one fills one window and part of a second."""
    of_size = [([60], 15), ([100, 30], 25 + 7)]
    lengths = [length for size in sizes for length in of_size[size][0]]
    drawn = [g for g, size in zip(generators, sizes, strict=True) for _ in of_size[size][0]]
    return [heard(of_size[size][1]) for size in sizes], {
        "input_features": windows(lengths, 100, drawn),
        "input_features_mask": mask_of(lengths, 100),
    }


def voxtral(sizes: list[int], generators: list[torch.Generator]) -> tuple[Any, Media]:
    """The larger one fills two windows."""
    drawn = [g for g, size in zip(generators, sizes, strict=True) for _ in range(size + 1)]
    spans = [[AUDIO_START] + [AUDIO] * (10 * (size + 1)) for size in sizes]
    return spans, {"input_features": windows([80] * len(drawn), 80, drawn)}


def granite_speech(sizes: list[int], generators: list[torch.Generator]) -> tuple[Any, Media]:
    tokens = [(15, 12)[size] for size in sizes]
    return [[AUDIO] * count for count in tokens], {
        "input_features": torch.cat([noise(generator, 1, 70, 16) for generator in generators]),
        "input_features_mask": mask_of(tokens, 15).bool(),
    }


def phi4_multimodal(sizes: list[int], generators: list[torch.Generator]) -> tuple[Any, Media]:
    tokens = [(15, 12)[size] for size in sizes]
    return [[AUDIO] * count for count in tokens], {
        "audio_input_features": torch.cat([noise(one, 1, 120, 16) for one in generators]),
        "audio_embed_sizes": torch.tensor(tokens),
        "audio_attention_mask": mask_of([8 * count for count in tokens], 120).bool(),
    }


def llava(sizes: list[int], generators: list[torch.Generator]) -> tuple[Any, Media]:
    """All are of one size."""
    pixels = torch.cat([noise(generator, 1, 3, 56, 56) for generator in generators])
    return [[IMAGE] * 16 for _ in sizes], {"pixel_values": pixels}


def llava_next(sizes: list[int], generators: list[torch.Generator]) -> tuple[Any, Media]:
    """Four tiles or two, and the view of the whole; then views of zeros."""
    of_size = [([90, 112], 16 + 6 * 9, 5), ([50, 112], 16 + 4 * 9, 3)]
    pixels = [noise(generator, 1, 5, 3, 56, 56) for generator in generators]
    for one, size in zip(pixels, sizes, strict=True):
        one[:, of_size[size][2] :] = 0
    return [[IMAGE] * of_size[size][1] for size in sizes], {
        "pixel_values": torch.cat(pixels),
        "image_sizes": torch.tensor([of_size[size][0] for size in sizes]),
    }


def grids(sizes: list[int], generators: list[torch.Generator]) -> tuple[Any, Media]:
    shapes = [((1, 4, 8), (1, 8, 12))[size] for size in sizes]
    pixels = [patches(one, [grid]) for one, grid in zip(generators, shapes, strict=True)]
    spans = [[VISION_START] + [IMAGE] * merged(grid) + [VISION_END] for grid in shapes]
    return spans, {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(shapes)}


MAKERS: dict[str, Maker] = {
    "audioflamingo3": audioflamingo3,
    "granite_speech": granite_speech,
    "llava": llava,
    "llava_next": llava_next,
    "phi4_multimodal": phi4_multimodal,
    "qwen2_5_omni": qwen2_5_omni,
    "qwen2_5_vl": grids,
    "qwen2_audio": qwen2_audio,
    "qwen3_omni_moe": grids,
    "qwen3_vl": grids,
    "voxtral": voxtral,
}

SEEN = ("llava", "llava_next", "qwen2_5_vl", "qwen3_omni_moe", "qwen3_vl")
"""Of these the media are pictures, which the newest release encodes ahead and repeats right."""

IN_WINDOWS = ("audioflamingo3", "voxtral")
"""Of these the larger sound comes in two parts."""

ROWS: list[list[list[int]]] = [
    # For each row of the batch the sizes of its media.
    [[0]],
    [[0, 0]],
    [[0, 1]],
    [[0], [0]],
    [[0], [1]],
    [[1], [1]],
    [[0], []],
    [[], [0]],
    [[1], []],
    [[], [1]],
    [[0, 0], []],
    [[], [0, 0]],
    [[0, 1], []],
    [[], [1, 0]],
    [[0, 0], [0]],
    [[0], [0, 0]],
    [[0, 0], [0, 0]],
    [[0, 1], [1, 0]],
    [[0, 0], [], [0]],
    [[0], [], [0, 0]],
    [[], [0], [0]],
    [[0, 0, 0], [], []],
    [[], []],
]


def prompt_of_rows(name: str, rows: list[list[int]], only: int | None = None) -> dict[str, Any]:
    """A batch, padded on the left; or one of its rows alone."""
    texts, sizes, generators = [], [], []
    for number, row in enumerate(rows):
        if only in (None, number):
            texts.append(torch.Generator().manual_seed(number))
            sizes.append(row)
            seeds = [100 * number + place + 50 for place in range(len(row))]
            generators += [torch.Generator().manual_seed(seed) for seed in seeds]
    flat = [size for row in sizes for size in row]
    spans, media = MAKERS[name](flat, generators) if flat else ([], {})
    left = iter(spans)
    prompts = []
    for generator, row in zip(texts, sizes, strict=True):
        words = torch.randint(5, 140, (4 + len(row), 3), generator=generator).tolist()
        inner = [token for word in words[4:] for token in [*next(left), *word]]
        prompts.append([*words[0], *words[1], *inner, *words[2], *words[3]])
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(one)) + one for one in prompts])
    inputs = {"input_ids": ids, **media, "attention_mask": (ids != PAD).long()}
    if MAKERS[name] is grids and name != "qwen3_omni_moe":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


def is_dealt_right(name: str, rows: list[list[int]]) -> bool:
    """Whether the newest release of transformers gives each row its own media."""
    parts = [sum(1 + (name in IN_WINDOWS and size == 1) for size in row) for row in rows]
    return name in SEEN or max(parts) <= 1


SHORT = ("audioflamingo3", "llava", "qwen2_5_vl", "qwen2_audio")


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else (pytest.mark.full,)) for n in MAKERS]
)
def test_rows_with_beams_are_those_of_each_row_alone_or_refused(
    name: str, rows: list[list[int]]
) -> None:
    one = model_of(name)
    inputs = prompt_of_rows(name, rows)
    single = max(map(len, rows)) <= 1 and is_dealt_right(name, rows)
    if RELEASE < NEWEST and single and fails_unpruned(name, rows):
        pytest.skip("this release of transformers gets it wrong without pruning")
    generate(one, inputs, max_new_tokens=1)  # some models keep something of their first run
    before = snapshot(one.model)
    alone: list[Tensor] = []
    refused = []
    for settings in (
        {"num_beams": 3},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 3},
    ):
        with prune(one.model, EVERYWHERE) as report:
            try:
                output = generate(one, inputs, max_new_tokens=2, **settings)
            except UnsupportedModelError:
                assert not report.calls, "refused after some work"
                refused.append(settings)
                continue
        alone = alone or [first_logits(name, EVERYWHERE, rows, n) for n in range(len(rows))]
        # Until one is chosen, beams of a row see the same.
        expected = torch.cat(alone).repeat_interleave(3, dim=0)  # [3 B, V]
        assert_close(output.logits[0], expected, f"logits with {settings}")
    assert snapshot(one.model) == before
    assert len(refused) in (0, 3)
    if RELEASE >= NEWEST:
        assert bool(refused) != is_dealt_right(name, rows), "refused without need, or not at all"


def first_logits(name: str, recipe: str, rows: list[list[int]], row: int) -> Tensor:
    """`[1, V]`, what a row is answered with when it is alone."""
    one = model_of(name)
    with prune(one.model, recipe):
        return generate(one, prompt_of_rows(name, rows, row), max_new_tokens=1).logits[0]


def fails_unpruned(name: str, rows: list[list[int]]) -> bool:
    """Whether rows with beams are not what they are alone, without pruning."""
    one = model_of(name)
    output = generate(one, prompt_of_rows(name, rows), max_new_tokens=1, num_beams=3)
    alone = [first_logits(name, "none", rows, row) for row in range(len(rows))]
    expected = torch.cat(alone).repeat_interleave(3, dim=0)
    return float((output.logits[0] - expected).abs().max()) > 1e-3
