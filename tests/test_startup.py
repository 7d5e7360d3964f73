"""What is not needed is not imported: torch alone takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Files
from tokenprune.cli.app import VERBS
from tokenprune.eval.bench import startup

FOR_MODELS = {"accelerate", "safetensors", "tokenizers", "transformers"}
FOR_PAGES = {"gradio", "matplotlib"}
HEAVY = {"av", "numpy", "PIL", "rich", "scipy", "torch", "tqdm", *FOR_MODELS, *FOR_PAGES}

PROGRAM = """
import json, sys
try:
    {code}
except SystemExit as ended:
    code = ended.code or 0
else:
    code = 0
names = sorted({{name.split(".")[0] for name in sys.modules}})
print(json.dumps([code, names]), file=sys.stderr)
"""


def imported(code: str, *arguments: object) -> set[str]:
    """Packages that a program has imported when it is through; the command line by itself."""
    program = PROGRAM.format(code=code)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True)
    ended, names = json.loads(ran.stderr.splitlines()[-1])
    assert ended in (0, 2), ran.stderr
    return set(names)


def imported_by_command(*arguments: object) -> set[str]:
    return imported("from tokenprune.cli.app import main; main()", *arguments)


@pytest.mark.parametrize(
    "name", ["", ".catalog", ".cli.app", ".errors", ".media", ".methods", ".models", ".testing"]
)
def test_imports_are_light(name: str) -> None:
    assert not HEAVY & imported(f"import tokenprune{name}")


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_is_light(verb: str | None) -> None:
    assert not HEAVY & imported_by_command(*[verb] * bool(verb), "--help")


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], [], ["ask"], ["ask", "--no"]])
def test_lists_and_usage_errors_are_light(arguments: list[str]) -> None:
    assert not HEAVY & imported_by_command(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "missing.mp4", "what?"],
        ["ask", __file__, " "],
        ["ask", __file__, "what?", "--frames", 0],
        ["ask", __file__, "what?", "--max-new-tokens", 0],
        ["ask", __file__, "what?", "--group", 0],
        ["ask", "missing.safetensors", "what?"],
        ["plan", "missing.mp4"],
        ["plan", __file__, "--frames", 2, "--fps", 2],
        ["watch", "missing.mp4", "--save", "a.safetensors"],
        ["decode", "missing.mp4"],
        ["decode", __file__, "--size", "big"],
    ],
)
def test_what_can_be_refused_early_is(arguments: list[object]) -> None:
    assert not {"torch", *FOR_MODELS, *FOR_PAGES} & imported_by_command(*arguments)


def test_decoding_needs_no_models(files: Files) -> None:
    names = imported_by_command("decode", files.video, "--frames", 2)

    assert {"av", "torch"} <= names
    assert not {*FOR_MODELS, *FOR_PAGES} & names


def test_asking_needs_no_charts_and_pages(files: Files, checkpoint: Callable[[str], Path]) -> None:
    arguments = ["--model", checkpoint("qwen2_5_vl"), "--frames", 2, "--max-new-tokens", 1]
    names = imported_by_command("ask", files.video, "what?", *arguments)

    assert "transformers" in names
    assert not FOR_PAGES & names


def test_costs_are_measured(tmp_path: Path) -> None:
    assert startup.VERBS == tuple(VERBS)
    runs = startup.commands(startup.ROOT, tmp_path / "a.mp4")
    chosen = {command: runs[command] for command in ("python -c 'pass'", "tokenprune list")}
    plain, listed = startup.measure(chosen, startup.ROOT, repeats=1)

    assert (plain.command, plain.code, listed.code) == ("python -c 'pass'", 0, 0)
    assert 0 < plain.processor_seconds < listed.processor_seconds
