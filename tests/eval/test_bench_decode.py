"""The decoder's bench: what it counts, how it resumes, what it prints."""

import numpy as np
import pytest

from tokenprune.eval.bench import decode, footage
from tokenprune.eval.bench.cores import Costs, measure
from tokenprune.eval.bench.decode import (
    CELLS,
    Bench,
    Cell,
    Server,
    methods_due,
    read_runs,
    table,
)
from tokenprune.eval.bench.footage import Footage, make, read_number
from tokenprune.eval.bench.readers import OURS, READERS, numbers_on
from tokenprune.media import probe, read_video

SMALL = Footage("small", 112, 192, 12, 300, 2)
SEQUENTIAL = "PyAV 1 thread"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A "minute" of 36 frames, twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footage, "MINUTE", 36)
        folder = tmp_path_factory.mktemp("footage")
        path = make(SMALL, folder, "veryfast")
        assert make(SMALL, folder) == path
    return path


@pytest.fixture
def tiny_cell(small, monkeypatch):
    cell = Cell("a small one", SMALL, (0, 10, 20, 35), [OURS])
    monkeypatch.setattr(decode, "CELLS", {"tiny": cell})
    return cell


def test_footage_repeats_its_numbers(small):
    info = probe(small)
    assert (info.frame_count, info.height, info.width) == (72, 112, 192)
    assert info.duration_seconds == pytest.approx(72 / 30)
    frames = read_video(small, frames=72).frames
    assert numbers_on(frames).tolist() == [*range(36), *range(36)]
    assert numbers_on(frames.permute(0, 2, 3, 1)).tolist() == [*range(36), *range(36)]
    assert read_number(255 - frames[0].numpy()) == -1


@pytest.mark.parametrize("name", READERS)
def test_readers_read_the_same(name, small):
    reader = READERS[name]
    try:
        reader.load()
    except ImportError as error:
        pytest.skip(str(error))
    ranks = [0, 20, 40, 71]
    found = reader.read(str(small), ranks, (112, 192))
    assert numbers_on(found).tolist() == [0, 20, 4, 35]


def test_bench_resumes_and_tells_of_failures(small, tiny_cell, tmp_path):
    out = tmp_path / "new" / "runs.jsonl"
    bench = Bench(out, small.parent, "")
    try:
        bench.round("tiny", 0, tiny_cell.readers, 60, 1e12)
        bench.round("tiny", 0, tiny_cell.readers, 60, 1e12)
        server = bench._server(OURS)
        assert server.missing is None
        assert "no such file" in server.run(tmp_path / "none.mp4", (0,), 60)["error"]
        late = server.run(small, tuple(range(72)) * 400, 1)
        assert late["error"] == "ended by SIGALRM"
        assert server.run(small, (0, 20), 60)["right"] == 2
    finally:
        bench.close()
    (run,) = read_runs(out)
    assert (run["method"], run["right"], run["frames"]) == (OURS, 4, 4)
    assert run["wall"] > 0 and run["cpu"] > 0
    assert "| tokenprune | 1 |" in table([run], {})


def test_bench_stops_in_time(small, tiny_cell, tmp_path):
    bench = Bench(tmp_path / "runs.jsonl", small.parent, "")
    bench.round("tiny", 0, tiny_cell.readers, 60, 0.0)
    assert bench.runs == []


def test_missing_readers_are_told(tmp_path):
    (tmp_path / "decord.py").write_text("raise ImportError('broken here')")
    server = Server("decord 0 threads", str(tmp_path))
    server.close()
    assert server.missing == "broken here"


def run_of(method, number, wall, **more):
    base = {"cell": "minute", "method": method, "round": number, "wall": wall, "cpu": 1.0}
    return {**base, "peak": 1 << 20, "right": 1800, "frames": 1800, **more}


def test_slow_readers_run_seldom():
    runs = [run_of(SEQUENTIAL, 0, 30.0), run_of(OURS, 0, 3.0), run_of("PyAV AUTO", 0, 3.0)]
    assert SEQUENTIAL in methods_due(runs, "minute", 1, 20.0, 2)
    assert SEQUENTIAL not in methods_due(runs, "minute", 2, 20.0, 2)
    assert OURS in methods_due(runs, "minute", 2, 20.0, 2)
    failed = [{"cell": "minute", "method": OURS, "round": 0, "error": "x"}]
    assert OURS not in methods_due(failed, "minute", 2, 20.0, 2)


def test_table_compares_within_rounds_and_hides_nothing():
    walls = {
        OURS: (2.0, 4.0, 3.0),
        SEQUENTIAL: (4.0, 10.0, 6.0),
        "OpenCV": (1.0, 1.0, 1.0),
    }
    runs = [
        run_of(name, at, wall) for name, of_it in walls.items() for at, wall in enumerate(of_it)
    ]
    for run in runs:
        run["right"] = 1799 if run["method"].startswith("OpenCV") else 1800
    failed = {
        "cell": "minute",
        "method": "transformers pyav",
        "round": 0,
        "error": "ended by SIGALRM",
    }
    text = table([*runs, failed], {"decord 1 thread": "No module named 'decord'"})

    assert f"| {SEQUENTIAL} | 3 | 6.00 | 2.00 | 1.00 | 1 | 1800 |" in text
    assert "| OpenCV | 3 | 1.00 | 0.33 | 1.00 | 1 | 1799 |" in text  # fast, and wrong
    assert f"Ours takes 0.50 times what the best other reader ({SEQUENTIAL}) takes." in text
    assert "| transformers pyav | 0 | ended by SIGALRM |" in text
    assert "| decord 1 thread | 0 | No module named 'decord' |" in text
    assert "| OpenCV seek | 0 | not run |" in text


def test_simulation_hands_units_out_in_order():
    costs = Costs(1.0, [4.0, 1.0, 1.0, 1.0, 5.0])
    assert costs.seconds(1) == 13.0
    assert costs.seconds(2) == 1 + 8.0  # 4; 1 1 1 5
    assert costs.seconds(5) == costs.seconds(64) == 1 + 5.0


def test_costs_are_measured(small):
    costs = measure(small, tuple(range(72)), 64)
    assert costs.index > 0 and len(costs.units) > 1 and min(costs.units) > 0


def test_cells_are_those_promised():
    assert {len(cell.ranks) for cell in CELLS.values()} >= {64, 256, 1024, 3600, 1800, 16}
    for cell in CELLS.values():
        assert (np.diff(cell.ranks) > 0).all()
        assert max(cell.ranks) < cell.footage.minutes * 1800
