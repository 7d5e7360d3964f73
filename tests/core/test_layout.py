"""The table of media tokens."""

from __future__ import annotations

import pytest
import torch

from tests.methods.doubles import grid, join, sound
from tokenprune.core.layout import TokenLayout


@pytest.fixture
def prompt() -> TokenLayout:
    """An image of 2 tiles of 2 tokens, a video of 3 frames of 2, a sound of 6."""
    return join(grid(1, 2, 2), grid(1, 2, 3, video=True), sound(6))


def test_layout_spans_are_images_frames_and_sounds(prompt: TokenLayout) -> None:
    assert prompt.spans().tolist() == [0] * 4 + [1, 1, 2, 2, 3, 3] + [4] * 6


@pytest.mark.parametrize(
    ("per", "groups"),
    [
        ("prompt", [0] * 16),
        ("item", [0] * 4 + [1] * 6 + [2] * 6),
        ("frame", [0] * 4 + [1, 1, 2, 2, 3, 3] + [4] * 6),
        ("second", [0] * 4 + [1, 1, 2, 2, 3, 3] + [4, 4, 4, 4, 5, 5]),
    ],
)
def test_layout_groups(prompt: TokenLayout, per: str, groups: list[int]) -> None:
    assert prompt.groups(per).tolist() == groups  # type: ignore[arg-type]


def test_layout_groups_of_interleaved_items() -> None:
    layout = join(grid(1, 2, video=True), grid(1, 2, video=True))[torch.tensor([0, 2, 1, 3])]
    assert layout.groups("item").tolist() == [0, 1, 0, 1]


def test_layout_groups_are_numbered_anew_for_a_part(prompt: TokenLayout) -> None:
    part = prompt[torch.tensor([0, 6, 7, 15])]
    assert part.spans().tolist() == [0, 1, 1, 2]
    assert part.position.tolist() == [0, 9, 10, 21]


def test_layout_takes_a_mask(prompt: TokenLayout) -> None:
    assert len(prompt[prompt.modality == 2]) == 6


def test_layout_of_nothing(prompt: TokenLayout) -> None:
    empty = prompt[torch.zeros(0, dtype=torch.int64)]
    assert len(empty) == 0
    assert empty.spans().tolist() == empty.groups("second").tolist() == []


def test_layout_prints_counts(prompt: TokenLayout) -> None:
    assert repr(prompt) == "TokenLayout(16 tokens, 3 items, 6 canvases)"


def test_layout_fails() -> None:
    two, three = torch.arange(2), torch.arange(3)
    with pytest.raises(ValueError, match=r"all columns of a TokenLayout must be \[N\]"):
        TokenLayout(two, two, two, two, two, two, two, three)
