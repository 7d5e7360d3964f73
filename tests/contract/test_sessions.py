"""Contracts of sessions: a video watched in groups is the video watched at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import CHECKPOINTS, SEEING
from tests.contract.doubles import Half
from tests.contract.memory import Watch
from tests.engine.test_sequence import Count
from tests.engine.test_sequence import Counting as AnyCounting
from tokenprune import Session
from tokenprune.core.context import Lifetime
from tokenprune.core.recipe import Recipe
from tokenprune.core.registry import METHODS, register
from tokenprune.core.signal import Attention
from tokenprune.core.site import Cache
from tokenprune.engine.state import cache_from_state
from tokenprune.errors import UnsupportedModelError
from tokenprune.inputs import read_media
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.session.file import read as read_file
from tokenprune.testing.harness import codes_of, generate, logits_of
from tokenprune.testing.oracle import assert_close, dense_logits, positions_logged, read_decisions
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import Tiny, decoder_of
from tokenprune.testing.tiny.releases import OLD

QUESTION = "what is it?"
FRAMES = 7  # with groups of 4 the last one is short, and odd where two frames are joined

SHORT = ("gemma3", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
"""Families of the short suite: images that see ahead, a closing newline, M-RoPE, timestamps."""

REFUSED = {
    # What the processor writes of a group depends on other groups.
    "internvl": "it numbers the frames",
    "smolvlm": "it says how many frames there are",
    "video_llama_3": "it leaves out what a frame has in common with the one before",
}
NO_CHAT = ("phi4_multimodal",)

RECIPES = [
    "uniform(keep=0.5)",
    "random(keep=0.5 at=cache)",
    "uniform(keep=0.8) + random(keep=0.7 at=1) + random(keep=0.6 at=3) + random(keep=0.5 at=cache)",
    "vflowopt(keep=0.5)",
]

families = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SHORT else (pytest.mark.full,))
        for name in SEEING
        if name not in (*REFUSED, *NO_CHAT)
    ],
)


@dataclass(frozen=True)
class Watched:
    """A family, a video, and what the unpruned model says of all of it at once."""

    loaded: LoadedModel
    video: Path
    inputs: dict[str, Any]
    output: Any
    positions: Tensor | None

    def session(self, recipe: str | Recipe = "none", group: int = 4) -> Session:
        """A session that has watched the video."""
        session = Session(self.loaded.model, self.loaded.processor, recipe, group=group)
        session.watch(self.video, frames=FRAMES)
        return session

    @property
    def tiny(self) -> Tiny:
        """The model, as the harness takes it."""
        suppressed = self.loaded.model.generation_config.suppress_tokens
        return Tiny(self.loaded.name, self.loaded.model, suppressed, lambda *_: {})


@pytest.fixture(scope="module")
def watched(checkpoint: Callable[[str], Path], files: Any) -> Iterator[Callable[[str], Watched]]:
    """Gives the unpruned answer of a family."""

    @cache
    def run(name: str) -> Watched:
        loaded = load_model(str(checkpoint(name)), device="cpu")
        media = read_media(files.silent, loaded, frames=FRAMES)
        inputs = loaded.encode(media, QUESTION)
        one = Tiny(
            name, loaded.model, loaded.model.generation_config.suppress_tokens, lambda *_: {}
        )
        with positions_logged(decoder_of(loaded.model)) as log:
            output = generate(one, inputs)
        return Watched(loaded, files.silent, inputs, output, log.whole())

    yield run
    run.cache_clear()


def ask(session: Session, question: str = QUESTION, **settings: Any) -> Any:
    """Six greedy tokens with their logits."""
    return session.generate(
        question,
        **{
            "max_new_tokens": 6,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            **settings,
        },
    )


def same(one: Any, other: Any) -> bool:
    """Bit-identical generations."""
    return torch.equal(one.sequences, other.sequences) and torch.equal(
        logits_of(one), logits_of(other)
    )


@families
def test_watching_in_groups_is_watching_at_once(name: str, watched: Any) -> None:
    run = watched(name)
    with run.session() as session:
        with positions_logged(decoder_of(run.loaded.model)) as log:
            output = ask(session)
        assert len(session.groups) == 2

    assert torch.equal(output.sequences, run.output.sequences)
    assert_close(logits_of(output), logits_of(run.output))
    if run.positions is not None:  # those of the question and of the answer
        found = log.whole()
        assert found is not None
        assert torch.equal(found, run.positions[..., -found.shape[-1] :])


@families
@pytest.mark.parametrize("group", [2, 6, 8])
def test_the_size_of_the_groups_plays_no_part(name: str, group: int, watched: Any) -> None:
    run = watched(name)
    with run.session(group=group) as session:
        output = ask(session)

    assert torch.equal(output.sequences, run.output.sequences)
    assert_close(logits_of(output), logits_of(run.output))


@families
@pytest.mark.parametrize("recipe", RECIPES)
def test_pruned_groups_are_the_oracle(name: str, recipe: str, watched: Any) -> None:
    run = watched(name)
    if "cache" in recipe and name == "gemma3":
        pytest.skip("its layers have sliding windows, whose caches are left alone")
    try:
        session = run.session(recipe)
    except UnsupportedModelError as error:
        assert recipe.startswith("vflowopt") and "encoder" in str(error)
        return
    with session:
        output = ask(session)
        calls, groups = list(session.report.calls), session.groups

    assert len(calls) == len(groups) == 2
    assert all(group.media_tokens.after < group.media_tokens.before for group in groups)
    read = output.sequences[:, :-1]
    heads = decoder_of(run.loaded.model).config.num_key_value_heads
    codes = codes_of(run.tiny, recipe)
    replay = read_decisions(calls, 1, read.shape[1], heads, codes)
    # The positions of the unpruned answer are those of any answer of its length.
    expected = dense_logits(run.loaded.model, run.inputs, read, replay, run.positions)
    prompt = run.inputs["input_ids"].shape[1]
    assert_close(logits_of(output), expected[:, prompt - 1 :])
    assert float((logits_of(output)[:, 0] - logits_of(run.output)[:, 0]).abs().max()) > 1e-3


@dataclass(frozen=True, eq=False)
class Counting(AnyCounting):
    """Counts over the groups of a session."""

    lives: Lifetime = "sequence"

    name = "counting"


@dataclass(frozen=True, kw_only=True)
class Late(Half):
    """Half of what is stored, for each question."""

    at: Cache = Cache(after="prefill")
    signal: Attention | None = Attention(queries="text", reduce="mean", heads="mean")

    name = "late"


LATE = {
    "keys": Half(at=Cache(after="prefill")),
    "question": Half(
        at=Cache(after="prefill"),
        signal=Attention(queries="text", reduce="mean", heads="mean"),
    ),
    "decode": Half(
        at=Cache(after="decode", every=2),
        signal=Attention(queries="since", reduce="mean", heads="mean"),
    ),
}
"""Stages that act on a question's branch alone."""


