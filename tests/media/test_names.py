"""The names of `tokenprune.media`: complete, and imported when they are first used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tokenprune import media


def test_every_name_comes_from_where_type_checkers_look():
    typed = {
        alias.name: str(node.module)
        for node in ast.walk(ast.parse(Path(media.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tokenprune.")
        for alias in node.names
    }
    assert media.__all__ == sorted(media.__all__) and set(media.__all__) == set(typed)
    assert typed == {name: f"tokenprune.media.{place}" for name, place in media._MODULES.items()}
    assert set(media.__all__) <= set(dir(media))
    for name in media.__all__:
        assert getattr(media, name) is not None


def test_unknown_names_fail():
    unknown = "read_film"
    with pytest.raises(AttributeError, match=f"'tokenprune.media' has no attribute '{unknown}'"):
        getattr(media, unknown)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("media", {"av", "numpy", "torch", "transformers"}),
        ("media.sampling, tokenprune.media.size", {"av", "torch", "transformers"}),
        ("media.index.container", {"av", "numpy", "torch", "transformers"}),
        ("media.decode.process", {"torch", "transformers"}),
        ("media.message, tokenprune.media.save", {"matplotlib", "scipy", "transformers"}),
        ("media.transformers", {"matplotlib", "scipy", "transformers"}),
    ],
)
def test_what_is_not_needed_is_not_imported(modules, absent):
    code = f"import sys, tokenprune.{modules}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(ran.stdout.split())
