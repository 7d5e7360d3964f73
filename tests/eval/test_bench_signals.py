"""The bench of signals, on tiny models: what it reads, and the shares it tells."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tokenprune.core.signal import Attention, Keys
from tokenprune.core.site import Cache
from tokenprune.eval.bench import signals
from tokenprune.eval.bench.signals import Reader, Run, cells, encoder_rows, prefill_rows


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for garbage before each forward takes longer than the forward of a tiny model."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def bench(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(signals.main)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def test_all_rows_have_finite_figures(tmp_path: Path) -> None:
    sizes = "--tokens", 24, "--frames", 2, "--rounds", 1
    code, output = bench("--model", "tiny", *sizes, "--out", tmp_path)
    assert code == 0, output
    found = json.loads((tmp_path / "signals.json").read_text())
    assert found["versions"]["torch"]
    prefill, encoding = found["parts"]
    assert [prefill["media_tokens"], encoding["media_tokens"]] == [25, 9]
    assert len(prefill["cells"]) == 1 + len(prefill_rows(1))
    assert len(encoding["cells"]) == 1 + len(encoder_rows())
    for cell in (*prefill["cells"], *encoding["cells"]):
        figures = [value for value in cell.values() if isinstance(value, int | float)]
        assert len(figures) == 5 and all(map(math.isfinite, figures))
        assert cell["seconds"] > 0 and cell["rounds"] >= 1
    table = (tmp_path / "signals.md").read_text()
    assert table in output and table.count("| `unpruned` |") == 2


def test_every_signal_is_read_once_at_each_site() -> None:
    rows = [*prefill_rows(3), *encoder_rows()[1:]]
    assert len({(str(row), row.site) for row in rows}) == len(rows)
    assert Counter(str(row) for row in rows)["nothing"] == 3
    for row in rows:
        for signal in row.needs:
            signal.check(row.site)


def test_shares_are_medians_of_rounds() -> None:
    row = Reader(Cache(), (Attention(queries=64, heads="mean"),))
    bases = Run(1.0, 100), Run(2.0, 100), Run(4.0, 0)
    own = Run(1.5, 150), Run(2.2, 110), Run(4.4, 50)
    unpruned, one = cells({row: list(zip(bases, own, strict=True))})
    assert (unpruned.seconds, unpruned.time_share, unpruned.rounds) == (2.0, 0.0, 3)
    assert one.signal == "Attention(queries=64, heads='mean')" and one.site == "cache"
    assert one.seconds == 2.2 and one.time_share == pytest.approx(0.1)
    assert one.peak_bytes == 110 and one.peak_share == pytest.approx(0.1)
    assert str(Reader(Cache(), (Keys(),))) == "Keys()"


def test_an_unknown_model_fails() -> None:
    code, output = bench("--model", "70b")
    assert code == 2 and "no model '70b'" in output
