"""Answers beside each other, as text."""

from __future__ import annotations

from dataclasses import replace

import torch

from tokenprune.report.answer import Answer, numbers, table
from tokenprune.report.report import Report
from tokenprune.report.timeline import Timeline

PRUNED = Answer(
    answer="A red ball rolls behind the box, and comes out again. " * 3,
    media_tokens={"before": 64, "after": 16, "per_site": {"input": 16.0}, "per_layer": [16]},
    seconds={"index": 0.0, "decode": 0.1, "encode": 0.2, "prefill": 0.3, "per_token": 0.04},
    kv_bytes={"before": 2**25, "after": 2**23},
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
    media_tokens={"before": 64, "after": 64, "per_site": {}, "per_layer": [64]},
    kv_bytes={"before": 2**25, "after": 2**25},
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


def test_long_cells_are_folded() -> None:
    lines = table([PRUNED, UNPRUNED]).splitlines()

    assert max(map(len, lines)) <= 100
    names = [line[:18].strip() for line in lines]
    assert names[:2] == ["recipe", "answer"]
    assert names.count("answer") == 1 and names[2] == ""  # the answer goes on
    assert lines[0].split() == ["recipe", "uniform(keep=0.25)", "none"]
