"""VisionZip: dominant tokens, and targets that absorb the others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.doubles import Spy
from tests.methods.doubles import DenseView, grid, input_context, join
from tokenprune import prune
from tokenprune.core.layout import TokenLayout
from tokenprune.core.recipe import Recipe
from tokenprune.core.selection import Selection
from tokenprune.core.site import Input
from tokenprune.errors import RecipeError, UnsupportedModelError
from tokenprune.methods.visionzip import Dominance, EncoderKeys, VisionZip
from tokenprune.testing.harness import model_of, prompt_of

LAYOUT = join(grid(4, 5), grid(3, 3, 4, video=True))


def select(stage: VisionZip, scores: Tensor, keys: Tensor, layout: TokenLayout) -> Selection:
    dominance, of_keys = stage.needs
    signals = {dominance: scores, of_keys: keys}
    return stage.select(input_context(layout, signals=signals))


def merged(selection: Selection, features: Tensor) -> Tensor:
    """What the kept tokens become, as loops."""
    found = features.clone()
    if selection.merge is not None:
        merge = selection.merge
        parts = [column.tolist() for column in (merge.source, merge.target, merge.weight)]
        for target in set(parts[1]):
            found[target] = sum(
                weight * features[source]
                for source, one, weight in zip(*parts, strict=True)
                if one == target
            )
    return found[selection.index]


def plain(
    features: Tensor, scores: Tensor, keys: Tensor, kept: int, targets: int, mean: bool
) -> tuple[list[int], Tensor]:
    """The method as loops, on one picture: kept tokens and what they become."""
    every = range(len(scores))
    dominant = sorted(every, key=lambda n: (-scores[n], n))[: kept - targets]
    rest = [n for n in every if n not in dominant]
    step = max(1, len(rest) // targets) if targets else 1
    chosen = [rest[n * step] for n in range(targets)]
    clusters: dict[int, list[int]] = {target: [] for target in chosen}
    for n in rest:
        if targets and n not in chosen:
            likeness = [float(torch.cosine_similarity(keys[n], keys[m], dim=0)) for m in chosen]
            clusters[chosen[likeness.index(max(likeness))]].append(n)
    found = features.clone()
    for target, members in clusters.items():
        if members and mean:
            found[target] = features[[target, *members]].mean(dim=0)
        elif members:
            found[target] = features[target] + features[members].mean(dim=0)
    index = sorted([*dominant, *chosen])
    return index, found[index]


def by_hand(contextual: Any) -> tuple[Selection, Tensor]:
    """Six tokens: 1 and 4 dominate; of 0, 2, 3, 5 the targets are 0 and 3."""
    scores = torch.tensor([0.1, 0.9, 0.2, 0.1, 0.8, 0.3])
    degrees = torch.tensor([0.0, 0, 20, 90, 0, 30]).deg2rad()
    keys = torch.stack([degrees.cos(), degrees.sin()], dim=-1)
    stage = VisionZip(keep=4, targets=0.5, contextual=contextual)
    selection = select(stage, scores, keys, grid(2, 3))
    features = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]])
    return selection, merged(selection, features)[:, 0]


def test_a_contextual_token_is_its_target_plus_the_mean() -> None:
    selection, features = by_hand("sum")
    assert selection.index.tolist() == [0, 1, 3, 4]
    assert features.tolist() == [1 + (4 + 32) / 2, 2, 8, 16]  # nothing went to token 3
    assert selection.merge is not None
    weight = selection.merge.weight[selection.merge.target == 0]
    assert float(weight.sum()) == 2


def test_a_contextual_token_is_a_true_average() -> None:
    _, features = by_hand("mean")
    torch.testing.assert_close(features, torch.tensor([(1 + 4 + 32) / 3, 2, 8, 16]))


@pytest.mark.parametrize("contextual", ["sum", "mean"])
@pytest.mark.parametrize(("keep", "targets"), [(9, 0.3), (9, 0.0), (9, 1.0), (19, 0.5), (2, 0.4)])
def test_random_pictures_match_loops(keep: int, targets: float, contextual: Any) -> None:
    generator = torch.Generator().manual_seed(keep)
    scores = torch.rand(20, generator=generator)
    keys = torch.randn(20, 3, generator=generator)
    features = torch.randn(20, 4, generator=generator)
    stage = VisionZip(keep=keep, targets=targets, contextual=contextual)
    selection = select(stage, scores, keys, grid(4, 5))
    number = math.floor(keep * targets + 0.5)
    index, expected = plain(features, scores, keys, keep, number, contextual == "mean")
    assert selection.index.tolist() == index
    torch.testing.assert_close(merged(selection, features), expected)


def test_each_image_and_frame_is_on_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(len(LAYOUT), generator=generator)
    keys = torch.randn(len(LAYOUT), 3, generator=generator)
    features = torch.randn(len(LAYOUT), 2, generator=generator)
    selection = select(VisionZip(keep=0.4, targets=0.5), scores, keys, LAYOUT)
    kept, parts = [], []
    for group in range(5):
        rows = (LAYOUT.spans() == group).nonzero()[:, 0]
        number = 8 if group == 0 else 4
        index, found = plain(features[rows], scores[rows], keys[rows], number, number // 2, False)
        kept += rows[index].tolist()
        parts.append(found)
    assert selection.index.tolist() == kept
    torch.testing.assert_close(merged(selection, features), torch.cat(parts))


def test_the_numbers_of_the_paper() -> None:
    for keep, targets in ((64, 10), (128, 20), (192, 30)):
        generator = torch.Generator().manual_seed(keep)
        scores, keys = torch.rand(576, generator=generator), torch.randn(576, 8)
        selection = select(VisionZip(keep=keep), scores, keys, grid(24, 24))
        assert selection.merge is not None
        assert len(selection.index) == keep
        assert len(selection.merge.target.unique()) == targets
        assert len(selection.merge.source) == 576 - keep + targets
    assert VisionZip().budget(input_context(grid(24, 24))).total == 64


def test_ties_go_to_the_lower_index_and_target() -> None:
    selection = select(
        VisionZip(keep=4, targets=0.5), torch.ones(10), torch.ones(10, 2), grid(2, 5)
    )
    assert selection.index.tolist() == [0, 1, 2, 6]
    assert selection.merge is not None
    assert set(selection.merge.target[2:].tolist()) == {2}


def test_keys_of_zero_and_one_token_of_the_rest() -> None:
    selection = select(VisionZip(keep=3, targets=0.4), torch.rand(4), torch.zeros(4, 2), grid(2, 2))
    assert len(selection.index) == 3 and selection.merge is not None
    assert len(selection.merge.source) == 2


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("keep", [1.0, 100])
def test_all_stay(tokens: int, keep: Any) -> None:
    selection = select(
        VisionZip(keep=keep, targets=0.5),
        torch.rand(tokens),
        torch.rand(tokens, 2),
        grid(1, tokens),
    )
    assert selection.index.tolist() == list(range(tokens)) and selection.merge is None


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_counts_are_exact(tokens: int) -> None:
    for count in {1, max(1, tokens - 1), tokens}:
        for targets in (0.0, 0.5, 1.0):
            scores, keys = torch.rand(tokens), torch.randn(tokens, 2)
            stage = VisionZip(keep=count, targets=targets)
            index = select(stage, scores, keys, grid(1, tokens)).index
            assert len(index.unique()) == count


def test_what_is_read_of_the_encoder() -> None:
    attention = torch.tensor([[[0.9, 0.1], [0.6, 0.4]]])
    row, keys = torch.tensor([[0.2, 0.8]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    view, without = DenseView(attention, class_row=row, keys=keys), DenseView(attention, keys=keys)
    assert Dominance("received").of(view).tolist() == [[1.5, 0.5]]
    assert torch.equal(Dominance("class").of(view), row)
    assert torch.equal(Dominance().of(view), row)
    assert Dominance().of(without).tolist() == [[1.5, 0.5]]
    assert EncoderKeys().of(view).tolist() == [[[1, 2], [3, 4]]]
    assert Dominance("class").class_token
    assert not Dominance("received").class_token and not Dominance().class_token


@pytest.mark.parametrize("broken", ["scores", "keys"])
def test_nan_fails(broken: str) -> None:
    scores, keys = torch.rand(6), torch.rand(6, 2)
    (scores if broken == "scores" else keys)[3] = torch.nan
    with pytest.raises(UnsupportedModelError, match="visionzip reads nan from the encoder"):
        select(VisionZip(keep=3), scores, keys, grid(2, 3))


def test_towers_with_and_without_a_class_token() -> None:
    one, other = model_of("llava"), model_of("qwen2_5_vl")
    with torch.no_grad(), prune(one.model, "visionzip(keep=0.5 dominance=class)") as report:
        one.model(**prompt_of(one))
    assert len(report.calls[0].decisions) == 1
    with pytest.raises(
        UnsupportedModelError, match="reads the encoder's class token, and the tower"
    ):
        with prune(other.model, "visionzip(dominance=class)"):
            raise AssertionError("entered")


@pytest.mark.parametrize(("name", "same"), [("llava", "class"), ("qwen2_5_vl", "received")])
@torch.no_grad()
def test_the_class_token_asks_where_there_is_one(name: str, same: Any) -> None:
    one, signals = model_of(name), (Dominance(), Dominance(same), Dominance("received"))
    spy = Spy(Input(), signals)
    with prune(one.model, spy):
        one.model(**prompt_of(one))
    [(_, found)] = spy.seen
    either, expected, received = (found[signal] for signal in signals)
    assert torch.equal(either, expected)
    assert torch.equal(either, received) == (same == "received")


def test_settings() -> None:
    stage = VisionZip()
    assert stage.site == Input() and not stage.text_dependent
    assert stage.acts_on == {"image", "video"}
    assert stage.needs == (Dominance(), EncoderKeys())
    assert VisionZip(dominance="class").needs == (Dominance("class"), EncoderKeys())
    text = "visionzip(keep=0.25 on=image dominance=class targets=0.2 contextual=mean)"
    assert str(Recipe.parse(text)) == text


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "dominance",
            "cls",
            'dominance must be "class" or "received", or none for what the tower has, got \'cls\'',
        ),
        ("targets", 1.5, r"targets must be a share in \[0, 1\], got 1.5"),
        ("targets", "few", r"targets must be a share in \[0, 1\], got 'few'"),
        ("contextual", "max", 'contextual must be "sum" or "mean", got \'max\''),
    ],
)
def test_settings_fail(setting: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        VisionZip(**{setting: value})
