"""The folders show the architecture: imports go downwards only, and rooms keep to their trade."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS: list[set[str]] = [
    {"_lazy", "_version", "catalog", "errors"},
    {"core"},
    {"adapters", "media", "methods", "report"},
    {"engine"},
    {"models"},
    {"inputs"},
    {"session"},
    {"asking"},
    {"plan"},
    {"eval"},
    {"demos"},
    {"cli", "testing"},
]
"""Rooms from the ground up; `docs/architecture.md` draws them. Those of one floor are strangers."""

LINES = 350

HEAVY = {"accelerate", "av", "gradio", "matplotlib", "numpy", "PIL", "safetensors", "scipy"}
HEAVY |= {"tokenizers", "torch", "torchaudio", "torchvision", "transformers"}

SPECIALISTS: dict[str, set[str]] = {
    # Packages and calls, and the only folders or files that may use them.
    "import av": {"media", "eval"},
    "import gradio": {"demos"},
    "import matplotlib": {"report", "eval"},
    "import typer": {"cli", "demos", "eval"},
    "transformers.cache_utils": {"engine", "session", "plan"},
    "register_forward_": {"engine", "eval", "testing"},
    "ALL_ATTENTION_FUNCTIONS": {"engine", "testing"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name in it, "core.layout" for one."""
    found = {}
    for folder, room in (("tokenprune", ()), *((name, (name,)) for name in MAPPED)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "__pycache__" in path.parts or path.is_symlink():
                continue
            parts = (*room, *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


MAPPED = ("adapters", "demos", "eval")
"""Folders beside `tokenprune` that are packages inside it."""
MODULES = modules()


def imports(path: Path, *, typing: bool = True, late: bool = True) -> Iterator[str]:
    """Full names of what a file imports: `tokenprune.core.layout` or `torch.nn`.

    Args:
        typing: Those for type checkers only too.
        late: Those inside functions too.
    """
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for one in node.names:
                name = f"{node.module}.{one.name}"
                known = name.removeprefix("tokenprune.") in MODULES
                yield name if known else str(node.module)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            pending += node.orelse
        elif late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)


def inner(path: Path, **kinds: bool) -> set[str]:
    """Names in the package of the modules of the package that a file imports."""
    found = {name for name in imports(path, **kinds) if name.split(".")[0] == "tokenprune"}
    return {name.removeprefix("tokenprune").removeprefix(".") for name in found}


def room(module: str) -> str:
    return module.split(".")[0]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def test_every_room_has_a_floor() -> None:
    assert {room(one) for one in MODULES if one} == set().union(*FLOORS)


@pytest.mark.parametrize("name", sorted({room(one) for one in MODULES if one}))
def test_imports_go_downwards(name: str) -> None:
    upwards = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if room(module) == name
        for other in inner(path)
        if room(other) != name and (not other or floor(room(other)) >= floor(name))
    ]
    assert upwards == []


def test_no_modules_import_each_other() -> None:
    """Not within a room either, at the time of import."""
    graph = {module: inner(path, typing=False, late=False) for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_core_rests_on_torch_alone() -> None:
    for module, path in MODULES.items():
        if room(module) == "core":
            others = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
            assert others <= {"tokenprune", "torch"}, module


@pytest.mark.parametrize("name", ["", "_lazy", "_version", "catalog", "errors"])
def test_what_is_imported_first_is_light(name: str) -> None:
    heavy = {one.split(".")[0] for one in imports(MODULES[name], typing=False, late=False)}
    assert not heavy & HEAVY


@pytest.mark.parametrize("what", SPECIALISTS)
def test_rooms_keep_to_their_trade(what: str) -> None:
    users = {room(module) for module, path in MODULES.items() if module and uses(path, what)}
    assert users and users <= SPECIALISTS[what]


def uses(path: Path, what: str) -> bool:
    package = what.removeprefix("import ")
    if package != what:
        return any(name.split(".")[0] == package for name in imports(path))
    return what in path.read_text()


def test_files_fit_in_the_head() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for module, path in MODULES.items()
        if room(module) not in ("demos", "eval")
    }
    assert {file: length for file, length in lengths.items() if length > LINES} == {}


def test_the_page_on_architecture_names_what_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = {*re.findall(r"[\w/]+\.py\b", page), *re.findall(r"`([\w/]+/)`", page)}
    places = [ROOT, ROOT / "tokenprune"]
    assert len(files) > 20
    assert [one for one in files if not any((place / one).exists() for place in places)] == []
    drawn = re.findall(r"^  \| ([\w, ]+?) +\|  ", page, re.MULTILINE)
    floors = [set(line.replace(",", " ").split()) for line in reversed(drawn)]
    assert floors == FLOORS