@families
@pytest.mark.parametrize("late", LATE)
def test_what_acts_on_a_question_s_branch_is_the_oracle(
    name: str, late: str, watched: Any, tmp_path: Path
) -> None:
    run = watched(name)
    if name == "gemma3":
        pytest.skip("its layers have sliding windows, whose caches are left alone")
    recipe = Recipe("uniform(keep=0.8) + random(keep=0.7 at=cache)", LATE[late])
    heads = decoder_of(run.loaded.model).config.num_key_value_heads
    with run.session(recipe) as session:
        before = session.kv_bytes
        first = ask(session)
        asked = session.asked
        assert asked is not None
        decided = [one for call in asked.calls for one in call.decisions if one.method == "half"]
        assert decided and all(one.of_sequence for one in decided)
        assert all(one.method != "half" for call in session.report.calls for one in call.decisions)
        read = first.sequences[:, :-1]
        codes = codes_of(run.tiny, recipe)
        replay = read_decisions(asked.calls, 1, read.shape[1], heads, codes)
        expected = dense_logits(run.loaded.model, run.inputs, read, replay, run.positions)
        prompt = run.inputs["input_ids"].shape[1]
        assert_close(logits_of(first), expected[:, prompt - 1 :])
        # It is taken back with the question.
        assert session.kv_bytes == before and same(ask(session), first)
        other = ask(session, "and what else?")
        assert same(ask(session), first) and not torch.equal(other.sequences, first.sequences)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n < 10 else (pytest.mark.full,)) for n in range(60)]
)
def test_sessions_made_up_by_chance_are_the_oracle(seed: int, watched: Any) -> None:
    """Groups of a session, groups within them, and stages on a question's branch."""
    draw = random.Random(seed)
    names = [one for one in SHORT if one != "gemma3"]
    run = watched(draw.choice(names))
    steps: list[Any] = draw.sample(
        [
            f"uniform(keep={draw.choice([0.5, 0.8])} per={draw.choice(['prompt', 'frame'])})",
            f"random(keep=0.7 at={draw.randint(0, 4)})",
            "knorm(keep=0.6)",
            "random(keep=0.6 at=cache)",
            "divprune(keep=0.7)",
            *LATE.values(),
        ],
        draw.randint(1, 4),
    )
    within = draw.choice(["none", "groups(size=2)", "groups(size=5 per=token)"])
    recipe = Recipe(within, *steps)
    with run.session(recipe, group=draw.choice([2, 4, 6])) as session:
        output = ask(session)
        assert same(ask(session), output)
        asked = session.asked
    assert asked is not None
    read = output.sequences[:, :-1]
    heads = decoder_of(run.loaded.model).config.num_key_value_heads
    replay = read_decisions(asked.calls, 1, read.shape[1], heads, codes_of(run.tiny, recipe))
    expected = dense_logits(run.loaded.model, run.inputs, read, replay, run.positions)
    prompt = run.inputs["input_ids"].shape[1]
    assert_close(logits_of(output), expected[:, prompt - 1 :])


