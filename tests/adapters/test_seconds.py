"""When the frames of a layout are shown: as the model is told, or as whoever read them knows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import SEEING
from tests.contract.test_sessions import REFUSED
from tests.media.clips import encode, x264
from tests.releases import NEWEST
from tokenprune import Session, prune
from tokenprune.asking import ask
from tokenprune.core.layout import TokenLayout
from tokenprune.errors import MediaError, UnsupportedModelError
from tokenprune.inputs import read_media
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.plan.planning import plan
from tokenprune.report.answer import Answer
from tokenprune.testing.tiny.releases import RELEASE

RATE = 2
FRAMES = 5  # of 9; where two are joined the last one stands alone

TOLD = {
    # What the processor writes before the tokens of a frame, or behind them.
    "glm4v": (r"^<\|end_of_image\|>(\d+)", int),  # whole seconds, rounded down
    "qwen3_vl": (r"<(\d+\.\d) seconds><\|vision_start\|>$", lambda seconds: round(seconds, 1)),
    "qwen3_vl_moe": (r"<(\d+\.\d) seconds><\|vision_start\|>$", lambda seconds: round(seconds, 1)),
    "video_llama_3": (r"Time (\d+\.\d)s:$", lambda seconds: round(seconds, 1)),
}
JOINED = ("glm4v", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
"""Families that make one frame of two pictures, and are told no number for it."""
COUNTED = ("qwen2_5_vl", "qwen2_5_omni", "qwen3_omni_moe")
"""Families that are told a rate."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine frames, two a second."""
    folder = tmp_path_factory.mktemp("clip")
    options = x264("keyint=4")
    return encode(folder / "clip.mp4", numbers=range(9), options=options, rate=RATE).path


@pytest.fixture(scope="module")
def loaded(checkpoint: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    return cache(lambda name: load_model(str(checkpoint(name)), device="cpu"))


def asked(loaded: LoadedModel, path: Path, **settings: Any) -> Answer:
    return ask(loaded, path, "what?", max_new_tokens=1, **{"frames": FRAMES, **settings})


def layout_of(answer: Answer) -> TokenLayout:
    (layout,) = answer.report.last.layouts
    return layout


@pytest.mark.parametrize("name", sorted(TOLD))
def test_seconds_are_those_in_the_prompt(name: str, clip: Path, loaded: Any) -> None:
    model = loaded(name)
    layout = layout_of(asked(model, clip, recipe="none"))
    ids = model.encode(read_media(clip, model, frames=FRAMES), "what?")["input_ids"][0]
    pattern, rounded = TOLD[name]
    frames = layout.frame.unique().tolist()
    assert frames == list(range(len(frames))) and len(frames) == (3 if name in JOINED else 5)
    for frame in frames:
        here = layout[layout.frame == frame]
        (seconds,) = here.seconds.unique().tolist()
        first, last = int(here.position[0]), int(here.position[-1])
        part = ids[last + 1 :] if pattern.startswith("^") else ids[:first]
        found = re.search(pattern, model.processor.tokenizer.decode(part))
        assert found is not None and rounded(seconds) == pytest.approx(float(found[1]))


@pytest.mark.parametrize("name", SEEING)
def test_every_token_of_a_video_has_its_time(name: str, clip: Path, loaded: Any) -> None:
    model = loaded(name)
    video = read_media(clip, model, frames=FRAMES).video
    assert video is not None
    layout = layout_of(asked(model, clip, recipe="none"))
    times = video.pts_seconds
    assert times.tolist() == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0], abs=0.51)
    if name in COUNTED:
        expected = torch.arange(3) * 2 * 9 / RATE / FRAMES
    elif name.startswith("qwen3"):
        expected = torch.stack([times[:2].mean(), times[2:4].mean(), times[4]])
    else:
        expected = times[::2] if name in JOINED else times
    # A family that knows no video has the frames as images.
    number = layout.frame if int(layout.frame.max()) >= 0 else layout.item
    torch.testing.assert_close(layout.seconds, expected.double()[number])


GROUPED = ["glm4v", "llava_next", "llava_onevision", *COUNTED, "qwen3_vl"]


@pytest.mark.parametrize("name", [name for name in GROUPED if name in SEEING])
def test_groups_go_on_where_the_last_one_ended(name: str, clip: Path, loaded: Any) -> None:
    model = loaded(name)
    assert name not in REFUSED
    whole = layout_of(asked(model, clip, frames=9, recipe="none"))
    with Session(model.model, model.processor, "none", group=4) as session:
        try:
            session.watch(clip, frames=9)
        except UnsupportedModelError as error:
            assert RELEASE < NEWEST and "install a newer release" in str(error)
            return
        groups = torch.cat([call.layouts[0].seconds for call in session.report.calls])
        torch.testing.assert_close(groups, whole.seconds)
        session.watch(clip, frames=9)  # the same again, after it
        again = torch.cat([call.layouts[0].seconds for call in session.report.calls[-3:]])
    # The second time a half-filled pair of frames lies between the two.
    torch.testing.assert_close(again, whole.seconds + 9 / RATE)


def test_frames_that_arrive_have_the_times_of_their_rate(loaded: Any) -> None:
    model = loaded("qwen3_vl")
    frames = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    with Session(model.model, model.processor, "none", group=2) as session:
        session.watch(frames, fps=4.0)
        session.watch(frames)
        seconds = [call.layouts[0].seconds.unique().tolist() for call in session.report.calls]
    assert seconds == [[0.125], [0.625], [1.125]]


