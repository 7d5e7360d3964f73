"""Decoding while the model computes: sessions that watch files, `ask` in groups, timelines."""

from __future__ import annotations

import json
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tests.releases import WATCHER
from tokenprune import Session
from tokenprune.asking import ask
from tokenprune.errors import MediaError, MissingExtraError, RecipeError, TokenPruneError
from tokenprune.eval.bench.overlap import Bench, Round, build, summary
from tokenprune.media import VideoReader, index_video
from tokenprune.media.decode.plan import plan_units
from tokenprune.media.sampling import FrameRequest
from tokenprune.models.load import load_model
from tokenprune.report.seconds import Phases
from tokenprune.report.timeline import Timeline
from tokenprune.report.timing import Clock, Mark

RECIPE = "uniform(keep=0.5)"


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_model(str(checkpoint(WATCHER)), device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """80 frames in 8 groups of pictures, each of which refers to the one before only."""
    from tests.media.clips import encode, x264

    path = tmp_path_factory.mktemp("overlap") / "clip.mp4"
    return encode(path, numbers=range(80), options=x264("keyint=10:bframes=0:scenecut=0")).path


def length(spans):
    """Seconds covered by spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


# -- decoding ahead


def slow(model, seconds):
    """Let a model's first decoder layer take its time, without the interpreter's lock."""
    return model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_groups_are_decoded_while_those_before_are_prefilled(loaded, clip):
    hook = slow(loaded.model, 0.4)
    try:
        with Session(loaded.model, loaded.processor, RECIPE, group=8) as session:
            session.watch(clip, frames=48)
            groups = session.groups
    finally:
        hook.remove()

    assert len(groups) == 6
    (first,) = groups[0].phases.prefill
    for ahead in groups[1:4]:  # three groups are decoded ahead
        assert max(end for _, end in ahead.phases.decode) < first[1]
    for before, group in zip(groups, groups[4:], strict=False):
        # There is room for no more before the next one is taken.
        (busy,) = before.phases.prefill
        assert max(end for _, end in group.phases.decode) > busy[1]
    for group in groups[1:]:
        assert group.seconds.decode < 0.2
        assert group.seconds.prefill > 0.4


def test_an_error_stops_the_workers_at_once(loaded, clip):
    def fail(*_):
        raise RuntimeError("out of memory")

    hook = loaded.model.get_decoder().layers[2].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory") as caught:
            Session(loaded.model, loaded.processor, RECIPE, group=4).watch(clip, frames=80)
    finally:
        hook.remove()

    assert caught.tb is not None  # which holds the frames of the failed call
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("tokenprune-decode") for name in names)


def test_processes_may_decode(loaded, clip):
    found = {}
    for kind in ("thread", "process"):
        with Session(loaded.model, loaded.processor, RECIPE, group=8) as session:
            session.watch(clip, frames=24, worker_kind=kind)
            answer = session.generate("what?", max_new_tokens=4)
            found[kind] = answer, session.pictures_decoded
    assert torch.equal(found["thread"][0], found["process"][0])
    assert found["thread"][1] == found["process"][1]


def test_frames_need_no_workers(loaded):
    session = Session(loaded.model, loaded.processor, RECIPE, group=4)
    frames = torch.zeros(4, 3, 56, 56, dtype=torch.uint8)
    with pytest.raises(MediaError, match="workers=2 go with a file; leave them out"):
        session.watch(frames, fps=1.0, workers=2)
    with pytest.raises(MediaError, match="worker_kind='process' go with a file"):
        session.watch(frames, fps=1.0, worker_kind="process")


# -- what is counted


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("frames", [1, 7, 40])
def test_no_more_is_decoded_and_read_than_planned(workers, frames, loaded, clip, monkeypatch):
    monkeypatch.setattr("tokenprune.media.decode.demux.SEEK_GAP_BYTES", -1)  # pass over nothing
    index = index_video(clip)
    ranks = FrameRequest(frames).ranks(index)
    units = plan_units(index, np.unique(ranks), workers)
    # Each picture refers to the one before only: all up to the wanted one must be decoded.
    pictures = sum(unit.last - unit.first + 1 for unit in units)
    size = sum(unit.size_bytes for unit in units)
    with Session(loaded.model, loaded.processor, RECIPE, group=4) as session:
        session.watch(clip, frames=frames, workers=workers)
        assert (session.pictures_decoded, session.bytes_read) == (pictures, size)
        session.watch(clip, frames=frames, workers=workers)
        assert session.as_dict()["pictures_decoded"] == 2 * pictures
        assert session.as_dict()["bytes_read"] == 2 * size
        assert session.ask("what?", max_new_tokens=1).bytes_read == 2 * size


def test_ask_counts_what_was_planned(loaded, clip, monkeypatch):
    monkeypatch.setattr("tokenprune.media.decode.demux.SEEK_GAP_BYTES", -1)
    reader = VideoReader(clip)
    video = reader.read(frames=7)
    units = plan_units(reader.index, video.indices.numpy(), 1)
    for group in (None, 4):
        found = ask(loaded, clip, "what?", recipe=RECIPE, frames=7, group=group, max_new_tokens=1)
        assert found.pictures_decoded == sum(unit.last - unit.first + 1 for unit in units)
        assert found.bytes_read == sum(unit.size_bytes for unit in units)
        assert found.as_dict()["bytes_read"] == found.bytes_read


def test_a_picture_is_not_decoded(loaded, files):
    found = ask(loaded, files.image, "what?", recipe=RECIPE, max_new_tokens=1)

    assert (found.pictures_decoded, found.bytes_read) == (0, 0)
    (group,) = found.timeline.groups
    assert not group.decode and len(group.process) == len(group.prefill) == 1


# -- asking in groups


def test_asking_in_groups_is_watching_and_asking(loaded, files):
    with Session(loaded.model, loaded.processor, RECIPE, group=4) as session:
        session.watch(files.silent, frames=7)
        expected = session.ask("what?", max_new_tokens=4)
    found = ask(loaded, files.silent, "what?", recipe=RECIPE, frames=7, group=4, max_new_tokens=4)
    whole = ask(loaded, files.silent, "what?", recipe=RECIPE, frames=7, max_new_tokens=4)

    for name in ("answer", "media_tokens", "frames", "recipe"):
        assert getattr(found, name) == getattr(expected, name)
    one, other = found.as_dict(), whole.as_dict()
    assert one.keys() == other.keys()
    for name in ("media_tokens", "seconds", "kv_bytes"):
        assert one[name].keys() == other[name].keys()
    assert found.media_tokens.before == whole.media_tokens.before
    # The question counts, which a session forgets again.
    assert found.kv_bytes == whole.kv_bytes
    assert found.kv_bytes.after > expected.kv_bytes.after
    assert len(found.report.calls) == len(found.timeline.groups) == 2
    assert len(found.seconds.as_dict()) == 5 and min(found.seconds.as_dict().values()) > 0
    assert found.seconds.prefill > expected.seconds.prefill  # not of the question alone


def test_ask_in_groups_from_the_command_line(command, checkpoint, files, tmp_path):
    picture = tmp_path / "when.png"
    arguments = ["--model", checkpoint(WATCHER), "--max-new-tokens", 2, "--group", 4]
    arguments += ["--frames", 7, "--compare", "--timeline", picture]
    ran = command("ask", files.video, "what?", *arguments, "--json")

    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["recipe"] == "vflowopt(keep=0.25)" and found["unpruned"]["recipe"] == "none"
    assert found["media_tokens"]["after"] < found["unpruned"]["media_tokens"]["after"]
    assert [list(group) for group in found["timeline"]] == [list(Phases().as_dict())] * 2
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and drawn.width > drawn.height
    table = command("ask", files.video, "what?", *arguments)
    assert str(picture) in table.err
    assert "media tokens" in table.out and " pictures" in table.out


def test_watching_draws_its_timeline(command, checkpoint, files, tmp_path):
    picture, kept = tmp_path / "when.png", tmp_path / "kept.safetensors"
    arguments = ["--save", kept, "--model", checkpoint(WATCHER), "--timeline", picture]
    ran = command("watch", files.video, *arguments, "--json")

    assert ran.code == 0 and picture.exists()
    found = json.loads(ran.out)
    assert len(found["timeline"]) == len(found["groups"]) == 4
    assert found["pictures_decoded"] >= 30 and found["bytes_read"] > 0
    asked = json.loads(command("ask", kept, "what?", "--max-new-tokens", 1, "--json").out)
    assert asked["timeline"] == found["timeline"]
    assert asked["pictures_decoded"] == found["pictures_decoded"]


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--group", 0], "--group must be at least 1, got 0"),
        (["--group", 4, "--overlay", "kept.png"], "leave out --overlay or --group"),
        (["--group", 4, "--recipe", "plphp(keep=0.5)"], "plphp decides by the question"),
        (["--timeline", "when.txt"], "use .png, .jpg or .webp"),
        (["--timeline", "/nowhere/when.png"], "give a file in a folder that exists"),
    ],
)
def test_a_bad_request_fails_before_anything_is_loaded(
    arguments, error, command, files, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    ran = command("ask", files.video, "what?", *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert error in ran.error


def test_what_cannot_be_watched_in_groups_is_refused(loaded, checkpoint, files):
    def grouped(one, file, recipe=RECIPE, **settings):
        return ask(one, file, "what?", recipe=recipe, frames=7, group=4, **settings)

    with pytest.raises(RecipeError, match="plphp decides by the question"):
        grouped(loaded, files.video, recipe="plphp(keep=0.5)")
    with pytest.raises(MediaError, match="is an image: it has no groups of frames; leave out"):
        grouped(loaded, files.image)
    with pytest.raises(MediaError, match="has no video stream"):
        grouped(loaded, files.sound)
    with pytest.raises(TokenPruneError, match="a multiple of 2"):
        ask(loaded, files.video, "what?", recipe=RECIPE, group=3)
    with pytest.raises(TokenPruneError, match="must have words"):
        ask(loaded, files.video, " ", recipe=RECIPE, group=4)
    numbered = load_model(str(checkpoint("internvl")), device="cpu")
    with pytest.raises(TokenPruneError, match="writes groups of frames otherwise"):
        grouped(numbered, files.silent)
    deaf = load_model(str(checkpoint("qwen2_audio")), device="cpu")
    with pytest.raises(TokenPruneError, match="understands sound only"):
        grouped(deaf, files.video)


def test_a_sound_track_is_not_left_out_silently(checkpoint, files):
    one = load_model(str(checkpoint("qwen2_5_omni")), device="cpu")
    settings = {"recipe": RECIPE, "frames": 6, "group": 4, "max_new_tokens": 1}
    with pytest.raises(MediaError, match="would hear the sound track .* leave out the sound, or"):
        ask(one, files.video, "what?", **settings)
    found = ask(one, files.video, "what?", sound=False, **settings)
    assert found.frames == 6
    assert ask(one, files.silent, "what?", **settings).frames == 6


# -- timelines


def test_phases_of_a_group_follow_each_other(loaded, files):
    began = time.perf_counter()
    with Session(loaded.model, loaded.processor, RECIPE, group=4) as session:
        session.watch(files.video, frames=10)
        timeline = session.timeline
    spent = time.perf_counter() - began

    assert len(timeline.groups) == 3
    previous = 0.0
    for phases, group in zip(timeline.groups, session.groups or [None] * 3, strict=True):
        decoded = max(end for _, end in phases.decode)
        (process,), (prefill,) = phases.process, phases.prefill
        encode = phases.encode
        assert 0 < decoded <= process[0] < process[1] <= encode[0][0]
        assert encode[-1][1] <= prefill[0] < prefill[1] < spent
        assert previous <= process[0]  # the model does one thing at a time
        previous = prefill[1]
        if group is not None:
            assert length(encode) == pytest.approx(group.seconds.encode, abs=1e-4)
            assert length([prefill]) == pytest.approx(group.seconds.prefill, abs=1e-4)
    listed = timeline.as_list()
    assert json.loads(json.dumps(listed)) == listed
    assert listed[1]["prefill"][0] == pytest.approx(timeline.groups[1].prefill[0], abs=1e-6)


def test_the_clock_of_a_loaded_session_goes_on(loaded, files, tmp_path):
    with Session(loaded.model, loaded.processor, RECIPE, group=4) as session:
        session.watch(files.silent, frames=7)
        session.save(tmp_path / "kept.safetensors")
        saved = session.timeline.as_list()
    path = tmp_path / "kept.safetensors"
    with Session.load(path, loaded.model, loaded.processor) as session:
        assert session.timeline.as_list() == saved
        session.watch(files.silent, frames=7)
        whole = session.timeline
    for before, after in pairwise(whole.groups):
        assert before.prefill[0][1] < after.process[0][0]


def test_frames_at_once_are_one_group(loaded, files):
    found = ask(loaded, files.video, "what?", recipe=RECIPE, frames=6, max_new_tokens=1)
    (group,) = found.timeline.groups

    assert min(begin for begin, _ in group.decode) == 0
    assert group.decode[-1][1] <= group.process[0][0] <= group.encode[0][0]
    assert length(group.prefill) == pytest.approx(found.seconds.prefill, abs=1e-4)


def test_a_clock_shows_one_time_for_all():
    module = torch.nn.Linear(1, 1)
    clock = Clock(module, at=5.0)
    before = clock.of_host(time.perf_counter())
    mark = clock.of(Mark(module))
    after = clock.of_host(time.perf_counter())
    assert 5.0 < before < mark < after < 6.0


def bars(*spans):
    return Phases(decode=spans)


def colours(picture):
    """Colours of the bars, without grey."""
    pixels = np.asarray(picture).reshape(-1, 3).astype(int)
    vivid = pixels[pixels.max(1) - pixels.min(1) > 60]
    found, counts = np.unique(vivid, axis=0, return_counts=True)
    return {tuple(one) for one, count in zip(found.tolist(), counts, strict=True) if count > 500}


def test_the_chart_has_a_bar_for_each_span():
    picture = Timeline((bars((0.0, 1.0)), bars((1.0, 2.0)))).picture()
    values = np.asarray(picture).astype(int)
    vivid = values.max(2) - values.min(2) > 60
    rows, columns = np.nonzero(vivid)

    assert len(colours(picture)) == 2  # a colour for each group
    # One line of four is filled, from the beginning to the end of the time.
    assert rows.max() - rows.min() < picture.height / 4
    assert columns.max() - columns.min() > 0.85 * picture.width


def test_bars_at_one_time_lie_above_each_other():
    apart = Timeline((bars((0.0, 1.0)), bars((1.0, 2.0)))).picture()
    beside = Timeline((bars((0.0, 2.0)), bars((0.0, 2.0)))).picture()

    def filled(picture):
        values = np.asarray(picture).astype(int)
        return values.max(2) - values.min(2) > 60

    def tallest(picture):
        """Pixels that a bar is high."""
        column = picture.width // 3
        vivid = np.asarray(picture)[filled(picture)[:, column], column]
        return np.unique(vivid, axis=0, return_counts=True)[1].max()

    assert len(colours(beside)) == 2
    assert filled(beside).sum() == pytest.approx(filled(apart).sum(), rel=0.1)
    assert tallest(beside) < 0.7 * tallest(apart)


def test_nothing_timed_fails(tmp_path):
    with pytest.raises(MediaError, match="nothing was timed"):
        Timeline().save(tmp_path / "when.png")
    with pytest.raises(MediaError, match=r"use \.png"):
        Timeline((bars((0.0, 1.0)),)).save(tmp_path / "when.txt")


def test_without_matplotlib_it_fails_with_the_remedy(monkeypatch, command, files):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingExtraError, match=r'pip install "tokenprune-mm\[plot\]"'):
        Timeline((bars((0.0, 1.0)),)).picture()
    ran = command("ask", files.video, "what?", "--timeline", "when.png")
    assert ran.code == 2 and "timelines need matplotlib" in ran.error


# -- the bench


@pytest.mark.parametrize("number", [0, 1])
def test_a_round_of_the_bench(number, clip):
    bench = Bench(build(), clip, frames=8, group=4, recipe=RECIPE, workers=1)
    one, timeline = bench.round(number)

    assert 0 < one.first_group < one.decode
    assert 0 < one.model < one.compute
    assert len(timeline.groups) == 2
    assert 0 < timeline.groups[-1].prefill[0][1] < one.whole


def test_the_goal_of_the_bench():
    rounds = [Round(1.0, 0.1, 3.0, 2.0, 2.3), Round(3.0, 0.3, 3.0, 2.0, 3.3)]
    found = summary([*rounds, Round(2.0, 0.2, 1.5, 1.0, 2.6)])

    assert found["whole"] == 2.6 and found["one_after_the_other"] == 2.0 + 3.0
    assert found["limit"] == pytest.approx(1.10 * 2.0 + 0.2)  # of medians: 2 decoding, 2 computing
    assert found["over_longer"] == pytest.approx((2.6 - 0.2) / 2.0)


# -- copies to an accelerator


def test_copies_to_an_accelerator_are_pinned_and_awaited_by_no_one(loaded, files, monkeypatch):
    """Without one here, its place is taken by a device that only its name tells."""
    log = []

    def pin(self):
        log.append("pin")
        return self

    def move(self, device, dtype=None, **settings):
        log.append((str(device), dtype, settings))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", move)
    monkeypatch.setattr(type(loaded.model), "device", torch.device("cuda", 0))
    pixels, ids = torch.zeros(2, 2), torch.zeros(1, 2, dtype=torch.long)
    loaded.place(pixels)
    loaded.place(ids)

    assert log == [
        "pin",
        ("cuda:0", None, {"non_blocking": True}),
        ("cuda:0", torch.float32, {}),
        "pin",
        ("cuda:0", None, {"non_blocking": True}),
        ("cuda:0", torch.int64, {}),
    ]
