"""PLPHP: rates of layers, quotas of spans, choices of heads."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.doubles import SHAPE, State, cache_context, candidates, grid, join, sound
from tokenprune.core.layout import AUDIO, TokenLayout
from tokenprune.core.selection import count
from tokenprune.core.site import Cache
from tokenprune.errors import RecipeError
from tokenprune.methods.plphp import PLPHP, _Seen

FIXED = PLPHP(keep=0.4, shift=0.2, alpha=0.3, beta=0.1)

# t0, image A at 1..5, t6, image B at 7..9, t10; two query heads.
ATTENTION = torch.tensor(
    [
        [0.10, 0.20, 0.05, 0.10, 0.01, 0.04, 0.10, 0.02, 0.12, 0.06, 0.20],
        [0.50, 0.01, 0.02, 0.03, 0.04, 0.05, 0.10, 0.05, 0.00, 0.00, 0.20],
    ]
)


def two_images() -> TokenLayout:
    layout = join(grid(1, 5), grid(1, 3), gap=1)
    return TokenLayout(
        **{n: getattr(layout, n) for n in layout.__dataclass_fields__}
        | {"position": layout.position + 1}
    )


def attention_to(layout: TokenLayout, heads: int = 4, mass: float = 0.6) -> Tensor:
    """Attention of query heads to media; the rest of it falls on text."""
    return mass * (2 * torch.randn(heads, len(layout))).softmax(dim=-1)


def plain_plphp(
    method: PLPHP, attention: list[Tensor], layout: TokenLayout, kv_heads: int
) -> list[list[list[int]]]:
    """Kept rows of each layer and head; no sound."""
    spans = (layout.spans() if method.span == "image-or-frame" else layout.item).tolist()
    shift = min(0.2, method.keep, 1 - method.keep) if method.shift is None else method.shift
    seen: list[float] = []
    kept: list[list[list[int]]] = []
    for of_layer in attention:
        rows = of_layer.tolist()
        gamma = sum(sum(row) for row in rows) / len(rows)
        seen.append(gamma)
        mean = sum(seen) / len(seen)
        alpha = 1.25 * mean if method.alpha is None else method.alpha
        beta = 0.75 * mean if method.beta is None else method.beta
        rate = method.keep
        if gamma >= alpha:
            rate += shift
        elif gamma < beta:
            rate -= shift
        share = len(rows) // kv_heads
        heads = []
        for g in range(kv_heads):
            scores = of_layer[g * share : (g + 1) * share].mean(dim=0).tolist()
            head = []
            for span in sorted(set(spans)):
                tokens = [i for i, its_span in enumerate(spans) if its_span == span]
                quota = min(len(tokens), max(method.least, math.floor(rate * len(tokens) + 0.5)))
                head += sorted(tokens, key=lambda i: (-scores[i], i))[:quota]
            heads.append(sorted(head))
        kept.append(heads)
    return kept


# -- the worked example


def test_worked_example() -> None:
    layout = two_images()
    media = ATTENTION[:, layout.position]
    assert media.sum(dim=1).tolist() == pytest.approx([0.60, 0.20])
    index = FIXED.select(cache_context(layout, media)).index
    positions = layout.position[index]
    assert positions.tolist() == [[1, 2, 3, 8, 9], [3, 4, 5, 7, 8]]
    text = torch.tensor([0, 6, 10]).expand(2, -1)
    rows = torch.cat([text, positions], dim=1).sort(dim=1).values
    assert rows.tolist() == [[0, 1, 2, 3, 6, 8, 9, 10], [0, 3, 4, 5, 6, 7, 8, 10]]
    assert ATTENTION.gather(1, rows).sum(dim=1).tolist() == pytest.approx([0.93, 0.97])
    assert rows.shape[1] / 11 == pytest.approx(0.727273, abs=1e-6)


def test_worked_example_with_grouped_queries() -> None:
    layout = two_images()
    selection = FIXED.select(cache_context(layout, ATTENTION[:, layout.position], heads=1))
    assert selection.scores is not None
    assert selection.scores[0].tolist() == pytest.approx(
        [0.105, 0.035, 0.065, 0.025, 0.045, 0.035, 0.060, 0.030]
    )
    assert layout.position[selection.index].tolist() == [[1, 3, 5, 7, 8]]


# -- rates


@pytest.mark.parametrize(
    ("score", "rate"), [(0.40, 0.6), (0.30, 0.6), (0.2999, 0.4), (0.10, 0.4), (0.0999, 0.2)]
)
def test_rate_table(score: float, rate: float) -> None:
    assert FIXED.rate(score, mean=0.77) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("score", "rate"), [(0.5, 0.4), (0.624, 0.4), (0.625, 0.6), (0.375, 0.4), (0.374, 0.2)]
)
def test_rates_follow_the_mean_without_thresholds(score: float, rate: float) -> None:
    assert PLPHP(keep=0.4).rate(score, mean=0.5) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("keep", "most", "least"),
    [(0.4, 0.6, 0.2), (0.1, 0.2, 0.0), (0.9, 1.0, 0.8), (1.0, 1.0, 1.0), (0.95, 1.0, 0.9)],
)
def test_rates_stay_shares(keep: float, most: float, least: float) -> None:
    method = PLPHP(keep=keep)
    assert method.rate(1.0, mean=0.1) == pytest.approx(most)
    assert method.rate(0.0, mean=0.1) == pytest.approx(least)


def test_mean_rate_is_the_identity_of_the_note() -> None:
    # 6 attentive and 14 indifferent layers of 28.
    rates = [FIXED.rate(s, 0.0) for s in [0.5] * 6 + [0.01] * 14 + [0.2] * 8]
    mean = sum(rates) / 28
    assert mean == pytest.approx(0.4 + 0.2 * (6 - 14) / 28) == pytest.approx(0.342857, abs=1e-6)
    text, media = 60, 1460
    for rate, fraction in ((0.3, 0.3276), (0.4, 0.4237), (0.5, 0.5197)):
        assert (text + rate * media) / (text + media) == pytest.approx(fraction, abs=5e-5)


def test_rounding_survives_binary_fractions() -> None:
    # 0.4 + 0.2 is a little more than 0.6, of which 5 tokens are still 3.
    layout = grid(1, 5)
    index = FIXED.select(cache_context(layout, attention_to(layout))).index
    assert index.shape == (2, 3)
    layout = grid(1, 45)  # 0.7 * 45 is a little less than 31.5
    index = PLPHP(keep=0.5, shift=0.2, alpha=0.3).select(
        cache_context(layout, attention_to(layout))
    ).index  # fmt: skip
    assert index.shape == (2, 32)


def test_layers_are_judged_by_those_before() -> None:
    layout = grid(1, 10)
    state: State = {}
    sizes = [
        PLPHP(keep=0.4)
        .select(cache_context(layout, attention_to(layout, mass=mass), state=state, layer=layer))
        .index.shape[1]
        for layer, mass in enumerate([0.5, 0.5, 0.9, 0.2, 0.52, 0.1])
    ]
    assert sizes == [4, 4, 6, 2, 4, 2]


def test_calls_do_not_interact() -> None:
    layout = grid(1, 10)
    for mass in (0.1, 0.9):  # the first layer of a call is balanced, whatever came before
        context = cache_context(layout, attention_to(layout, mass=mass))
        assert PLPHP(keep=0.4).select(context).index.shape == (2, 4)


# -- against the plain loop

LAYOUTS = {
    "image": grid(4, 5),
    "images": join(grid(3, 3), grid(1, 1), grid(2, 6)),
    "video": grid(2, 3, 7, video=True),
    "both": join(grid(3, 4), grid(2, 4, 5, video=True)),
}
METHODS = [
    PLPHP(),
    PLPHP(keep=0.1),
    PLPHP(keep=0.85),
    PLPHP(keep=0.3, span="item"),
    PLPHP(keep=0.2, least=3),
    FIXED,
]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_plphp_is_the_plain_loop(
    layout: TokenLayout, method: PLPHP, heads: int, kv_heads: int
) -> None:
    smooth = [attention_to(layout, heads, mass) for mass in (0.32, 0.33, 0.8, 0.12, 0.05, 0.45)]
    ties = [(layer * 50).round() / 64 for layer in smooth]
    for layers in (smooth, ties):
        state: State = {}
        for number, expected in enumerate(plain_plphp(method, layers, layout, kv_heads)):
            selection = method.select(
                cache_context(layout, layers[number], heads=kv_heads, layer=number, state=state)
            )
            assert selection.index.tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_head_keeps_each_quota(layout: TokenLayout) -> None:
    index = PLPHP(keep=0.3).select(cache_context(layout, attention_to(layout))).index
    spans = layout.spans()
    assert (index.diff(dim=1) > 0).all()
    for head in index:
        for span in range(int(spans.max()) + 1):
            quota = count(0.3, int((spans == span).sum()))
            assert int((spans[head] == span).sum()) == quota


def test_pruned_attention_is_masked_attention() -> None:
    layout = two_images()
    query, keys, values = torch.randn(2, 4), torch.randn(2, 11, 4), torch.randn(2, 11, 4)
    scores = (query[:, None] * keys).sum(dim=-1)
    attention = scores.softmax(dim=-1)[:, layout.position]
    positions = layout.position[FIXED.select(cache_context(layout, attention)).index]
    rows = torch.cat([torch.tensor([0, 6, 10]).expand(2, -1), positions], dim=1)
    kept = torch.zeros(2, 11, dtype=torch.bool).scatter(1, rows, True)
    masked = scores.masked_fill(~kept, -math.inf).softmax(dim=-1)
    of_all = (masked[..., None] * values).sum(dim=1)
    gathered = values.gather(1, rows[..., None].expand(-1, -1, 4))
    of_kept = (scores.gather(1, rows).softmax(dim=-1)[..., None] * gathered).sum(dim=1)
    torch.testing.assert_close(of_kept, of_all, atol=1e-6, rtol=0)


# -- invariants


def test_heads_choose_independently() -> None:
    layout = grid(3, 4)
    attention = attention_to(layout, heads=3)
    order = torch.tensor([2, 0, 1])
    index = FIXED.select(cache_context(layout, attention, heads=3)).index
    permuted = FIXED.select(cache_context(layout, attention[order], heads=3)).index
    assert torch.equal(permuted, index[order])
    changed = attention.clone()
    changed[1] = changed[1].flip(0)
    other = FIXED.select(cache_context(layout, changed, heads=3)).index
    assert torch.equal(other[[0, 2]], index[[0, 2]])
    assert not torch.equal(other[1], index[1])


def test_score_ignores_the_order_of_heads_and_tokens() -> None:
    layout = grid(3, 4)
    attention = attention_to(layout)
    seen = []
    heads_orders, token_orders = ([0, 1, 2, 3], [3, 1, 0, 2]), (range(12), range(11, -1, -1))
    for heads, tokens in itertools.product(heads_orders, token_orders):
        state: State = {}
        FIXED.select(cache_context(layout, attention[heads][:, list(tokens)], state=state))
        seen.append(state[_Seen].scores[0][0])
    assert all(0 <= score <= 1 for score in seen)
    assert seen == pytest.approx([seen[0]] * 4)


def test_larger_keep_keeps_supersets() -> None:
    layout = LAYOUTS["both"]
    attention = attention_to(layout)
    sets = []
    for keep in (0.2, 0.35, 0.5, 0.8):
        index = PLPHP(keep=keep).select(cache_context(layout, attention)).index
        sets.append([set(head.tolist()) for head in index])
    for few, many in itertools.pairwise(sets):
        assert all(a <= b for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_keep_all(layout: TokenLayout) -> None:
    method = PLPHP(keep=1.0)
    assert method.budget(candidates(layout, heads=2)).total == len(layout)
    index = method.select(cache_context(layout, attention_to(layout))).index
    assert torch.equal(index, torch.arange(len(layout)).expand(2, -1))


def test_counts_are_known_if_no_layer_deviates() -> None:
    layout = LAYOUTS["both"]
    assert not PLPHP(keep=0.4).budget(candidates(layout, heads=2)).exact
    method = PLPHP(keep=0.4, shift=0.0)
    index = method.select(cache_context(layout, attention_to(layout))).index
    assert method.budget(candidates(layout, heads=2)).total == index.shape[1]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_counts_lie_within_the_bounds(method: PLPHP) -> None:
    layout = LAYOUTS["both"]
    budget = method.budget(candidates(layout, heads=2))
    state: State = {}
    sizes = {
        method.select(
            cache_context(layout, attention_to(layout, mass=mass), layer=layer, state=state)
        ).index.shape[1]
        for layer, mass in enumerate([0.5, 0.5, 0.9, 0.02, 0.25])
    }
    assert sizes == {budget.least, budget.total, budget.most}


def test_every_span_keeps_the_least() -> None:
    layout = join(grid(1, 1), grid(5, 4))
    method = PLPHP(keep=0.1, beta=1.0, alpha=1.0)  # an indifferent layer at rate 0
    index = method.select(cache_context(layout, attention_to(layout))).index
    assert index.shape == (2, 2)
    assert (index[:, 0] == 0).all()


def test_frames_or_clips_are_spans() -> None:
    layout = grid(1, 4, 2, video=True)
    attention = 0.1 * torch.tensor([[4.0, 3, 2, 1, 0.4, 0.3, 0.2, 0.1]]).expand(2, -1)
    frames = PLPHP(keep=0.5).select(cache_context(layout, attention)).index
    clip = PLPHP(keep=0.5, span="item").select(cache_context(layout, attention)).index
    assert frames[0].tolist() == [0, 1, 4, 5]
    assert clip[0].tolist() == [0, 1, 2, 3]


def test_sound_has_a_rate_of_its_own() -> None:
    layout = join(grid(2, 5), sound(10))
    is_sound = layout.modality == AUDIO
    attention = torch.where(is_sound, 0.005, 0.07).expand(4, -1)  # 0.7 on vision, 0.05 on sound
    index = FIXED.select(cache_context(layout, attention)).index
    assert index[0].tolist() == [0, 1, 2, 3, 4, 5, 10, 11]
    # Without fixed thresholds each kind is compared with itself.
    index = PLPHP(keep=0.4).select(cache_context(layout, attention)).index
    assert index[0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_plphp_after_another_cache_stage() -> None:
    layout = grid(1, 6, 2, video=True)
    rows = torch.tensor([[0, 1, 2, 3, 6, 7], [1, 3, 5, 8, 9, 10]])
    attention = attention_to(layout)
    per_head = attention.gather(1, rows.repeat_interleave(2, dim=0))
    index = PLPHP(keep=0.5).select(cache_context(layout, per_head, rows=rows)).index
    spans = layout.spans()[rows.gather(1, index)]
    assert spans[0].tolist() == [0, 0, 1]  # half of 4 and of 2
    # Half of 3 and of 3 would be one more than head 0 keeps: the weakest goes.
    dropped = sorted(spans[1].tolist())
    assert dropped in ([0, 0, 1], [0, 1, 1])


def test_layers() -> None:
    assert PLPHP().site == Cache()
    assert PLPHP(layers=3).site == Cache((3,))
    assert PLPHP(layers=(0, 2)).site == Cache((0, 2))
    with pytest.raises(RecipeError, match="plphp acts at layer 28, but the model has layers 0 to"):
        PLPHP(layers=(0, 28)).check(SHAPE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1}, r"share in \(0, 1\], got 1; plphp moves it .* or 1.0 for all"),
        ({"keep": 0.0}, "got 0.0"),
        ({"keep": 0.4, "shift": 0.5}, "shift must be between 0 and 0.4, so that keep=0.4"),
        ({"keep": 1.0, "shift": 0.1}, "shift must be between 0 and 0, so that keep=1.0"),
        ({"shift": -0.1}, "shift must be between 0"),
        ({"alpha": 1.5}, r"alpha is a share of attention and must be in \[0, 1\], got 1.5"),
        ({"beta": -0.5}, "beta is a share of attention"),
        ({"alpha": 0.1, "beta": 0.3}, "beta must not exceed alpha, got beta=0.3 and alpha=0.1"),
        ({"span": "clip"}, 'span must be "image-or-frame" or "item", got \'clip\''),
        ({"least": 0}, "least must be a count of at least 1, got 0"),
        ({"layers": ()}, r"layers must be decoder layers or none for all, got \(\)"),
        ({"layers": "all"}, "layers must be decoder layers or none for all, got 'all'"),
        ({"layers": True}, "layers must be decoder layers or none for all, got True"),
    ],
)
def test_plphp_fails(settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PLPHP(**settings)
