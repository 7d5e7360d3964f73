"""What `ask` and sessions tell methods of the caller: the question, the pictures, their times."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import loader
from tests.releases import WATCHER
from tokenprune import LoadedModel, Session, ask, read_media
from tokenprune.engine.prompt import Given
from tokenprune.engine.run import Run
from tokenprune.media import read_video

RECIPE = "uniform(keep=0.5)"


@pytest.fixture(scope="module")
def loaded(checkpoint: Any) -> Callable[[str], LoadedModel]:
    return loader(checkpoint)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """What each `Run` was given, in order."""
    found: list[Given] = []
    begin = Run.__init__

    def spy(self: Run, *arguments: Any, **named: Any) -> None:
        found.extend(one for one in (*arguments, *named.values()) if isinstance(one, Given))
        begin(self, *arguments, **named)

    monkeypatch.setattr(Run, "__init__", spy)
    return found


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many pictures that earlier runs were given are still there when one begins."""
    seen: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    begin = Run.__init__

    def spy(self: Run, *arguments: Any, **named: Any) -> None:
        (one,) = (one for one in (*arguments, *named.values()) if isinstance(one, Given))
        counts.append(sum(each() is not None for each in seen))
        seen.extend(map(weakref.ref, one.frames or []))
        begin(self, *arguments, **named)

    monkeypatch.setattr(Run, "__init__", spy)
    gc.collect()
    gc.disable()  # what waits for it can wait for long
    yield counts
    gc.enable()


def same(found: list[Tensor] | None, expected: list[Tensor]) -> bool:
    assert found is not None and len(found) == len(expected)
    assert all(one.dtype == other.dtype for one, other in zip(found, expected, strict=True))
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_ask_gives_a_clip_and_the_question(loaded: Any, files: Any, given: list[Given]) -> None:
    one = loaded("qwen2_vl")
    ask(one, files.video, "what?", recipe=RECIPE, frames=4, max_new_tokens=1)
    video = read_media(files.video, one, frames=4).video
    (found,) = given

    assert found.question == "what?"
    assert video is not None and same(found.frames, [video.frames])
    assert same(found.frame_seconds, [video.pts_seconds])


def test_frames_are_images_for_models_without_clips(
    loaded: Any, files: Any, given: list[Given]
) -> None:
    one = loaded("llava")
    ask(one, files.video, "what?", recipe=RECIPE, frames=3, max_new_tokens=1)
    video = read_media(files.video, one, frames=3).video
    (found,) = given

    assert video is not None and same(found.frames, list(video.frames.split(1)))
    assert same(found.frame_seconds, list(video.pts_seconds.split(1)))


def test_ask_gives_an_image_without_times(loaded: Any, files: Any, given: list[Given]) -> None:
    one = loaded("qwen2_vl")
    ask(one, files.image, "what?", recipe=RECIPE, max_new_tokens=1)
    (found,) = given

    assert same(found.frames, [read_media(files.image, one).frames])
    assert found.question == "what?" and found.frame_seconds is None


def test_sound_has_no_pictures(loaded: Any, files: Any, given: list[Given]) -> None:
    ask(loaded("qwen2_audio"), files.sound, "what?", recipe="none", max_new_tokens=1)
    (found,) = given

    assert (found.question, found.frames, found.frame_seconds) == ("what?", None, None)


def test_sessions_give_each_group_and_then_the_question(
    loaded: Any, files: Any, given: list[Given]
) -> None:
    one = loaded(WATCHER)
    with Session(one.model, one.processor, RECIPE, group=4) as session:
        session.watch(files.video, frames=10)
        session.ask("what?", max_new_tokens=1)
        session.generate("and then?", max_new_tokens=1)
    video = read_media(files.video, one, frames=10).video
    *groups, first, second = given

    assert video is not None and len(groups) == 3
    for found, frames, seconds in zip(
        groups, video.frames.split(4), video.pts_seconds.split(4), strict=True
    ):
        assert same(found.frames, [frames]) and same(found.frame_seconds, [seconds])
        assert found.question is None
    assert first == Given(question="what?") and second == Given(question="and then?")


def test_sessions_give_frames_as_the_model_gets_them(
    loaded: Any, files: Any, given: list[Given]
) -> None:
    one = loaded(WATCHER)
    clip = read_video(files.video, fps=10, size=(56, 84))
    with Session(one.model, one.processor, RECIPE, group=4) as session:
        session.watch(clip.frames[:4], fps=10.0)
        height, width = given[0].frames[0].shape[-2:]  # type: ignore[index]
        session.watch(torch.zeros(4, 3, 10, 10, dtype=torch.uint8))

    assert [list(found.frames[0].shape) for found in given] == [[4, 3, height, width]] * 2  # type: ignore[index]
    assert given[1].frame_seconds[0].tolist() == pytest.approx([0.4, 0.5, 0.6, 0.7])  # type: ignore[index]


def test_pictures_go_with_their_group(loaded: Any, files: Any, alive: list[int]) -> None:
    one = loaded(WATCHER)
    with Session(one.model, one.processor, RECIPE, group=2) as session:
        session.watch(files.video, frames=8)
        session.watch(torch.zeros(4, 3, 56, 84, dtype=torch.uint8))
        session.ask("what?", max_new_tokens=1)

    assert alive == [0] * 7
