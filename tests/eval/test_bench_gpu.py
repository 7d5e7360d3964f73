"""The bench for a card, with tiny models on the processor: what it records, and how it goes on."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from tokenprune.eval.bench import footage, gpu, gpu_answers, gpu_media, gpu_results
from tokenprune.eval.bench.footage import Footage
from tokenprune.eval.bench.gpu import PARTS
from tokenprune.eval.bench.gpu_answers import Group, recipes
from tokenprune.eval.bench.gpu_models import QWEN_TOWER, Models, cases
from tokenprune.eval.bench.gpu_results import Results, describe
from tokenprune.eval.bench.random_models import QWEN2_7B, SO400M, build, llava_config, qwen_config

SMALL = Footage("small", 112, 192, 12, 300, 2)
ANSWERS = [part for part in PARTS if part not in ("overlap", "decode")]
CPU = torch.device("cpu")

Bench = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a "minute" of 36 frames lies twice, in place of the bench's ten minutes."""
    folder = tmp_path_factory.mktemp("footage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footage, "MINUTE", 36)
        patch.setattr(gpu_media, "FOOTAGE", SMALL)
        footage.make(SMALL, folder, gpu_media.PRESET)
        yield folder


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for garbage before each answer takes longer than the answer of a tiny model."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.fixture
def bench(tmp_path: Path, video_folder: Path) -> Bench:
    """Runs the bench; gives its exit code, what is in its file, and what it printed."""
    app = typer.Typer()
    app.command()(gpu.main)

    def run(*arguments: object) -> tuple[int, dict[str, Any], str]:
        fixed = ["--tiny", "--device", "cpu", "--rounds", 1, "--files", video_folder]
        given = map(str, [*fixed, "--out", tmp_path / "out", *arguments])
        result = CliRunner().invoke(app, list(given))
        path = tmp_path / "out" / "gpu.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return result.exit_code, found, result.output

    return run


def test_all_cells_have_finite_figures(bench: Bench, tmp_path: Path) -> None:
    code, found, output = bench()
    assert code == 0, output
    assert list(found["parts"]) == list(PARTS)
    assert {how["state"] for how in found["parts"].values()} == {"done"}
    for cell in found["cells"]:
        figures = [value for value in cell.values() if isinstance(value, int | float)]
        assert len(figures) > 4 and all(map(math.isfinite, figures)) and cell["rounds"] == 1
        assert "error" not in cell
    by_part = {part: [c for c in found["cells"] if c["part"] == part] for part in PARTS}
    for part in ANSWERS:
        check_answers(by_part[part])
    assert all(cell["right"] == cell["frames"] for cell in by_part["decode"])
    assert [cell["workers"] for cell in by_part["decode"]][-1] == 1
    assert [cell["recipe"] for cell in by_part["overlap"]] == ["none", "vflowopt(keep=0.25)"]
    assert found["kernels"]["sdpa"] == "available" and found["versions"]["torch"]
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert table.count("| `none` |") == len(ANSWERS) and "**decode**" in table
    assert not list((tmp_path / "out").glob(".*"))


def check_answers(cells: list[dict[str, Any]]) -> None:
    """Every method has baselines of its own count, and bytes are those of the model alone."""
    by_recipe = {cell["recipe"]: cell for cell in cells}
    plain, *pruned = cells
    assert plain["recipe"] == "none" and plain["first_token_ratio"] == 1
    assert plain["sdpa_backends"].count("flash 3") == 2
    keep_all = pruned[0]
    assert keep_all["media_tokens_kept"] == keep_all["media_tokens"]
    assert keep_all["kv_ratio"] == 1
    for cell in pruned:
        assert cell["kv_bytes_unpruned"] == plain["kv_bytes"]
        assert cell["first_token_seconds"] > cell["prefill_seconds"] + cell["encode_seconds"]
    for name in gpu_answers.METHODS:
        number = list(by_recipe).index(name)
        method, *controls = cells[number : number + 3]
        assert [one["recipe"].partition("(")[0] for one in controls] == ["random", "uniform"]
        for control in controls:
            assert control["media_tokens_kept"] == pytest.approx(method["media_tokens_kept"], abs=1)
            assert ("at=cache" in control["recipe"]) == (name == "plphp")


def test_failures_are_recorded_and_the_rest_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = gpu_answers.answer

    def fails(model: Any, inputs: Any, recipe: str, tokens: int) -> Any:
        if recipe == "plphp":
            raise torch.OutOfMemoryError("tried to allocate 9 GiB\nmore words")
        if recipe == "vflowopt" and tokens > 2:
            raise ZeroDivisionError("by zero")
        return answer(model, inputs, recipe, tokens)

    def no_video(*_: Any) -> Any:
        raise OSError("no encoder")

    monkeypatch.setattr(gpu_answers, "answer", fails)
    monkeypatch.setattr(gpu_media, "overlap", no_video)
    code, found, output = bench("--only", "llava-6k,overlap,decode")
    assert code == 1
    cells = {cell["recipe"]: cell for cell in found["cells"] if cell["part"] == "llava-6k"}
    assert cells["plphp"]["error"] == "out of memory: tried to allocate 9 GiB"
    assert cells["vflowopt"]["error"] == "ZeroDivisionError: by zero"
    assert cells["none"]["rounds"] == 1 and cells["plphp"]["rounds"] == 0
    baselines = [recipe for recipe in cells if recipe.startswith(("random(keep=0", "uniform"))]
    assert len(baselines) == 2 and all(cells[one]["rounds"] == 1 for one in baselines)
    assert found["parts"]["llava-6k"]["error"] == "vflowopt: ZeroDivisionError: by zero"
    assert found["parts"]["overlap"]["error"] == "OSError: no encoder"
    assert found["parts"]["decode"]["state"] == "done"
    assert "overlap: OSError: no encoder" in output


def test_memory_that_does_not_suffice_is_no_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(gpu_answers, "answer", full)
    code, found, _ = bench("--only", "qwen-24k")
    assert code == 0 and found["parts"]["qwen-24k"]["state"] == "done"
    assert {cell["error"] for cell in found["cells"]} == {"out of memory: tried to allocate 9 GiB"}


def test_nothing_is_begun_after_the_budget(bench: Bench) -> None:
    code, found, output = bench("--budget", 0)
    assert code == 0 and found["cells"] == []
    assert {how["state"] for how in found["parts"].values()} == {"no time left"}
    assert "decode: no time left" in output


def test_a_round_ends_where_the_time_does() -> None:
    group = Group(cases(tiny=True)["llava-6k"], Models(CPU), "sdpa", 3, ["random(keep=0.5)"])
    group.warm_up(end=math.inf)
    assert group.round(end=math.inf) and not group.round(end=time.monotonic())
    assert [cell["rounds"] for cell in group.cells()] == [1, 1]
    assert [cell["recipe"] for cell in group.cells()] == ["none", "random(keep=0.5)"]
    late = Group(cases(tiny=True)["llava-6k"], Models(CPU), "sdpa", 3)
    late.warm_up(end=time.monotonic())
    assert late.cells() == []


def test_only_what_is_asked_for_is_run(bench: Bench) -> None:
    code, found, _ = bench("--only", "qwen-6k", "--recipe", "uniform(keep=0.5)")
    assert code == 0 and list(found["parts"]) == ["qwen-6k"]
    assert [cell["recipe"] for cell in found["cells"]] == ["none", "uniform(keep=0.5)"]
    code, _, output = bench("--only", "llava-7k")
    assert code == 2 and "no part 'llava-7k'" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_card_is_told(bench: Bench) -> None:
    code, found, output = bench("--device", "cuda")
    assert code == 2 and not found and "no CUDA device" in output


def test_models_are_held_one_at_a_time() -> None:
    case = cases(tiny=True)["llava-6k"]
    models = Models(CPU)
    first = models.get(case.model, case.build)
    assert models.get(case.model, case.build) is first
    assert {weight.dtype for weight in first.parameters()} == {torch.bfloat16}
    assert models.get("another", case.build) is not first


def test_large_shapes_are_those_of_the_models() -> None:
    """Checked on the meta device: they take no memory there."""
    for config in (llava_config(QWEN2_7B, SO400M), qwen_config(QWEN2_7B, QWEN_TOWER)):
        model = build(config, "meta")
        size = sum(weight.numel() for weight in model.parameters())
        assert 7.5e9 < size < 8.5e9
        assert recipes("llava-onevision-7b", 28)[1].endswith("at=8) + plphp(keep=1.0)")
    assert 'vflowopt(keep=0.1 strategy="llava-onevision-7b")' in recipes("llava-onevision-7b", 28)
    assert "vflowopt" in recipes("qwen2.5-vl-7b", 28)


def test_a_card_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = type("Card", (), {"name": "A Card", "total_memory": 8, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(gpu_results, "_driver", lambda: "580.1")
    found = describe(torch.device("cuda"))
    assert (found["card"], found["compute_capability"], found["driver"]) == (
        "A Card",
        "9.0",
        "580.1",
    )
    table = Results(tmp_path, {**found, "kernels": {"sdpa": "available"}}).table()
    assert table.startswith("# A Card, driver 580.1, CUDA ")
