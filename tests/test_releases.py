"""What is let pass on older releases of transformers is none of the newest."""

from __future__ import annotations

import re

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.releases import NEWEST, QUIRKS


@pytest.mark.parametrize("releases, tests, reason", QUIRKS, ids=range(len(QUIRKS)))
def test_the_newest_release_has_no_excuse(releases: str, tests: str, reason: str) -> None:
    assert NEWEST not in SpecifierSet(releases)
    assert Version("99") not in SpecifierSet(releases)
    assert re.compile(tests) and reason
