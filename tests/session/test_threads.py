"""Sessions used from several threads: who waits, who is refused, and that all answers are right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune import Session, prune
from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.session.turns import Turn
from tokenprune.testing.snapshot import snapshot

PATIENCE = 60.0  # seconds until a test that hangs fails


@pytest.fixture(scope="module")
def loaded(checkpoint: Callable[[str], Path]) -> LoadedModel:
    return load_model(str(checkpoint("llava_onevision")), device="cpu")


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return torch.randint(0, 256, (8, 3, 56, 56), dtype=torch.uint8)


@pytest.fixture
def watched(loaded: LoadedModel, clip: Tensor) -> Session:
    session = Session(loaded.model, loaded.processor, "random(keep=0.5 at=cache)", group=4)
    session.watch(clip[:4], fps=2.0)
    return session


def answer(session: Session, question: str = "what?", streamer: Any = None) -> Tensor:
    found: Tensor = session.generate(question, max_new_tokens=4, do_sample=False, streamer=streamer)
    return found


class Pause:
    """A streamer that stops at the first token until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def put(self, value: Any) -> None:
        self.reached.set()
        assert self.go.wait(PATIENCE)

    def end(self) -> None: ...


class Door(Turn):
    """Tells when somebody has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.knocked = threading.Event()

    def __enter__(self) -> None:
        if self._thread is not None:
            self.knocked.set()
        super().__enter__()


@contextmanager
def in_the_middle(session: Session, question: str = "what?") -> Iterator[Future[Tensor]]:
    """Inside, another thread is held in the middle of an answer; behind, it has it."""
    pause = Pause()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(answer, session, question, pause)
        try:
            assert pause.reached.wait(PATIENCE)
            yield future
        finally:
            pause.go.set()
            future.exception(PATIENCE)


def meanwhile(session: Session, act: Callable[[], Any], question: str = "what?") -> tuple[Any, Any]:
    """What an answer is, and what comes of an act that another thread begins in its middle."""
    door = session._turn = Door()
    with ThreadPoolExecutor(1) as pool:
        with in_the_middle(session, question) as first:
            second = pool.submit(act)
            second.add_done_callback(
                lambda _: door.knocked.set()
            )  # who does not wait is not waited for
            assert door.knocked.wait(PATIENCE)
            assert not second.done(), "it did not wait"
        return first.result(), second.result(PATIENCE)


def test_a_second_question_waits(watched: Session) -> None:
    expected = answer(watched, "what?"), answer(watched, "who is it then?")
    found = meanwhile(watched, lambda: answer(watched, "who is it then?"))

    assert all(map(torch.equal, found, expected))
    assert torch.equal(answer(watched), expected[0])


def test_watching_waits_for_an_answer(watched: Session, loaded: LoadedModel, clip: Tensor) -> None:
    before = answer(watched)
    found, _ = meanwhile(watched, lambda: watched.watch(clip[4:]))
    after = answer(watched)
    plain = Session(loaded.model, loaded.processor, watched.recipe, group=4)
    plain.watch(clip, fps=2.0)

    assert torch.equal(found, before)
    assert torch.equal(after, answer(plain)) and after.shape[1] > before.shape[1]


def test_saving_waits_for_an_answer(watched: Session, loaded: LoadedModel, tmp_path: Path) -> None:
    expected = answer(watched)
    path = tmp_path / "kept.safetensors"
    found, saved = meanwhile(watched, lambda: watched.save(path))
    again = Session.load(path, loaded.model, loaded.processor)

    assert saved == path
    assert torch.equal(found, expected) and torch.equal(answer(again), expected)


def test_closing_waits_for_an_answer(watched: Session) -> None:
    expected = answer(watched)
    found, _ = meanwhile(watched, watched.close)

    assert torch.equal(found, expected)
    with pytest.raises(TokenPruneError, match="this session is closed"):
        answer(watched)


def test_a_report_is_that_of_watching_while_a_question_runs(watched: Session) -> None:
    report = watched.report
    door = watched._turn = Door()
    pause = Pause()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(watched.ask, "what?", streamer=pause, max_new_tokens=2)
        assert pause.reached.wait(PATIENCE)
        assert watched.report is report and len(report.calls) == 1
        pause.go.set()
        assert future.result(PATIENCE).report is not report
    assert not door.knocked.is_set()


def test_a_call_that_failed_lets_the_next_one_in(watched: Session) -> None:
    expected = answer(watched)
    with pytest.raises(TokenPruneError, match="a question must have words"):
        watched.ask(" ")
    with pytest.raises(TokenPruneError, match="belong to the session"):
        watched.generate("what?", position_ids=None)
    assert torch.equal(answer(watched), expected)


def test_a_session_called_from_within_fails(watched: Session, clip: Tensor) -> None:
    """Waiting would never end."""
    expected = answer(watched)
    errors: list[str] = []

    class Streamer:
        def put(self, value: Any) -> None:
            for act in (
                lambda: answer(watched),
                lambda: watched.watch(clip[4:]),
                watched.close,
            ):
                with pytest.raises(TokenPruneError, match="called again from within it") as caught:
                    act()
                errors.append(str(caught.value))

        def end(self) -> None: ...

    assert torch.equal(answer(watched, streamer=Streamer()), expected)
    assert len(errors) >= 3 and len(watched.groups) == 1
    assert torch.equal(answer(watched), expected)


def test_two_threads_ask_and_watch(watched: Session, loaded: LoadedModel, clip: Tensor) -> None:
    """Whatever the order of their calls, each answer is that of some number of groups."""
    rounds = 6
    plain = Session(loaded.model, loaded.processor, watched.recipe, group=4)
    plain.watch(clip[:4], fps=2.0)
    expected = [answer(plain)]
    for number in range(rounds):
        plain.watch(clip[4:] if number % 2 else clip[:4])
        expected.append(answer(plain))
    start = threading.Barrier(2)

    def look() -> None:
        start.wait(PATIENCE)
        for number in range(rounds):
            watched.watch(clip[4:] if number % 2 else clip[:4])

    def wonder() -> list[Tensor]:
        start.wait(PATIENCE)
        return [answer(watched) for _ in range(3 * rounds)]

    with ThreadPoolExecutor(2) as pool:
        looking, wondering = pool.submit(look), pool.submit(wonder)
        looking.result(PATIENCE)
        found = wondering.result(PATIENCE)
    lengths = [one.shape[1] for one in expected]
    seen = [lengths.index(one.shape[1]) for one in found]
    assert seen == sorted(seen)
    assert all(torch.equal(one, expected[number]) for one, number in zip(found, seen, strict=True))
    assert torch.equal(answer(watched), expected[-1])


def test_another_session_of_the_model_is_refused_meanwhile(
    watched: Session, loaded: LoadedModel, clip: Tensor
) -> None:
    """And neither takes harm."""
    other = Session(loaded.model, loaded.processor, "uniform(keep=0.5)", group=4)
    other.watch(clip[4:], fps=2.0)
    expected = answer(watched), answer(other)
    before = snapshot(loaded.model)
    with in_the_middle(watched) as future:
        with pytest.raises(UnsupportedModelError, match="already inside"):
            answer(other)
        with pytest.raises(UnsupportedModelError, match="already inside"):
            other.watch(clip[:4])
        with pytest.raises(UnsupportedModelError, match="already inside"), prune(loaded.model):
            pass
        assert other.frames == 4
    assert snapshot(loaded.model) == before
    found = future.result()

    assert all(map(torch.equal, (found, answer(other)), expected))
    assert torch.equal(answer(watched), expected[0])
