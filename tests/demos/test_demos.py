"""The page in the browser and the first run, on an untrained mini model."""

from __future__ import annotations

import gc
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio_client
import pytest

from tokenprune.asking import answer
from tokenprune.core.recipe import Recipe
from tokenprune.demos import first_run, long_video_qa
from tokenprune.errors import MediaError, MissingExtraError, TokenPruneError
from tokenprune.eval.mini.model import build_model, save
from tokenprune.inputs import read_media
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.report.answer import Answer

# gradio and its client leave event loops and sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

FRAMES = 8
RECIPE = "vflowopt(keep=0.25) + plphp(keep=0.5)"


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_video_qa, "LONGEST_ANSWER", 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(build_model(), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(str(model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a short sample video."""
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_run, "SECONDS", 10)
        first_run.sample_video(folder)
    yield folder


@pytest.fixture(scope="module")
def client(loaded: LoadedModel, folder: Path) -> Iterator[gradio_client.Client]:
    page = long_video_qa.build(loaded, folder)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, show_error=True, ssr_mode=False)
    client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
    yield client
    client.close()
    page.close()
    del client, page
    gc.collect()


@pytest.fixture
def ask(client: gradio_client.Client, folder: Path) -> Callable[..., Any]:
    """Ask on the page: gives the running job."""

    def ask(
        video: Path | None = folder / "sample.mp4",
        question: str = "What shape was first?",
        recipe: str = RECIPE,
        compare: bool = False,
    ) -> Any:
        file = None if video is None else gradio_client.handle_file(str(video))
        return client.submit(file, question, recipe, FRAMES, compare, api_name="/ask")

    return ask


# -- the page


def test_streams_the_answer_that_the_library_gives(
    ask: Callable[..., Any], loaded: LoadedModel, folder: Path
) -> None:
    job = ask()
    pruned, unpruned, table, picture = job.result(timeout=60)
    media = read_media(folder / "sample.mp4", loaded, frames=FRAMES)
    expected = answer(
        loaded, media, "What shape was first?", Recipe(RECIPE), long_video_qa.LONGEST_ANSWER
    )
    assert (pruned, unpruned) == (expected.answer, "")
    assert f"| in the cache | {expected.media_tokens.after} |" in table
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    texts = [output[0] for output in job.outputs()]
    assert texts[0] == "" and len(set(texts)) > 2
    assert all(pruned.startswith(text.strip()) for text in texts)


def test_compares_with_the_unpruned_model(
    ask: Callable[..., Any], loaded: LoadedModel, folder: Path
) -> None:
    _, unpruned, table, _ = ask(compare=True).result(timeout=60)
    media = read_media(folder / "sample.mp4", loaded, frames=FRAMES)
    expected = answer(
        loaded, media, "What shape was first?", Recipe(), long_video_qa.LONGEST_ANSWER
    )
    assert unpruned == expected.answer
    assert table.startswith("|  | pruned | unpruned |\n")
    tokens = expected.media_tokens.before
    assert f"| media tokens | {tokens} | {tokens} |" in table
    for row in ("after input", "KV cache", "decode seconds", "per token seconds"):
        assert f"| {row} |" in table


def test_offers_the_sample_video(client: gradio_client.Client) -> None:
    video, question, known = client.predict(api_name="/sample")
    assert Path(video if isinstance(video, str) else video["video"]).stat().st_size > 1000
    assert question.endswith("?")
    assert [question, known["samples"][0][1]] == known["samples"][0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"video": None}, "there is no video; upload one"),
        ({"question": " "}, "question"),
        ({"recipe": "vflowop"}, "vflowop"),
        ({"recipe": "random(keep=2.5)"}, "keep must be"),
    ],
)
def test_asking_fails(ask: Callable[..., Any], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        ask(**asked).result(timeout=60)


def test_a_broken_video_fails(ask: Callable[..., Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken<b>.mp4"
    broken.write_bytes(b"no video" * 100)
    with pytest.raises(gradio_client.exceptions.AppError, match="mp4"):
        ask(broken).result(timeout=60)


def test_unexpected_errors_are_shown_and_do_not_hang(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Answer:
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(long_video_qa, "answer", broken)
        with pytest.raises(gradio_client.exceptions.AppError, match="boom"):
            ask().result(timeout=60)
    assert ask().result(timeout=60)[0]


def test_jobs_wait_for_each_other(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0
    guard = threading.Lock()

    def counted(*arguments: Any) -> Answer:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        try:
            return answer(*arguments)
        finally:
            with guard:
                running -= 1

    monkeypatch.setattr(long_video_qa, "answer", counted)
    jobs = [ask(), ask(recipe="none")]
    assert all(job.result(timeout=60)[0] for job in jobs)
    assert most == 1


def test_the_page_sends_no_analytics(loaded: LoadedModel, folder: Path) -> None:
    assert long_video_qa.build(loaded, folder).analytics_enabled is False


def test_a_missing_gradio_fails(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r'pip install "tokenprune-mm\[demo\]"'):
        long_video_qa.build(loaded)
    with pytest.raises(MissingExtraError, match="gradio"):
        long_video_qa.serve(None, host="127.0.0.1", port=7860)


def test_a_taken_port_fails(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_video_qa, "load_model", lambda name: loaded)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TokenPruneError, match=f"cannot serve on 127.0.0.1:{port}.*--port"):
            long_video_qa.serve(None, host="127.0.0.1", port=port)


# -- the first run


def test_the_first_run_answers_four_questions(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_run, "FRAMES", FRAMES)
    written = (folder / "sample.mp4").stat().st_mtime_ns
    first_run.first_run(folder, str(model))
    assert (folder / "sample.mp4").stat().st_mtime_ns == written
    shown, progress = capsys.readouterr()
    assert max(map(len, shown.replace(str(folder), "out").splitlines())) <= first_run.WIDTH
    _, questions = first_run.sample_video(folder)
    picked = first_run.pick_questions(questions)
    assert len(picked) == 4
    for one in picked:
        assert f"{one['question']}  ({one['kind']})\n" in shown
        assert f"truth     {one['answer']}\n" in shown
    assert shown.count("\nunpruned  ") == shown.count("\npruned    ") == 4
    assert "of 4 with pruning" in shown
    assert f"{folder / 'kept.png'}\n" in shown and (folder / "kept.png").exists()
    assert "asking 4 of 4" in progress and "writing" not in progress


def test_questions_of_different_kinds_are_picked() -> None:
    def question(kind: str, answer: str) -> dict[str, str]:
        return {"question": f"{kind} {answer}", "answer": answer, "kind": kind}

    told = [question("count", "zero"), question("needle", "red"), question("count", "two")]
    told += [question("color", "blue"), question("color", "red"), question("shape", "star")]
    picked = first_run.pick_questions(told)
    assert [one["question"] for one in picked] == ["color blue", "count two", "needle red"]
    assert first_run.pick_questions(told[:1]) == told[:1]


def test_the_sample_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_run, "SECONDS", 3)
    path, questions = first_run.sample_video(tmp_path / "new")
    written = path.stat().st_mtime_ns
    assert first_run.sample_video(tmp_path / "new") == (path, questions)
    assert path.stat().st_mtime_ns == written
    path.with_suffix(".json").unlink()  # as after an interruption
    assert first_run.sample_video(tmp_path / "new") == (path, questions)
    assert path.stat().st_mtime_ns > written


def test_the_first_run_fails_without_the_model(folder: Path) -> None:
    with pytest.raises(TokenPruneError, match="cannot load model"):
        first_run.first_run(folder, "no-such-model")


def test_a_folder_that_cannot_be_made_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MediaError, match="cannot write .*sample.mp4.*choose another folder"):
        first_run.sample_video(tmp_path / "file")
