"""The report: every figure against a plain loop, or measured on the tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune import Report, prune
from tokenprune.core.site import Cache, Input, Layer
from tokenprune.report.change import Change
from tokenprune.report.report import Call, Decision
from tokenprune.report.seconds import Seconds
from tokenprune.testing.tiny import Tiny, build

ALL_SITES = "plphp(keep=0.5) + random(keep=0.5 at=3) + vflowopt(keep=0.75)"


@cache
def model_of(name: str) -> Tiny:
    return build(name)


@torch.no_grad()
def run(name: str, recipe: str, batch: bool = False, **settings: Any) -> tuple[Report, Any]:
    """One prefill under a recipe: the report, and the model's output."""
    tiny = model_of(name)
    inputs = tiny.batch() if batch else tiny.inputs()
    with prune(tiny.model, recipe) as report:
        output = tiny.model(**inputs, **{"use_cache": True, **settings})
    return report, output


def stored(output: Any, sample: int, layer: int, head: int) -> set[int]:
    """Positions that a head of a layer's cache really holds."""
    index = output.past_key_values.layers[layer].index
    rows = index[sample, head if index.shape[1] > 1 else 0]
    return {int(one) for one in rows if one >= 0}


def presence_by_hand(call: Call, output: Any, sample: int) -> Tensor:
    """How many of all heads of all layers hold each media token, counted one by one."""
    layers = output.past_key_values.layers
    shares = []
    for position in call.layouts[sample].position.tolist():
        holding = total = 0
        for number, layer in enumerate(layers):
            for head in range(layer.keys.shape[1]):
                holding += position in stored(output, sample, number, head)
                total += 1
        shares.append(holding / total)
    return torch.tensor(shares)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen2_audio"])
@pytest.mark.parametrize(
    "recipe", ["none", "random(keep=0.3)", "random(keep=0.5 at=2)", "plphp(keep=0.4)"]
)
def test_presence_is_what_the_cache_holds(name, recipe):
    report, output = run(name, recipe)

    assert torch.allclose(report.last.presence(), presence_by_hand(report.last, output, 0))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("sample", [0, 1])
def test_presence_of_each_sample_of_a_batch(name, sample):
    report, output = run(name, ALL_SITES, batch=True)
    found = report.last.presence(sample)

    assert torch.allclose(found, presence_by_hand(report.last, output, sample))
    assert 0 < found.mean() < 1


def test_presence_without_pruning_or_cache():
    assert run("llava", "none")[0].last.presence().tolist() == [1.0] * 32
    report, _ = run("llava", "random(keep=0.25)", use_cache=False)
    assert report.last.presence().tolist() == [1.0] * 32  # nothing is stored, nothing is missing
    assert report.kv_bytes == Change(0, 0)


@pytest.mark.parametrize("batch", [False, True])
def test_sites_come_in_the_order_in_which_tokens_meet_them(batch):
    report, _ = run("llava", ALL_SITES, batch)
    sites = report.media_tokens.per_site
    kinds = [type(site) for site in sites]

    assert kinds == [Input, *[Layer] * (len(sites) - 2), Cache]
    numbers = [site.index for site in sites if isinstance(site, Layer)]
    assert numbers == sorted(numbers) and 3 in numbers


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", [False, True])
def test_counts_of_sites_are_those_of_the_last_decisions(name, batch):
    report, output = run(name, ALL_SITES, batch)
    call = report.last
    before = sum(len(layout) for layout in call.layouts)
    for site, left in report.media_tokens.per_site.items():
        counts = []
        for sample in range(len(call.layouts)):
            here = [d for d in call.decisions if (str(d.site), d.sample) == (str(site), sample)]
            by_layer = {decision.layer: decision.kept.shape[-1] for decision in here}
            counts.append(sum(by_layer.values()) / len(by_layer))
        assert left == pytest.approx(sum(counts), abs=0.01)
        assert left <= before
    assert report.media_tokens.before == before


def test_caches_of_different_layers_are_one_site():
    report, _ = run("llava", "none")
    call = report.last
    call.decisions = [
        Decision(name, Cache((layer,)), layer, 0, 32, torch.arange(kept))
        for name, layer, kept in [("early", 0, 8), ("late", 1, 16)]
    ]

    assert call.media_tokens.per_site == {Cache(): 12.0}


