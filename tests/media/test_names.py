"""The names of `tokenprune.media` are imported when they are first used."""

import subprocess
import sys

import pytest

from tokenprune import media


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
