"""The README's examples run, and its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tokenprune import list_methods, list_models, prune
from tokenprune.core.registry import METHODS
from tokenprune.core.site import Cache
from tokenprune.core.stage import Method
from tokenprune.eval.mini.sample import write_sample
from tokenprune.testing.tiny import build

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The rows of the table below a heading, without its two head lines."""
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a folder of one's own that holds the video of the examples, if a short one."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    write_sample("out/sample.mp4", seconds=8)


beside_a_sample = pytest.mark.usefixtures("sample")


@beside_a_sample
def test_the_first_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.inference_mode():
        exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert "vflowopt(keep=0.25) + plphp(keep=0.5)" in capsys.readouterr().out
    assert Path("kept.png").exists()


@beside_a_sample
def test_the_session_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[1], "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert Path("sample.safetensors").stat().st_size > 10_000


@beside_a_sample
def test_frames_and_sound_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[2], "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("torch.Size([64, 3, 224, 384])")
    assert sum(map(int, lines[1:-2])) == 8
    assert lines[-2] == "torch.Size([8, 3, 308, 588])"
    assert lines[-1].startswith("torch.Size([128")


def test_the_method_to_add_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "claims", {})  # it is not there for other tests
    lines = [
        "from dataclasses import dataclass",
        "from torch import Tensor",
        "from tokenprune.core.context import Context",
        "from tokenprune.core.registry import method",
        "from tokenprune.core.site import Cache",
        "from tokenprune.core.stage import Budgeted, Scored",
        BLOCKS[3],
    ]
    names: dict[str, type[Method]] = {}
    exec(compile("\n".join(lines), "README.md", "exec"), names)
    tiny = build("llava")
    with prune(tiny.model, names["KeyNorm"](keep=0.25)) as report:  # type: ignore[call-arg]
        tiny.model.generate(**tiny.inputs(), max_new_tokens=2, suppress_tokens=tiny.suppress)
    assert report.media_tokens.per_site == {Cache(): 8.0}
    assert report.recipe == "keynorm(keep=0.25)"


def test_every_method_is_listed() -> None:
    listed = {row[0].strip("`"): row[1] for row in table("Methods")}
    assert listed == {
        name: (method.__doc__ or "").splitlines()[0] for name, method in list_methods().items()
    }


def test_every_model_is_listed() -> None:
    assert sorted(row[1].strip("`") for row in table("Models")) == list(list_models())
