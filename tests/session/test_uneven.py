"""Videos whose frames do not come evenly: a session answers about them as one `generate` does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.media.clips import encode, x264
from tokenprune import Recipe, Session
from tokenprune.asking import ask
from tokenprune.inputs import read_media
from tokenprune.models import loaded as loaded_module
from tokenprune.models.load import load_model
from tokenprune.plan.outline import outline_media, prompts_in_groups

SLIDES = [0, 1, 2, 3, 4, 5, 300, 301, 302, 303, 600, 601]  # seconds
FAMILIES = ["qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "slides.mp4"
    times = [1000 * second for second in SLIDES]
    return encode(
        path, numbers=range(len(SLIDES)), options=x264("keyint=4:bframes=0"), times=times
    ).path


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What processors are told of videos that are not black."""
    calls: list[dict[str, Any]] = []
    call = loaded_module.call_processor

    def spied(processor: Any, **arguments: Any) -> Any:
        frames = arguments["videos"][0][0] if arguments.get("videos") else None
        if frames is not None and frames.device.type != "meta" and frames.any():
            calls.append(arguments)
        return call(processor, **arguments)

    monkeypatch.setattr(loaded_module, "call_processor", spied)
    return calls


def times(calls: list[dict[str, Any]]) -> list[float]:
    return [time for one in calls for time in one["video_metadata"][0].timestamps]


@pytest.mark.filterwarnings("ignore:.*told one rate")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_session_tells_what_one_prompt_tells(name, checkpoint, slides, told):
    loaded = load_model(str(checkpoint(name)), device="cpu")
    whole = ask(loaded, slides, "what?", recipe=Recipe(), frames=len(SLIDES), max_new_tokens=6)
    (once,) = told
    told.clear()
    with Session(loaded.model, loaded.processor, Recipe(), group=4) as session:
        session.watch(slides, frames=len(SLIDES))
        found = session.ask("what?", max_new_tokens=6)

    assert len(told) == 3
    assert times(told) == times([once]) == pytest.approx(SLIDES, abs=1e-3)
    assert [one["fps"] for one in told] == [once["fps"]] * 3
    assert found.answer == whole.answer
    assert found.media_tokens.before == whole.media_tokens.before
    # What is planned, too.
    prompts, frames = prompts_in_groups(
        loaded, slides, "what?", group=4, frames=len(SLIDES), fps=None
    )
    assert frames == len(SLIDES) and len(prompts) == 4


def test_times_in_words_are_those_of_the_frames(checkpoint, slides):
    loaded = load_model(str(checkpoint("qwen3_vl")), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = loaded.process(read_media(slides, loaded, frames=len(SLIDES)), "what?")
    written = loaded.processor.tokenizer.decode(inputs["input_ids"][0])
    pairs = [(SLIDES[at] + SLIDES[at + 1]) / 2 for at in range(0, len(SLIDES), 2)]
    places = [written.replace(" ", "").find(f"<{time:.1f}seconds>") for time in pairs]
    assert places == sorted(places) and places[0] >= 0


def test_a_model_that_takes_one_rate_is_said_to_be_off(checkpoint, slides, files):
    loaded = load_model(str(checkpoint("qwen2_5_vl")), device="cpu")
    for read in (read_media, outline_media):
        media = read(slides, loaded, frames=len(SLIDES), fps=None, sound=False)
        wanted = r"told one rate for all frames, .*slides\.mp4' do not come evenly.* up to \d{3} s"
        with pytest.warns(UserWarning, match=wanted):
            loaded.process(media, "what?")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.process(read_media(files.video, loaded, frames=8), "what?")
