"""What is installed is complete: a wheel, in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from tests.test_public_names import modules

ROOT = Path(__file__).parent.parent
MAPPED = ("adapters", "demos", "eval")

IMPORT_ALL = """
import importlib, pkgutil, sys
import tokenprune
for one in pkgutil.walk_packages(tokenprune.__path__, "tokenprune."):
    importlib.import_module(one.name)
from tokenprune.models import built_in_models
print(tokenprune.__file__)
print(*built_in_models())
print(*sorted(name for name in sys.modules if name.split(".")[0] == "tokenprune"))
"""


def test_every_folder_is_a_package_of_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for folder, name in (("tokenprune", ""), *((one, f".{one}") for one in MAPPED)):
        for path in (ROOT / folder).rglob("__init__.py"):
            below = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join([f"tokenprune{name}", *below]))
    assert listed == sorted(found)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; what it depends on is that of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    kept = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("tokenprune", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=kept)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True
    )
    # Below the wheel; a .pth file there is not read, so an editable install does not come along.
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "env" / "bin"


def test_every_module_can_be_imported_from_the_wheel(environment: Path) -> None:
    run = [environment / "python", "-I", "-c", IMPORT_ALL]
    ran = subprocess.run(run, capture_output=True, text=True, check=True, cwd=environment)
    file, models, imported = ran.stdout.splitlines()
    assert file.startswith(str(environment.parent))
    assert models.split() == ["mini-video", "mini-video-llava"]
    assert set(modules()) <= set(imported.split())


def test_the_command_is_installed(environment: Path) -> None:
    run = [environment / "tokenprune", "list"]
    ran = subprocess.run(run, capture_output=True, text=True, check=True, cwd=environment)
    assert "vflowopt" in ran.stdout and "mini-video" in ran.stdout