def test_frames_of_a_varying_rate_have_their_own_times(tmp_path: Path, loaded: Any) -> None:
    times = [0, 100, 1000, 3000, 3500, 5000]
    path = encode(tmp_path / "clip.mkv", numbers=range(6), times=times, options=x264("")).path
    for name, expected in (("qwen3_vl", [0.05, 2.0, 4.25]), ("video_llama_3", None)):
        layout = layout_of(asked(loaded(name), path, frames=6, recipe="none"))
        found = layout.seconds.unique().tolist()
        assert found == pytest.approx(expected or [one / 1000 for one in times], abs=0.01)
    with Session(*session_of(loaded("qwen3_vl")), "none", group=2) as session:
        session.watch(path, frames=6)
        seconds = [float(call.layouts[0].seconds[0]) for call in session.report.calls]
    assert seconds == pytest.approx([0.05, 2.0, 4.25], abs=0.01)


def session_of(loaded: LoadedModel) -> tuple[Any, Any]:
    return loaded.model, loaded.processor


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
def test_budgets_of_a_second_are_planned_and_kept(
    name: str, clip: Path, checkpoint: Any, command: Any
) -> None:
    recipe = "uniform(keep=3 per=second)"
    options = [clip, "--model", checkpoint(name), "--frames", 9, "--recipe", recipe, "--json"]
    planned = json.loads(command("plan", *options).out)
    command_line = ("ask", options[0], "what?", *options[1:], "--max-new-tokens", 1)
    found = json.loads(command(*command_line).out)

    assert planned["exact"] and planned["media_tokens"] == found["media_tokens"]
    # Frames lie at 0, 0.5, ... 4; of pairs the middles at 0.25, 1.25, ..., 4.
    assert found["media_tokens"]["after"] == 3 * 5
    path, model = str(clip), str(checkpoint(name))
    assert plan(path, model, frames=9, recipe=recipe).media_tokens.after == 3 * 5


# -- handed in


def prompts(loaded: LoadedModel, clips: list[Tensor]) -> dict[str, Any]:
    """A batch of prompts, one clip each."""
    text = loaded.prompt([{"type": "video"}], "what?")
    metadata = [
        {"fps": 2.0, "total_num_frames": len(one), "frames_indices": list(range(len(one)))}
        for one in clips
    ]
    inputs = loaded.processor(
        text=[text] * len(clips),
        videos=clips,
        video_metadata=metadata,
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )
    return dict(inputs)


def test_a_batch_takes_the_times_of_each_clip(loaded: Any) -> None:
    model = loaded("qwen3_vl")
    clips = [torch.randint(0, 256, (n, 3, 56, 56), dtype=torch.uint8) for n in (4, 2)]
    inputs = prompts(model, clips)
    seconds = [[10.0, 10.5, 11.0, 11.5], torch.tensor([20.0, 21.0])]
    for beams in (1, 2):
        with torch.no_grad(), prune(model.model, "none", frame_seconds=seconds) as report:
            model.model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=beams)
        rows = [layout.seconds.unique().tolist() for layout in report.last.layouts]
        assert rows == [[10.25, 11.25]] * beams + [[20.5]] * beams


def test_without_them_seconds_are_unknown(loaded: Any) -> None:
    model = loaded("qwen3_vl")
    inputs = prompts(model, [torch.zeros(4, 3, 56, 56, dtype=torch.uint8)])
    with torch.no_grad(), prune(model.model, "none") as report:
        model.model.generate(**inputs, max_new_tokens=1)
    assert report.last.layouts[0].seconds.isnan().all()


def test_what_the_model_is_told_comes_first(loaded: Any) -> None:
    model = loaded("qwen2_5_vl")
    inputs = prompts(model, [torch.zeros(4, 3, 56, 56, dtype=torch.uint8)])
    told = float(torch.as_tensor(inputs["second_per_grid_ts"])[0])
    with torch.no_grad(), prune(model.model, "none", frame_seconds=[[5.0] * 4]) as report:
        model.model.generate(**inputs, max_new_tokens=1)
    assert report.last.layouts[0].seconds.unique().tolist() == [0.0, told]


def test_a_prompt_without_clips_needs_none(loaded: Any, files: Any) -> None:
    model = loaded("qwen3_vl")
    inputs = model.encode(read_media(files.image, model), "what?")
    with torch.no_grad(), prune(model.model, "none", frame_seconds=[[0.0, 1.0]]) as report:
        model.model.generate(**inputs, max_new_tokens=1)
    assert report.last.layouts[0].seconds.isnan().all()


@pytest.mark.parametrize(
    ("seconds", "error"),
    [
        ([], "the times of 0 videos, but the prompt has 1; give one list for each video"),
        ([[0.0] * 4] * 2, "the times of 2 videos, but the prompt has 1"),
        ([[0.0] * 2], "has 2 times for a clip that the model sees as 2 frames; give one time for"),
        ([[0.0] * 6], "has 6 times for a clip that the model sees as 2 frames"),
        ([0.0, 0.5, 1.0, 1.5], r"must hold a list of seconds for each clip, .* got \[0.0, 0.5"),
        (1.0, "must hold a list of seconds for each clip"),
        ([[]], r"must hold a list of seconds for each clip, .* got \[\[\]\]"),
        ([[0.0, float("nan")]], "must hold a list of seconds for each clip"),
        ([["a", "b"]], "must hold a list of seconds for each clip"),
    ],
)
def test_times_that_do_not_fit_fail(seconds: Any, error: str, loaded: Any) -> None:
    model = loaded("qwen3_vl")
    inputs = prompts(model, [torch.zeros(4, 3, 56, 56, dtype=torch.uint8)])
    with (
        pytest.raises(MediaError, match=error),
        prune(model.model, "none", frame_seconds=seconds),
    ):
        model.model.generate(**inputs, max_new_tokens=1)