@pytest.mark.parametrize("name", ["llava", "qwen2_audio", "qwen3_vl"])
@pytest.mark.parametrize("recipe", ["none", "random(keep=0.3)", "random(at=2)", "plphp(keep=0.4)"])
def test_what_is_left_is_counted_in_the_cache(name, recipe):
    report, output = run(name, recipe)
    layout = report.last.layouts[0]
    media = set(layout.position.tolist())
    layers = output.past_key_values.layers
    counts = torch.tensor(
        [
            [len(stored(output, 0, number, head) & media) for head in range(layer.keys.shape[1])]
            for number, layer in enumerate(layers)
        ]
    )

    assert torch.equal(report.last.media_entries[0].long(), counts)
    assert report.media_tokens.after == round(float(counts.double().mean()))
    assert report.media_tokens.before == len(media)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("recipe", ["none", "random(keep=0.3)", ALL_SITES])
@pytest.mark.parametrize("batch", [False, True])
def test_bytes_are_those_of_the_tensors(name, recipe, batch):
    report, output = run(name, recipe, batch)
    tensors = [
        tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)
    ]
    tiny = model_of(name)
    with torch.no_grad():
        plain = tiny.model(**(tiny.batch() if batch else tiny.inputs()), use_cache=True)
    whole = [
        tensor for layer in plain.past_key_values.layers for tensor in (layer.keys, layer.values)
    ]

    assert report.kv_bytes.after == sum(one.numel() * one.element_size() for one in tensors)
    assert report.kv_bytes.after == sum(one.untyped_storage().nbytes() for one in tensors)
    assert report.kv_bytes.before == sum(one.numel() * one.element_size() for one in whole)


def test_decisions_name_positions():
    report, _ = run("llava", "uniform(keep=4)")
    (decision,) = report.last.decisions
    position = report.last.layouts[0].position

    assert (decision.method, str(decision.site), decision.layer) == ("uniform", "input", 0)
    assert (decision.candidates, decision.sample, decision.merge) == (32, 0, None)
    assert set(decision.kept.tolist()) < set(position.tolist())
    assert repr(decision) == "Decision(uniform at input: 4 of 32)"


def test_decisions_of_a_cache_are_one_a_layer():
    report, _ = run("llava", "plphp(keep=0.5)")

    assert [decision.layer for decision in report.last.decisions] == [0, 1, 2, 3, 4]
    assert all(isinstance(decision.site, Cache) for decision in report.last.decisions)
    heads = {decision.kept.shape[0] for decision in report.last.decisions if decision.kept.ndim > 1}
    assert heads <= {2}


def test_the_report_as_text():
    tiny = model_of("llava")
    with prune(tiny.model, "random(keep=0.25) + random(keep=0.5 at=3)") as report:
        assert str(report).endswith("no prompt with media yet")
        tiny.model.generate(**tiny.inputs(), max_new_tokens=3, suppress_tokens=tiny.suppress)
    lines = str(report).splitlines()

    assert lines[0] == "recipe        random(keep=0.25) + random(keep=0.5 at=3)"
    assert lines[1] == "media tokens  32 -> 6  (input 8, layer 3 4)"
    assert lines[2].startswith("KV cache      0.") and lines[2].endswith(" MiB")
    assert [word.split()[0] for word in lines[3][14:].split(", ")] == [
        "encode",
        "prefill",
        "per_token",
    ]
    assert len(lines) == 4
    assert all(seconds > 0 for seconds in report.seconds.as_dict().values())


def test_warnings_are_shown():
    report, _ = run("llava", "plphp(keep=0.5)", use_cache=False)

    assert report.last.warnings == ["use_cache=False: there is no cache to prune"]
    assert str(report).splitlines()[-1] == "warning       " + report.last.warnings[0]


def test_an_empty_report_fails():
    report = Report("none")
    for name in ("last", "media_tokens", "kv_bytes"):
        with pytest.raises(LookupError, match="nothing was recorded: no prompt with images, video"):
            getattr(report, name)
    assert report.seconds == Seconds(encode=0.0) and report.turn_seconds == Seconds()
    with pytest.raises(LookupError, match="nothing was recorded"):
        report.overlay([])
