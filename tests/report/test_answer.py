"""Answers beside each other, as text."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from tokenprune.core.site import Cache, Input, Layer
from tokenprune.report.answer import Answer, numbers, table
from tokenprune.report.change import Change, MediaTokens, total
from tokenprune.report.report import Report
from tokenprune.report.seconds import Phases, Seconds
from tokenprune.report.timeline import Timeline

PRUNED = Answer(
    answer="A red ball rolls behind the box, and comes out again. " * 3,
    media_tokens=MediaTokens(64, 16, {Input(): 16.0}),
    seconds=Seconds(index=0.0, decode=0.1, encode=0.2, prefill=0.3, per_token=0.04),
    kv_bytes=Change(2**25, 2**23),
    frames=4,
    recipe="uniform(keep=0.25)",
    model="tiny",
    report=Report("uniform(keep=0.25)"),
    pictures=torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
    timeline=Timeline(),
    pictures_decoded=0,
    bytes_read=0,
)
UNPRUNED = replace(
    PRUNED,
    answer="",
    media_tokens=MediaTokens(64, 64),
    kv_bytes=Change(2**25, 2**25),
    recipe="none",
)


def test_numbers_of_answers_are_rows_of_cells() -> None:
    rows = dict(numbers([PRUNED, UNPRUNED]))

    assert rows["frames"] == ["4", "4"]
    assert rows["  after input"] == ["16", "-"]
    assert rows["KV cache"] == ["8192 KiB", "32.0 MiB"]
    assert rows["per token seconds"] == ["0.040", "0.040"]
    assert "  decoded" not in rows  # no packets were read: it is no video
    decoded = replace(PRUNED, pictures_decoded=9, bytes_read=2048)
    assert dict(numbers([decoded]))["  decoded"] == ["9 pictures"]


def test_an_answer_as_json() -> None:
    plain = json.loads(json.dumps(replace(PRUNED, answer="red").as_dict()))

    assert list(plain.items()) == [
        ("answer", "red"),
        ("media_tokens", {"before": 64, "after": 16, "per_site": {"input": 16.0}}),
        (
            "seconds",
            {"index": 0.0, "decode": 0.1, "encode": 0.2, "prefill": 0.3, "per_token": 0.04},
        ),
        ("kv_bytes", {"before": 2**25, "after": 2**23}),
        ("frames", 4),
        ("pictures_decoded", 0),
        ("bytes_read", 0),
        ("recipe", "uniform(keep=0.25)"),
        ("model", "tiny"),
        ("timeline", []),
    ]
    assert list(plain["media_tokens"]) == ["before", "after", "per_site"]
    assert list(plain["seconds"]) == ["index", "decode", "encode", "prefill", "per_token"]


def test_sites_go_into_text_and_back() -> None:
    sites = {Input(): 16, Layer(0): 12, Layer(12): 8, Cache(): 2.5}
    tokens = MediaTokens(64, 2, sites)
    plain = json.loads(json.dumps(tokens.as_dict()))

    assert plain == {
        "before": 64,
        "after": 2,
        "per_site": {"input": 16, "layer 0": 12, "layer 12": 8, "cache": 2.5},
    }
    assert MediaTokens.from_dict(plain) == tokens


def test_totals_are_of_every_site() -> None:
    counts = [MediaTokens(64, 8, {Input(): 16, Cache(): 8.25}), MediaTokens(32, 4, {Cache(): 4.5})]

    assert total(counts) == MediaTokens(96, 12, {Input(): 16, Cache(): 12.75})
    assert total([]) == MediaTokens(0, 0)


def test_seconds_of_two_are_added_part_by_part() -> None:
    both = Seconds(decode=1.0, encode=2.0) + Seconds(decode=0.5, process=4.0)

    assert both == Seconds(decode=1.5, process=4.0, encode=2.0)
    assert list(both.as_dict().items()) == [("decode", 1.5), ("process", 4.0), ("encode", 2.0)]
    assert Seconds.zero() + Seconds() == Seconds.zero()


def test_phases_go_into_json_and_back() -> None:
    phases = Phases(decode=((1.0, 2.0), (1.5, 3.0)), prefill=((3.0, 4.5),))
    plain = json.loads(json.dumps(phases.as_dict()))

    assert list(plain) == ["decode", "process", "encode", "prefill"]
    assert Phases.from_dict(plain) == phases
    assert phases.spans == ((1.0, 2.0), (1.5, 3.0), (3.0, 4.5))
    assert Timeline((phases,)).from_start().as_list() == [
        {
            "decode": [[0.0, 1.0], [0.5, 2.0]],
            "process": [],
            "encode": [],
            "prefill": [[2.0, 3.5]],
        }
    ]


def test_long_cells_are_folded() -> None:
    lines = table([PRUNED, UNPRUNED]).splitlines()

    assert max(map(len, lines)) <= 100
    names = [line[:18].strip() for line in lines]
    assert names[:2] == ["recipe", "answer"]
    assert names.count("answer") == 1 and names[2] == ""  # the answer goes on
    assert lines[0].split() == ["recipe", "uniform(keep=0.25)", "none"]