@families
def test_state_of_a_sequence_goes_on_over_groups_and_files(
    name: str, watched: Any, tmp_path: Path
) -> None:
    run = watched(name)
    stage = Counting()
    recipe = Recipe(stage, "uniform(keep=0.8)")
    with run.session(recipe) as session:
        assert [times for times, _ in stage.seen] == [1, 2]
        path = session.save(tmp_path / "session.safetensors")
    tensors, header = read_file(path)
    cache = cache_from_state(
        decoder_of(run.loaded.model).config,
        tensors,
        header["watched"]["cache"],
        torch.device("cpu"),
    )
    sequence = cache.layers[0].sequence
    count = sequence.state_of(0, Count, 0)
    assert count.times == 2 and float(count.tokens) == stage.seen[-1][1]
    assert [one.continues for one in sequence.prompts] == [False, True]
    assert sequence.settled == 0


def test_a_loaded_session_prunes_for_a_question_as_the_saved_one(
    watched: Any, tmp_path: Path
) -> None:
    run = watched("llava_onevision")
    recipe = "uniform(keep=0.8) + late"
    register("late", Late)
    try:
        with run.session(recipe) as session:
            expected = ask(session)
            path = session.save(tmp_path / "session.safetensors")
        with Session.load(path, run.loaded.model, run.loaded.processor) as loaded:
            assert same(ask(loaded), expected)
    finally:
        del METHODS.claims["late"]


@families
def test_questions_do_not_see_each_other(name: str, watched: Any) -> None:
    run = watched(name)
    questions = ["what is it?", "who?", "what happens at the very end of all this?"]
    firsts = []
    for question in questions:
        with run.session("uniform(keep=0.5)") as session:
            firsts.append(ask(session, question))
    with run.session("uniform(keep=0.5)") as session:
        for number in (2, 0, 1, 1, 0, 2):
            assert same(ask(session, questions[number]), firsts[number])


@families
def test_a_saved_session_answers_the_same(name: str, watched: Any, tmp_path: Path) -> None:
    run = watched(name)
    with run.session("uniform(keep=0.5)") as session:
        expected = ask(session)
        session.save(tmp_path / "kept.safetensors")
        session.watch(run.video, frames=FRAMES)
        longer = ask(session)
    model, processor = run.loaded.model, run.loaded.processor
    with Session.load(tmp_path / "kept.safetensors", model, processor) as session:
        assert same(ask(session), expected)
        session.watch(run.video, frames=FRAMES)  # and goes on where it was
        assert same(ask(session), longer)


@families
def test_the_model_is_left_alone(name: str, watched: Any) -> None:
    run = watched(name)
    before = snapshot(run.loaded.model)
    session = run.session("uniform(keep=0.5)")
    assert snapshot(run.loaded.model) == before
    ask(session)
    assert snapshot(run.loaded.model) == before
    session.close()
    assert snapshot(run.loaded.model) == before
    assert same(generate(run.tiny, run.inputs), run.output)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "gemma3"])
