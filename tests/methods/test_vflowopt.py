"""VFlowOpt: its budget, its importance map, and its three rounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.methods.doubles import SHAPE, DenseView, candidates, grid, input_context, join
from tokenprune.core.context import ModelShape
from tokenprune.core.layout import TokenLayout
from tokenprune.core.recipe import Recipe
from tokenprune.core.selection import Selection, count
from tokenprune.core.site import Input, Layer
from tokenprune.core.stage import Stage
from tokenprune.errors import RecipeError, UnsupportedModelError
from tokenprune.methods._vflowopt import Importance, VFlowOptInput, VFlowOptLayer
from tokenprune.methods.vflowopt import VFlowOpt, last_share, mean_share, stage_lengths

QWEN = (9, 9, 10)


def shape(layers: int) -> ModelShape:
    return ModelShape(layers=layers, heads=4, kv_heads=2, width=8, head_width=2)


# -- the budget


@pytest.mark.parametrize(("layers", "lengths"), [(28, QWEN), (32, (10, 10, 12)), (3, (1, 1, 1))])
def test_stage_lengths(layers: int, lengths: tuple[int, int, int]) -> None:
    assert stage_lengths(layers) == lengths


@pytest.mark.parametrize(
    ("r1", "r2", "r3", "mean"),
    [
        (0.72332, 0.74875, 0.487, 0.50077),
        (0.26510, 0.98334, 0.87733, 0.25068),
        (0.11662, 1.0, 0.6011, 0.10001),
        (0.25, 0.53333, 1.0, 0.170833),
        (0.5, 0.75, 0.5, 0.348214),
    ],
)
def test_mean_share(r1: float, r2: float, r3: float, mean: float) -> None:
    assert mean_share(r1, r2, r3, QWEN) == pytest.approx(mean, abs=6e-6)


@pytest.mark.parametrize(
    ("r1", "r2", "lengths", "r3"),
    [
        (0.30, 0.80, QWEN, 0.891667),
        (0.375, 1.0, QWEN, 0.066667),
        (0.40, 1.0, QWEN, -0.05),
        (0.25, 0.53333, QWEN, 2.6625),
        (0.30, 0.80, (10, 10, 12), 0.902778),
    ],
)
def test_last_share(r1: float, r2: float, lengths: Any, r3: float) -> None:
    assert last_share(0.25, r1, r2, lengths) == pytest.approx(r3, abs=5e-5)


@pytest.mark.parametrize(
    ("keep", "shares"),
    [
        (0.5, (0.7233, 0.5416, 0.2638)),
        (0.25, (0.2651, 0.2607, 0.2287)),
        (0.1, (0.1166, 0.1166, 0.0701)),
    ],
)
def test_released_strategies(keep: float, shares: tuple[float, float, float]) -> None:
    method = VFlowOpt(keep=keep, strategy="llava-onevision-7b")
    r1, r2, r3 = method.shares(28)
    assert (r1, r1 * r2, r1 * r2 * r3) == pytest.approx(shares, abs=5e-5)
    assert mean_share(r1, r2, r3, QWEN) == pytest.approx(keep, rel=3e-3)
    first = method.stages(SHAPE)[0]
    assert isinstance(first, VFlowOptInput)
    # At most 25, 20 and 18 anchors of 729 tokens.
    t = first.importance.t
    assert t is not None and math.floor(729 / t) == {0.5: 25, 0.25: 20, 0.1: 18}[keep]
    assert first.cell is not None and first.cell > 11


@settings(max_examples=200, deadline=None)
@given(st.floats(0.001, 1.0), st.integers(3, 80))
def test_defaults_meet_every_budget(keep: float, layers: int) -> None:
    shares = VFlowOpt(keep=keep).shares(layers)
    assert all(0 < share <= 1 for share in shares)
    assert mean_share(*shares, stage_lengths(layers)) == pytest.approx(keep, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers(3, 80))
def test_derived_shares_meet_the_budget_or_are_refused(
    keep: float, r1: float, r2: float, layers: int
) -> None:
    lengths = stage_lengths(layers)
    for method in (VFlowOpt(keep=keep, r1=r1, r2=r2), VFlowOpt(keep=keep, r2=r2, r3=r1)):
        try:
            shares = method.shares(layers)
        except RecipeError:
            continue
        assert all(0 < share <= 1 for share in shares)
        assert mean_share(*shares, lengths) == pytest.approx(keep, rel=1e-6)


def test_stages() -> None:
    stages = VFlowOpt(keep=0.25, r1=0.3, r2=0.8, t=7, cell=4).stages(SHAPE)
    assert [stage.site for stage in stages] == [Input(), Layer(9), Layer(18)]
    common: Any = {"importance": Importance(t=7), "per": "item"}
    assert stages[0] == VFlowOptInput(keep=0.3, cell=4, **common)
    assert stages[1] == VFlowOptLayer(layer=9, keep=0.8, **common)
    assert isinstance(stages[2], VFlowOptLayer)
    assert stages[2].keep == pytest.approx(0.891667, abs=1e-6)
    assert all(stage.needs == (Importance(t=7),) for stage in stages)


@pytest.mark.parametrize(
    ("settings", "layers", "sites"),
    [
        ({"keep": 0.1}, 28, [Input(), Layer(18)]),
        ({"keep": 0.9}, 28, [Layer(18)]),  # nothing to prune at the input
        ({"keep": 0.3, "r1": 0.3}, 28, [Input()]),
        ({"keep": 0.1}, 3, [Input(), Layer(2)]),
        ({"keep": 0.1}, 2, [Input()]),
        ({"keep": 0.1}, 1, [Input()]),
        ({"keep": 1.0}, 28, []),
        ({"keep": 1.0}, 2, []),
        ({"keep": 1.0, "r1": 1.0, "r2": 1.0, "r3": 1.0}, 28, []),
    ],
)
def test_stages_that_keep_all_are_left_out(settings: Any, layers: int, sites: Any) -> None:
    assert [stage.site for stage in VFlowOpt(**settings).stages(shape(layers))] == sites


@pytest.mark.parametrize("layers", range(1, 40))
def test_never_two_stages_at_one_layer(layers: int) -> None:
    layers_used = [
        stage.site.index
        for stage in VFlowOpt(keep=0.2, r2=None if layers < 3 else 0.9).stages(shape(layers))
        if isinstance(stage.site, Layer)
    ]
    assert len(set(layers_used)) == len(layers_used)
    assert all(0 < layer < layers for layer in layers_used)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1}, r"share in \(0, 1\], got 1; .* takes no count: .* 1.0 for all"),
        ({"keep": 64}, "takes no count"),
        ({"keep": 0.0}, r"keep must be a share in \(0, 1\], got 0.0"),
        ({"keep": 1.2}, "got 1.2"),
        ({"r1": 0.0}, r"r1 must be a share in \(0, 1\], got 0.0"),
        ({"r3": 1.1}, r"r3 must be a share in \(0, 1\], got 1.1"),
        ({"t": -1}, "t must be at least 0, got -1"),
        ({"alpha": 2}, "alpha must be between -1 and 1, got 2"),
        ({"cell": 0.5}, "cell must be at least 1 token, got 0.5"),
        ({"recycled": 1.5}, r"recycled must be a share in \[0, 1\], got 1.5"),
        ({"per": "frame"}, 'per must be "item" or "prompt", got \'frame\''),
        ({"log_base": 1}, "log_base must be above 1, got 1"),
        ({"strategy": "best"}, "strategy must be \"llava-onevision-7b\" or none, got 'best'"),
        ({"strategy": "llava-onevision-7b", "keep": 0.3}, "keep must be one of 0.5, 0.25, 0.1"),
        ({"strategy": "llava-onevision-7b", "t": 4}, "sets r1, r2, r3, t, alpha and cell"),
    ],
)
def test_vflowopt_fails(settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        VFlowOpt(**settings)


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        (
            {"keep": 0.25, "r1": 0.4},
            28,
            r"r1=0.4 and r2=1 need r3=-0.05 to keep 0.25 .* r1 must lie in \[0.25, 0.3889\)",
        ),
        ({"keep": 0.25, "r1": 0.25, "r2": 0.53333}, 28, r"need r3=2.66.* r1 must lie in \[0.36"),
        ({"keep": 0.9, "r1": 0.8}, 28, r"r1 must lie in \[0.9, 1\]"),
        ({"keep": 0.9, "r2": 0.5}, 28, "r2 must be at least 0.8526"),
        ({"keep": 0.9, "r2": 0.5, "r3": 0.5}, 28, "keep at most 0.5714 .* raise them"),
        ({"keep": 0.1, "r1": 0.5, "r2": 0.75, "r3": 0.5}, 28, "keep 0.3482 .* set keep=0.3482"),
        ({"keep": 0.1, "r1": 0.1}, 2, "need at least 3 decoder layers, the model has 2"),
    ],
)
def test_shares_fails(settings: Any, layers: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        VFlowOpt(**settings).shares(layers)


# -- the importance map

ROWS = [[[0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.5, 0.1, 0.3, 0.1], [0.6, 0.1, 0.1, 0.2]]]
LEVELS = [[0, 0, 0, 0], [0, 0, 255, 255], [0, 85, 170, 255], [255, 255, 0, 0]]  # 0, 1, 2, 1 bits


def random_view(views: int = 3, tokens: int = 20, *, grey: Tensor | None = None) -> DenseView:
    return DenseView((4.0 * torch.randn(views, tokens, tokens)).softmax(dim=-1), grey=grey)


def plain_importance(
    attention: list[list[float]],
    t: float,
    alpha: float,
    grey: list[list[float]] | None,
    base: float,
) -> list[float]:
    n = len(attention)
    received = [sum(row[j] for row in attention) for j in range(n)]
    anchors = [j for j in range(n) if received[j] > t] or list(range(n))
    scores = [sum(attention[k][i] for k in anchors) / len(anchors) for i in range(n)]
    if grey is None:
        return scores
    entropies = []
    for patch in grey:
        levels = [round(max(0.0, min(255.0, g))) for g in patch]
        shares = [levels.count(level) / len(levels) for level in set(levels)]
        entropies.append(-sum(p * math.log(p, base) for p in shares))
    total = sum(math.exp(e) for e in entropies)
    return [g + alpha * math.exp(e) / total for g, e in zip(scores, entropies, strict=True)]


@pytest.mark.parametrize(
    ("t", "importance"),
    [
        (1.0, [0.7, 0.1, 0.1, 0.1]),
        (0.65, [0.55, 0.25, 0.1, 0.1]),
        (2.5, [0.55, 0.175, 0.15, 0.125]),  # no anchor: the mean of all rows
        (4.0, [0.55, 0.175, 0.15, 0.125]),
        (9.0, [0.55, 0.175, 0.15, 0.125]),
        (0.0, [0.55, 0.175, 0.15, 0.125]),  # all are anchors
    ],
)
def test_anchors(t: float, importance: list[float]) -> None:
    view = DenseView(torch.tensor(ROWS))
    assert view.received()[0].tolist() == pytest.approx([2.2, 0.7, 0.6, 0.5])
    assert Importance(t=t).of(view)[0].tolist() == pytest.approx(importance)


def test_views_without_anchors_fall_back_one_by_one() -> None:
    even = torch.full((1, 4, 4), 0.25)
    view = DenseView(torch.cat([torch.tensor(ROWS), even]))
    importance = Importance(t=1.0).of(view)
    assert importance[0].tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1])
    assert importance[1].tolist() == pytest.approx([0.25] * 4)
    assert not importance.isnan().any()


def test_entropy_joins_attention() -> None:
    grey = torch.tensor([LEVELS], dtype=torch.float32)
    importance = Importance(t=0.65, alpha=1.0).of(DenseView(torch.tensor(ROWS), grey=grey))
    expected = [0.622329, 0.446612, 0.634447, 0.296612]
    assert importance[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert importance[0].argsort(descending=True).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("base", "softmax"),
    [(2.0, [0.072329, 0.196612, 0.534447, 0.196612]), (math.e, [1 / 9, 2 / 9, 4 / 9, 2 / 9])],
)
def test_base_of_the_entropy_matters(base: float, softmax: list[float]) -> None:
    grey = torch.tensor([LEVELS], dtype=torch.float32)
    view = DenseView(torch.zeros(1, 4, 4), grey=grey)
    importance = Importance(alpha=1.0, log_base=base).of(view)
    assert importance[0].tolist() == pytest.approx(softmax, abs=1e-6)


@pytest.mark.parametrize(
    ("patch", "bits"),
    [
        ([7] * 4, 0.0),
        ([0, 0, 255, 255], 1.0),
        ([0, 0, 0, 255], 0.811278),
        (list(range(196)), 7.614710),
        ([-3.0, 0.4, 300.0, 254.6], 1.0),  # clamped and rounded
    ],
)
def test_entropy(patch: list[float], bits: float) -> None:
    # Beside a flat patch, the softmax of two entropies gives their difference away.
    grey = torch.tensor([[patch, [0.0] * len(patch)]], dtype=torch.float32)
    for base, unit in ((2.0, 1.0), (math.e, math.log(2))):
        signal = Importance(alpha=1.0, log_base=base)
        scores = signal.of(DenseView(torch.zeros(1, 2, 2), grey=grey))[0]
        assert (scores[0] / scores[1]).log().item() == pytest.approx(bits * unit, abs=2e-5)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0, 1.7, 3.3, 12.0, None])
@pytest.mark.parametrize(("alpha", "base"), [(0.0, 2.0), (0.7, 2.0), (-0.4, math.e)])
def test_importance_is_the_plain_loop(t: float | None, alpha: float, base: float) -> None:
    grey = torch.randint(0, 6, (3, 20, 9)).float() * 40
    view = random_view(grey=grey if alpha else None)
    importance = Importance(t=t, alpha=alpha, log_base=base).of(view)
    assert importance.shape == (3, 20) and importance.dtype == torch.float32
    for w in range(3):
        patches = grey[w].tolist() if alpha else None
        threshold = 1.0 if t is None else t  # 0.05 of 20 tokens
        expected = plain_importance(view.attention[w].tolist(), threshold, alpha, patches, base)
        assert importance[w].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tokens", [20, 150])
def test_importance_sums_to_one(tokens: int) -> None:
    view = random_view(tokens=tokens, grey=torch.rand(3, tokens, 4) * 255)
    ones = torch.ones(3)
    torch.testing.assert_close(view.received().sum(dim=-1), tokens * ones)
    torch.testing.assert_close(Importance(t=0.3).of(view).sum(dim=-1), ones)
    both = Importance(t=2.0, alpha=0.5).of(view)
    torch.testing.assert_close(both.sum(dim=-1), 1.5 * ones)


@pytest.mark.parametrize(("t", "rows"), [(28.683, 25), (34.760, 20), (39.265, 18), (None, 20)])
def test_few_rows_are_read(t: float | None, rows: int) -> None:
    view = DenseView(torch.full((1, 729, 729), 1 / 729))
    Importance(t=t).of(view)
    assert view.rows_asked == rows


def test_pixels_are_read_only_if_they_count() -> None:
    Importance().of(random_view())
    with pytest.raises(AssertionError, match="grey was not to be read"):
        Importance(alpha=0.5).of(random_view())


# -- round one


def round_one(**settings: Any) -> VFlowOptInput:
    return VFlowOptInput(**{"importance": Importance(), "per": "item", **settings})


def later_round(**settings: Any) -> VFlowOptLayer:
    return VFlowOptLayer(**{"importance": Importance(), "per": "item", **settings})


def plain_round_one(
    layout: TokenLayout, scores: list[float], keep: float, cell: float | None, recycled: float
) -> tuple[list[int], dict[int, dict[int, float]]]:
    """Kept tokens, and for each recycled one its sources with their weights."""
    kept: list[int] = []
    merges: dict[int, dict[int, float]] = {}
    canvas, row, column = (getattr(layout, n).tolist() for n in ("canvas", "row", "column"))

    def sides(token: int) -> tuple[float, float]:
        if cell is not None:
            return cell, cell
        mates = [i for i in range(len(layout)) if canvas[i] == canvas[token]]
        height = max(row[i] for i in mates) + 1
        width = max(column[i] for i in mates) + 1
        return max(2.0, 0.55 * height), max(2.0, 0.55 * width)

    for item in range(int(layout.item.max()) + 1):
        tokens = [i for i in range(len(layout)) if layout.item[i] == item]
        budget = count(keep, len(tokens))
        area = sum(1 / (sides(i)[0] * sides(i)[1]) for i in tokens)
        slots = min(math.floor(area + 1e-6), math.floor(recycled * budget + 1e-9))
        ranked = sorted(tokens, key=lambda i: (-scores[i], i))
        direct, low = ranked[: budget - slots], ranked[budget - slots :]
        while True:
            cells: dict[tuple[int, int, int], list[int]] = {}
            for i in low:
                y, x = sides(i)
                cells.setdefault((canvas[i], int(row[i] // y), int(column[i] // x)), []).append(i)
            short = budget - len(direct) - len(cells)
            if short <= 0:
                break
            direct, low = direct + low[:short], low[short:]
        strength = {c: sum(max(scores[i], 0.0) for i in cells[c]) for c in cells}
        strongest = sorted(cells, key=lambda c: (-strength[c], c))[: budget - len(direct)]
        kept += direct
        for c in strongest:
            slot = min(cells[c], key=lambda i: (-scores[i], i))
            kept.append(slot)
            total = strength[c]
            merges[slot] = {
                i: max(scores[i], 0.0) / total if total else 1 / len(cells[c]) for i in cells[c]
            }
    return sorted(kept), merges


def merges_of(selection: Selection) -> dict[int, dict[int, float]]:
    merges: dict[int, dict[int, float]] = {}
    if selection.merge is not None:
        merge = selection.merge
        for s, t, w in zip(
            merge.source.tolist(), merge.target.tolist(), merge.weight.tolist(), strict=True
        ):
            merges.setdefault(t, {})[s] = w
    return merges


def merged(features: Tensor, selection: Selection) -> Tensor:
    """Features of the kept tokens, `[K, D]`."""
    features = features.clone()
    old = features.clone()
    for target, sources in merges_of(selection).items():
        features[target] = sum(w * old[s] for s, w in sources.items())
    return features[selection.index]


def test_worked_example() -> None:
    method = VFlowOpt(keep=0.348214, r1=0.5, r2=0.75, r3=0.5, cell=2, recycled=0.5)
    one, two, three = method.stages(SHAPE)
    layout, importance = grid(4, 4), torch.arange(1.0, 17.0)
    context = input_context(layout, importance)
    assert one.budget(candidates(layout)).total == 8
    selection = one.select(context)
    assert selection.index.tolist() == [5, 7, 9, 11, 12, 13, 14, 15]
    assert {t: sorted(s) for t, s in merges_of(selection).items()} == {
        5: [0, 1, 4, 5],
        7: [2, 3, 6, 7],
        9: [8, 9],
        11: [10, 11],
    }
    assert merged(context.features, selection)[:, 0].tolist() == pytest.approx(
        [52 / 14, 116 / 22, 162 / 19, 242 / 23, 12, 13, 14, 15]
    )
    # Recycled tokens are the first to fall.
    left = selection.index
    assert two.budget(candidates(layout, left)).total == 6
    later = two.select(input_context(layout, importance, rows=left, layer=9))
    left = left[later.index]
    assert left.tolist() == [9, 11, 12, 13, 14, 15]
    last = three.select(input_context(layout, importance, rows=left, layer=18))
    assert left[last.index].tolist() == [13, 14, 15]
    assert (8 * 9 + 6 * 9 + 3 * 10) / (16 * 28) == pytest.approx(0.348214, abs=1e-6)


LAYOUTS = {
    "image": grid(5, 7),
    "tiles": join(grid(4, 4), grid(6, 8)),
    "video": grid(4, 4, 6, video=True),
    "mixed": join(grid(3, 3), grid(4, 6, 3, video=True), grid(1, 9)),
    "tiny": grid(1, 1),
    "line": grid(1, 12),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("cell", "recycled"), [(None, 0.25), (2.5, 0.5), (1, 1.0), (3, 0.0)])
@pytest.mark.parametrize("kind", ["positive", "mixed", "ties", "negative"])
def test_round_one_is_the_plain_loop(
    layout: TokenLayout, cell: float | None, recycled: float, kind: str
) -> None:
    n = len(layout)
    scores = {
        "positive": torch.rand(n),
        "mixed": torch.randn(n),
        "ties": torch.randint(0, 3, (n,)).float(),
        "negative": -torch.rand(n),
    }[kind]
    for keep in (0.03, 0.1, 0.3, 0.6, 0.95):
        stage = round_one(keep=keep, cell=cell, recycled=recycled)
        selection = stage.select(input_context(layout, scores))
        kept, merges = plain_round_one(layout, scores.tolist(), keep, cell, recycled)
        assert selection.index.tolist() == kept
        assert len(kept) == stage.budget(candidates(layout)).total
        found = merges_of(selection)
        assert found.keys() == merges.keys()
        for target in merges:
            assert found[target] == pytest.approx(merges[target], abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_merges_are_averages(layout: TokenLayout) -> None:
    stage = round_one(keep=0.4, cell=2, recycled=0.5)
    selection = stage.select(input_context(layout, torch.randn(len(layout))))
    assert (selection.index.diff() > 0).all()
    if selection.merge is None:
        return
    merge = selection.merge
    assert len(merge.source.unique()) == len(merge.source)  # no token is in two cells
    assert torch.isin(merge.target, selection.index).all()
    assert torch.isin(merge.target, merge.source).all()
    sums = torch.zeros(len(layout)).index_add(0, merge.target, merge.weight)
    torch.testing.assert_close(sums[merge.target.unique()], torch.ones(len(merge.target.unique())))
    same = torch.full((len(layout), 2), 3.0)
    torch.testing.assert_close(merged(same, selection), same[: len(selection.index)])


@pytest.mark.parametrize("factor", [1e-4, 0.5, 1024.0])
def test_scale_of_importance_plays_no_part(factor: float) -> None:
    layout, importance = LAYOUTS["mixed"], torch.rand(len(LAYOUTS["mixed"]))
    stage = round_one(keep=0.3, cell=2, recycled=0.5)
    one = stage.select(input_context(layout, importance))
    other = stage.select(input_context(layout, importance * factor))
    assert torch.equal(one.index, other.index)
    assert one.merge is not None and other.merge is not None
    assert torch.equal(one.merge.source, other.merge.source)
    torch.testing.assert_close(one.merge.weight, other.merge.weight)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 1.0), st.floats(1, 9), st.floats(0, 1), st.integers(0, 2**31))
def test_round_one_keeps_exactly_its_share(
    keep: float, cell: float, recycled: float, seed: int
) -> None:
    layout = LAYOUTS["mixed"]
    importance = torch.rand(len(layout), generator=torch.Generator().manual_seed(seed))
    stage = round_one(keep=keep, cell=cell, recycled=recycled)
    index = stage.select(input_context(layout, importance)).index
    for item, size in enumerate((9, 72, 9)):
        assert int((layout.item[index] == item).sum()) == count(keep, size)
    assert stage.budget(candidates(layout)).total == len(index)


def test_default_cells_follow_the_canvas() -> None:
    layout = grid(4, 6, 2, video=True)
    importance = torch.ones(48)
    stage = round_one(keep=0.5, recycled=1.0)
    merges = merges_of(stage.select(input_context(layout, importance)))
    # Sides are 0.55 of 4 rows and 6 columns: 48 / (2.2 * 3.3) = 6 slots. The first 18 of equals
    # stay, which leaves one row of the first frame.
    assert sorted(map(len, merges.values())) == [2, 2, 4, 4, 6, 12]


def test_cells_do_not_cross_canvases() -> None:
    layout = LAYOUTS["video"]
    selection = round_one(keep=0.3, cell=9, recycled=1.0).select(
        input_context(layout, torch.rand(len(layout)))
    )
    assert selection.merge is not None
    assert torch.equal(layout.canvas[selection.merge.source], layout.canvas[selection.merge.target])


def test_budget_per_prompt_ranks_items_together() -> None:
    layout = join(grid(2, 2), grid(2, 2))
    importance = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    per_item = round_one(keep=0.5, recycled=0.0)
    jointly = round_one(keep=0.5, recycled=0.0, per="prompt")
    assert per_item.select(input_context(layout, importance)).index.tolist() == [2, 3, 6, 7]
    assert jointly.select(input_context(layout, importance)).index.tolist() == [4, 5, 6, 7]


def test_round_one_fails() -> None:
    importance = torch.ones(16)
    importance[3] = torch.nan
    with pytest.raises(UnsupportedModelError, match="the importance map holds nan"):
        round_one(keep=0.5).select(input_context(grid(4, 4), importance))


# -- later rounds, and what passes between them


def test_later_rounds_rank_each_item_by_the_same_map() -> None:
    layout = LAYOUTS["mixed"]
    importance = torch.randn(len(layout))
    selection = later_round(layer=9, keep=0.4).select(input_context(layout, importance, layer=9))
    expected: list[int] = []
    for item in range(3):
        rows = (layout.item == item).nonzero()[:, 0].tolist()
        ranked = sorted(rows, key=lambda i: (-importance[i].item(), i))
        expected += ranked[: count(0.4, len(rows))]
    assert selection.index.tolist() == sorted(expected)
    assert selection.merge is None
    assert later_round(layer=9, keep=0.4).budget(candidates(layout)).total == len(expected)


def test_rounds_read_the_importance_of_what_is_left() -> None:
    layout, importance = grid(4, 4), torch.randn(16)
    # Another method pruned in between.
    rows = torch.tensor([1, 4, 5, 9, 15])
    later = input_context(layout, importance, rows=rows, layer=9)
    selection = later_round(layer=9, keep=0.6).select(later)
    assert selection.scores is not None and torch.equal(selection.scores, importance[rows])
    assert selection.index.tolist() == sorted(importance[rows].topk(3).indices.tolist())


def test_rounds_read_one_signal_and_two_methods_two() -> None:
    steps = Recipe(VFlowOpt(keep=0.5, t=3.0), VFlowOpt(keep=0.1, r2=0.9)).steps(SHAPE)
    assert [step.number for step in steps] == [0, 0, 1, 1, 1]
    assert [step.stage.needs[0].t for step in steps] == [3.0, 3.0, None, None, None]
    assert {step.stage.site for step in steps} == {Input(), Layer(9), Layer(18)}


def test_calls_do_not_interact() -> None:
    stage = round_one(keep=0.5)
    layout = grid(4, 4)
    for _ in range(2):
        importance = torch.randn(16)
        scores = stage.select(input_context(layout, importance)).scores
        assert scores is not None and torch.equal(scores, importance)


def test_rounds_can_be_kept_to_one_modality() -> None:
    stages = VFlowOpt(keep=0.25, r2=0.9, on=("video",)).stages(SHAPE)
    assert [stage.acts_on for stage in stages] == 3 * [{"video"}]
    with pytest.raises(RecipeError, match="on must name some of .*, got 'picture'"):
        VFlowOpt(on="picture")  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", VFlowOpt(keep=0.25, r2=0.9).stages(SHAPE), ids=lambda s: s.name)
def test_parts_look_at_pictures_only(stage: Stage) -> None:
    assert stage.modalities == VFlowOpt.modalities == {"image", "video"}
    assert not stage.text_dependent
    assert stage.needs == (Importance(),)
