"""The bench of grouped prefill, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from tokenprune.eval.bench import groups


def test_all_recipes_are_measured_beside_the_prompt_at_once(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(groups.main)
    arguments = ["--model", "tiny", "--tokens", "20", "--group", "1", "--rounds", "1"]
    ran = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "groups.json").read_text())
    assert found["media_tokens"] >= 20
    rows = {row["recipe"]: row for row in found["rows"]}
    assert rows["none, at once"]["seconds_ratio"] == 1
    assert all(row["seconds"] >= 0 and row["seconds_ratio"] > 0 for row in found["rows"])
    for recipe in rows:
        assert recipe in (tmp_path / "groups.md").read_text() and recipe in ran.output