def test_a_failure_leaves_the_session_as_it_was(
    name: str, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = watched(name)
    with run.session("uniform(keep=0.5)") as session:
        expected = ask(session)
        layer = decoder_of(run.loaded.model).layers[2]

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            ask(session)
        with pytest.raises(RuntimeError, match="out of memory"):
            session.watch(run.video, frames=FRAMES)
        hook.remove()

        class Stop(Exception):
            pass

        class Streamer:
            def __init__(self) -> None:
                self.left = 3

            def put(self, value: Any) -> None:
                self.left -= 1
                if not self.left:
                    raise Stop

            def end(self) -> None: ...

        with pytest.raises(Stop):
            session.ask(QUESTION, streamer=Streamer())
        assert len(session.groups) == len(session.report.calls) == 2
        assert same(ask(session), expected)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_beams_and_samples_take_nothing_away(name: str, watched: Any) -> None:
    run = watched(name)
    with run.session("random(keep=0.5 at=cache)") as session:
        expected = ask(session)
        found = ask(session, num_beams=2, num_return_sequences=2)
        assert found.sequences.shape[0] == 2
        assert same(ask(session), expected)
    with torch.no_grad():
        beams = run.loaded.model.generate(
            **run.inputs, num_beams=2, max_new_tokens=6, do_sample=False
        )
    with run.session() as session:
        assert torch.equal(session.generate(QUESTION, num_beams=2, max_new_tokens=6), beams)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_sessions_share_a_model(name: str, watched: Any) -> None:
    run = watched(name)
    alone = []
    for recipe in ("uniform(keep=0.5)", "random(keep=0.3 at=2)"):
        with run.session(recipe) as session:
            alone.append(ask(session))
    first = Session(run.loaded.model, run.loaded.processor, "uniform(keep=0.5)", group=4)
    second = Session(run.loaded.model, run.loaded.processor, "random(keep=0.3 at=2)", group=4)
    first.watch(run.video, frames=FRAMES)
    second.watch(run.video, frames=FRAMES)

    assert same(ask(first), alone[0])
    assert same(ask(second), alone[1])
    assert same(ask(first), alone[0])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_processors_that_need_the_whole_video_are_refused(
    name: str, checkpoint: Callable[[str], Path], files: Any
) -> None:
    assert name in CHECKPOINTS
    loaded = load_model(str(checkpoint(name)), device="cpu")
    session = Session(loaded.model, loaded.processor, "none", group=4)
    with pytest.raises(UnsupportedModelError, match="writes groups of frames otherwise"):
        session.watch(files.silent, frames=FRAMES)


def test_positions_that_depend_on_what_follows_are_refused(
    watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = watched("qwen3_vl")
    model: Any = run.loaded.model
    prepare = model._prepare_position_ids_for_generation

    def by_length(ids: Tensor, known: dict[str, Any]) -> Tensor:
        return prepare(ids, known) + ids.shape[1]

    monkeypatch.setattr(model, "_prepare_position_ids_for_generation", by_length)
    with pytest.raises(UnsupportedModelError, match="depend on how many follow"):
        run.session()


def test_models_that_take_no_positions_are_refused(
    watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = watched("llava_onevision")
    model: Any = run.loaded.model
    prepare = model.prepare_inputs_for_generation

    def without(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**prepare(*args, **kwargs), "position_ids": None}

    monkeypatch.setattr(model, "prepare_inputs_for_generation", without)
    with pytest.raises(UnsupportedModelError, match="be told the positions of a question"):
        run.session()


@pytest.mark.skipif(not OLD, reason="this release of transformers places frames one by one")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl"])
def test_releases_that_place_frames_by_the_whole_clip_are_refused(name: str, watched: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="depend on how many follow"):
        watched(name).session()


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_memory_is_that_of_a_group_and_of_what_is_kept(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    loaded = load_model(str(checkpoint(name)), device="cpu")

    def peak(groups: int, recipe: str) -> tuple[int, int]:
        frames = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)
        session = Session(loaded.model, loaded.processor, recipe, group=4)
        session.watch(frames, fps=2.0)
        with Watch() as watch:
            for _ in range(groups):
                session.watch(frames)
        return watch.peak_bytes, session.kv_bytes.after

    small, few = peak(3, "uniform(keep=0.25)")
    large, many = peak(30, "uniform(keep=0.25)")
    # What grows is what is kept (and the record of it), not frames, features or hidden states.
    assert many > 4 * few
    assert large - small < 2.5 * (many - few)
