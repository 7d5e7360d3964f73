"""What every test relies on."""

from __future__ import annotations

import logging
import os
import random
import sys
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from PIL import Image

from tests.releases import WARNINGS, quirk

# Tiny tensors gain nothing from threads, and lose much where cores are shared.
torch.set_num_threads(1)


def pytest_report_header() -> str:
    """What the tests are run with: they hold over a range of releases."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def pytest_configure(config: pytest.Config) -> None:
    """Let pass what older releases of transformers warn of themselves; draw the run's seed."""
    # Drawn before the workers of pytest-xdist start, since all of them must collect the same tests.
    os.environ.setdefault("TOKENPRUNE_DRAW", str(random.SystemRandom().randrange(10**9)))
    for warning in WARNINGS:
        config.addinivalue_line("filterwarnings", warning)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the release of transformers at hand gets wrong by itself."""
    for item in items:
        if reason := quirk(item.nodeid):
            item.add_marker(pytest.mark.skip(reason))


@pytest.fixture(autouse=True)
def restore_random_state() -> Iterator[None]:
    """Start each test from fixed seeds, and leave global random state as it was found."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])


@dataclass(frozen=True)
class Files:
    """Files to ask about.

    Attributes:
        folder: Where they are.
        video: One second, 30 frames of 192x112, with a sound track.
        silent: Seven frames of 192x112, without sound.
        image: 160x90.
        animation: A GIF of six frames of 64x48.
        sound: One and a half seconds.
    """

    folder: Path
    video: Path
    silent: Path
    image: Path
    animation: Path
    sound: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files to ask about, written once."""
    from tests.media.clips import encode, x264

    folder = tmp_path_factory.mktemp("files")
    picture = numpy.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=numpy.uint8)
    Image.fromarray(picture).save(folder / "image.png")
    frames = [Image.new("RGB", (64, 48), (40 * n, 0, 0)) for n in range(6)]
    frames[0].save(folder / "animation.gif", save_all=True, append_images=frames[1:])
    tone = 8000 * numpy.sin(numpy.arange(24000) / 6)
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(tone.astype("<i2").tobytes())
    options = x264("keyint=10:bframes=2")
    return Files(
        folder=folder,
        video=encode(folder / "video.mp4", numbers=range(30), options=options, sound=True).path,
        silent=encode(folder / "silent.mp4", numbers=range(7), options=options).path,
        image=folder / "image.png",
        animation=folder / "animation.gif",
        sound=folder / "sound.wav",
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny random checkpoint of a family, with its processor."""
    from tests.checkpoints import save_checkpoint

    @cache
    def save(name: str) -> Path:
        return save_checkpoint(name, tmp_path_factory.mktemp(name))

    return save


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong; progress before it is left out."""
        lines = [line.strip() for line in self.err.replace("\r", "\n").splitlines()]
        errors = [line for line in lines if line.startswith("error:")]
        assert "Traceback" not in self.err
        assert len(errors) == 1 and lines[-1] == errors[0], self.err
        return errors[0]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    """Runs `tokenprune` with some arguments."""
    from tokenprune.cli.app import main

    logger = logging.getLogger("transformers")
    level = logger.level

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["tokenprune", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Ran(code, *capfd.readouterr())

    yield run
    logger.setLevel(level)
