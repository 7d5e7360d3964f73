"""What goes wrong must leave no trace: cases made up by chance, threads, and many runs in a row.

A case draws a family, a recipe, prompts and an attention kernel, something that fails on the way
(in a stage, in the model, in the engine's own hooks, or while they are installed), and at times a
use that is not supported. Whatever happens, the model is as before and answers as before, pruned
and unpruned, and what it answers under the recipe is what the oracle says; or there is one clear
error. Sessions are drawn too: what failed in one may be tried again, and then it is as if nothing
had.

`make test` draws fresh cases. A failure names its seed, and `TOKENPRUNE_SEED=... pytest
tests/engine/test_reliability.py` runs that case alone.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.contract.cases import EVERYWHERE, THREE, drawn
from tests.contract.test_contracts import foreign, repeated, static
from tokenprune import Session, prune
from tokenprune.adapters.base import Adapter, adapter_for
from tokenprune.core.recipe import Recipe
from tokenprune.core.signal import EncoderSignal
from tokenprune.engine import laid
from tokenprune.engine import patch as patching
from tokenprune.engine.cache import CACHE_NAME, PrunedLayer
from tokenprune.engine.forward import Forward
from tokenprune.engine.layers import LayerCalls
from tokenprune.engine.patch import Patch
from tokenprune.engine.run import Run
from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.models.load import load_model
from tokenprune.testing.harness import (
    generate,
    logits_of,
    model_of,
    prompt_of,
    pruned,
    replay_of,
    unpruned,
)
from tokenprune.testing.oracle import assert_close, dense_logits, positions_logged
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import Tiny, decoder_of, pad_batch

FRESH = 60
FIXED = 500
STEPS = 3


class Stop(Exception):
    """Raised inside a run."""


FAILURES = (Stop, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)
USES = ("generate", "a static cache", "a cache of others", "embeddings", "two patches")
"""How the model is used; all but the first are refused."""
PLACES = ("nowhere", "stage", "layer", "attention", "encoder", "layout", "cache", "streamer")
PLACES += ("hook", "installing")
HOOKS = [(Run, name) for name in ("on_prompt", "before_model", "after_model")]
HOOKS += [(LayerCalls, name) for name in ("before", "after", "attend", "mask")]
HOOKS += [(Forward, name) for name in ("begin", "finish", "cut_arguments")]
"""What the engine hooks into a model, and what its hooks call."""


@dataclass(frozen=True)
class Case:
    """One run made up by chance.

    Attributes:
        seed: What it was drawn from.
        name: The model's.
        recipe: As text.
        attention: The kernel.
        inputs: The prompt, or a left-padded batch of two.
        use: How the model is used.
        place: Where something fails.
        after: How many times it works before.
        failure: What is raised.
    """

    seed: int
    name: str
    recipe: str
    attention: str
    inputs: dict[str, Any]
    use: str
    place: str
    after: int
    failure: type[BaseException]

    @property
    def one(self) -> Tiny:
        return model_of(self.name, self.attention)

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.recipe}, {self.attention}, {self.use}, "
            f"{self.failure.__name__} in {self.place}"
        )


def draw(seed: int) -> Case:
    name, recipe, kind, attention = drawn(seed)
    chance = random.Random(f"{seed} beyond the recipe")
    one = model_of(name, attention)
    media, closing = chance.randrange(1000), chance.randint(1, 25)
    inputs = one.inputs(media, closing, short=chance.random() < 0.3)
    inputs = repeated(inputs, chance.choice([1, 1, 1, 1, 2, 3]))
    if kind == "batch":
        whole = one.inputs(media, closing)
        inputs = pad_batch(whole, one.inputs(media + 1, chance.randint(1, 25), short=True))
    place, after = chance.choice(PLACES), chance.choice([0, 0, 0, 1, 2, 5])
    use = USES[0] if chance.random() < 0.8 else chance.choice(USES[1:])
    return Case(seed, name, recipe, attention, inputs, use, place, after, chance.choice(FAILURES))


def use(case: Case, settings: dict[str, Any]) -> None:
    """Use the model as the case does, inside a `with prune(...)`."""
    one = case.one
    if case.use == "a cache of others":
        cache = foreign(one)
    with prune(one.model, case.recipe):
        if case.use == "a cache of others":
            one.model(input_ids=torch.tensor([[7]]), **{CACHE_NAME: cache})
        elif case.use == "embeddings":
            embeddings = one.model.get_input_embeddings()(case.inputs["input_ids"])
            one.model(inputs_embeds=embeddings)
        elif case.use == "two patches":
            with prune(one.model, case.recipe):
                pass
        else:
            if case.use == "a static cache":
                settings = {**settings, CACHE_NAME: static(one)}
            generate(one, case.inputs, max_new_tokens=STEPS, **settings)


class Fuse:
    """Lets some calls pass, then raises."""

    def __init__(self, after: int, failure: type[BaseException]) -> None:
        self.left = after
        self.failure = failure
        self.blown = False

    def __call__(self, *args: object, **kwargs: object) -> None:
        if self.left == 0 and not self.blown:
            self.blown = True
            raise self.failure("made up by chance")
        self.left -= 1

    put = __call__

    def end(self) -> None:
        pass


def guarded(function: Callable[..., Any], fuse: Fuse) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        fuse()
        return function(*args, **kwargs)

    return call


@contextmanager
def broken(case: Case, fuse: Fuse, patch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Within, the case's place fails; gives further settings for `generate`."""
    chance = random.Random(f"{case.seed} what fails")
    with failing(case.place, case.one.model, case.recipe, chance, fuse, patch):
        alone = len(case.inputs["input_ids"]) == 1
        yield {"streamer": fuse} if case.place == "streamer" and alone else {}


@contextmanager
def failing(
    place: str,
    model: Any,
    recipe: str,
    chance: random.Random,
    fuse: Fuse,
    patch: pytest.MonkeyPatch,
) -> Iterator[None]:
    adapter = adapter_for(model)
    layers = decoder_of(model).layers
    with ExitStack() as stack, patch.context() as patched:
        if place == "stage":
            steps = Recipe(recipe).steps(adapter.shape)
            parts: list[tuple[type[Any], str]] = [(type(one.stage), "select") for one in steps]
            signals = dict.fromkeys(signal for one in steps for signal in one.stage.needs)
            parts += [(type(one), "of") for one in signals if isinstance(one, EncoderSignal)]
            if parts:
                kind, method = chance.choice(parts)
                patched.setattr(kind, method, guarded(getattr(kind, method), fuse))
        elif place in ("layer", "attention"):
            module = chance.choice(list(layers))
            module = module if place == "layer" else module.self_attn
            before = chance.random() < 0.5
            add = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(add(fuse).remove)
        elif place == "encoder":
            stack.callback(chance.choice(towers(adapter)).register_forward_hook(fuse).remove)
        elif place == "layout":
            patched.setattr(laid, "lay_out", guarded(laid.lay_out, fuse))
        elif place == "cache":
            method = chance.choice(["update", "select"])
            patched.setattr(PrunedLayer, method, guarded(getattr(PrunedLayer, method), fuse))
        elif place == "hook":
            kind, method = chance.choice(HOOKS)
            patched.setattr(kind, method, guarded(getattr(kind, method), fuse))
        elif place == "installing":
            step = chance.choice(["add_hook", "shadow", "switch_attention"])
            patched.setattr(patching, step, guarded(getattr(patching, step), fuse))
        yield


def towers(adapter: Adapter) -> list[nn.Module]:
    """The modules that encode media, some within the language model, and those inside them."""
    model = adapter.language_model
    parts = [getattr(model, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")]
    others = {module for part in parts for module in part.modules()}
    return [
        module
        for module in adapter.base_model.modules()
        if module not in others
        and model not in module.modules()
        and any(True for _ in module.parameters())
    ]


def oracle_holds(case: Case, positions: Tensor | None) -> None:
    with prune(case.one.model, case.recipe) as report:
        output = generate(case.one, case.inputs, max_new_tokens=STEPS)
    read = output.sequences[:, :-1]
    replay = replay_of(case.one, case.recipe, report.calls, *read.shape)
    expected = dense_logits(case.one.model, case.inputs, read, replay, positions)
    assert_close(logits_of(output), expected[:, case.inputs["input_ids"].shape[1] - 1 :])


def run(case: Case, patch: pytest.MonkeyPatch) -> bool:
    """Run a case; returns whether something failed as it was to."""
    one = case.one
    with positions_logged(decoder_of(one.model)) as log:
        plain = generate(one, case.inputs, max_new_tokens=STEPS)
    before = snapshot(one.model)
    fuse = Fuse(case.after if case.place != "nowhere" else -1, case.failure)
    with broken(case, fuse, patch) as settings:
        try:
            use(case, settings)
            assert case.use == "generate", "this was to be refused"
        except TokenPruneError as error:
            assert case.use != "generate", error
            assert len(str(error)) > 40 and "\n" not in str(error), error
        except FAILURES as error:
            assert fuse.blown and str(error) == "made up by chance"
    assert snapshot(one.model) == before
    again = generate(one, case.inputs, max_new_tokens=STEPS)
    assert torch.equal(logits_of(again), logits_of(plain))
    oracle_holds(case, log.whole())
    return fuse.blown


def seeds(fresh: int, fixed: int) -> list[Any]:
    """Fresh ones for the short suite, or the one asked for; then those that are always the same."""
    asked = os.environ.get("TOKENPRUNE_SEED")
    if asked is not None:
        return [int(asked)]
    draw = random.Random(os.environ["TOKENPRUNE_DRAW"])
    drawn = [draw.randrange(10**6, 10**9) for _ in range(fresh)]
    return drawn + [pytest.param(seed, marks=pytest.mark.full) for seed in range(fixed)]


# So torch tells of a hook that fails after a forward that was refused.
@pytest.mark.filterwarnings("ignore:module forward hook with .*always_call:UserWarning")
@pytest.mark.parametrize("seed", seeds(FRESH, FIXED))
def test_a_case_made_up_by_chance(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(seed)
    try:
        run(case, monkeypatch)
    except BaseException as error:
        error.add_note(f"TOKENPRUNE_SEED={seed}: {case}")
        raise


@pytest.mark.parametrize("place", PLACES[1:])
def test_cases_fail_where_they_are_to(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would say little."""
    found = 0
    for seed in range(2000, 2400):
        case = draw(seed)
        if case.place == place and case.after == 0 and case.use == "generate":
            found += run(case, monkeypatch)
            if found:
                return
    pytest.fail(f"nothing failed in {place}")


@pytest.mark.parametrize("use", USES[1:])
def test_uses_are_refused_as_they_are_to(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(replace(draw(3000), use=use, place="nowhere"), monkeypatch)


# -- sessions

SESSIONS = ("gemma3", "llava_next", "llava_onevision", "qwen3_vl")


@pytest.mark.parametrize("seed", seeds(12, 100))
def test_a_session_goes_on_after_a_failure(
    seed: int, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed is tried again; answers are those of a session in which nothing did."""
    chance = random.Random(f"{seed} session")
    name, place = chance.choice(SESSIONS), chance.choice(PLACES[1:])
    steps = [step for step in drawn(seed)[1].split(" + ") if not step.startswith("plphp")]
    recipe, after = " + ".join(steps) or "none", chance.choice([0, 0, 1, 3, 7, 15])
    fuse = Fuse(after, chance.choice(FAILURES))
    try:
        session_goes_on(checkpoint(name), recipe, place, chance, fuse, monkeypatch)
    except BaseException as error:
        error.add_note(
            f"TOKENPRUNE_SEED={seed}: {name}, {recipe}, {fuse.failure.__name__} in {place}"
        )
        raise


def test_sessions_fail_where_they_are_to(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would say little."""
    recipe = "uniform(keep=0.5) + random(keep=0.5 at=2) + random(keep=0.5 at=cache)"
    for place in PLACES[1:]:
        fuse = Fuse(0, Stop)
        folder, chance = checkpoint("llava_onevision"), random.Random(place)
        assert session_goes_on(folder, recipe, place, chance, fuse, monkeypatch), place


def session_goes_on(
    folder: Path,
    recipe: str,
    place: str,
    chance: random.Random,
    fuse: Fuse,
    patch: pytest.MonkeyPatch,
) -> bool:
    """Returns whether something failed."""
    loaded = load_model(str(folder), device="cpu")
    clip = torch.randint(0, 256, (7, 3, 56, 56), dtype=torch.uint8)

    def story(streamer: Any) -> Iterator[Callable[[], Any]]:
        session = Session(loaded.model, loaded.processor, recipe, group=4)
        ask = partial(session.generate, max_new_tokens=STEPS, do_sample=False, streamer=streamer)
        yield partial(session.watch, clip[:4], fps=2.0)
        yield partial(ask, "what?")
        yield partial(session.watch, clip[4:])  # waits for more frames, or for a question
        yield partial(ask, "who is it?")
        yield partial(ask, "what?")
        yield lambda: session.media_tokens

    expected = [act() for act in story(None)]
    before = snapshot(loaded.model)
    found, failures = [], 0
    with failing(place, loaded.model, recipe, chance, fuse, patch):
        inside = snapshot(loaded.model)  # with the hook that is to fail
        for act in story(fuse if place == "streamer" else None):
            try:
                found.append(act())
            except FAILURES as error:
                assert fuse.blown and str(error) == "made up by chance"
                assert snapshot(loaded.model) == inside
                failures += 1
                found.append(act())
    assert snapshot(loaded.model) == before
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
        elif isinstance(one, dict):
            assert one == other
    return failures == 1


# -- threads


def test_two_threads_with_two_models_are_independent() -> None:
    names = ("llava", "qwen3_vl")
    recipes = (EVERYWHERE, "vflowopt(keep=0.4) + plphp(keep=0.5)")
    expected = [pruned(name, recipe).output for name, recipe in zip(names, recipes, strict=True)]
    before = [snapshot(model_of(name).model) for name in names]
    start = threading.Barrier(2)
    found: dict[int, list[Any]] = {0: [], 1: []}

    def work(number: int) -> None:
        one = model_of(names[number])
        start.wait()
        for _ in range(5):
            with prune(one.model, recipes[number]):
                found[number].append(generate(one, prompt_of(one)))

    in_threads([partial(work, number) for number in range(2)])
    for number, plain in enumerate(expected):
        for output in found[number]:
            assert torch.equal(logits_of(output), logits_of(plain))
    assert [snapshot(model_of(name).model) for name in names] == before


def test_threads_do_not_enter_one_model_together() -> None:
    one = model_of("llava")
    before = snapshot(one.model)
    inside, most, refused = 0, 0, 0
    start = threading.Barrier(4)

    def work() -> None:
        nonlocal inside, most, refused
        start.wait()
        for _ in range(50):
            try:
                with prune(one.model, EVERYWHERE):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.0001)  # let others try
                    inside -= 1
            except UnsupportedModelError as error:
                assert "already inside" in str(error)
                refused += 1

    in_threads([work] * 4)
    assert most == 1 and 0 < refused < 200
    assert snapshot(one.model) == before


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_two_sessions_of_one_model_take_turns(name: str, checkpoint: Callable[[str], Path]) -> None:
    """From two threads: what is not refused is right, and what is refused harms nobody."""
    loaded = load_model(str(checkpoint(name)), device="cpu")
    clips = [torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8) for _ in range(2)]
    recipes = ["uniform(keep=0.5)", "random(keep=0.3 at=2)"]

    def use(number: int, patience: int) -> list[Tensor]:
        session = Session(loaded.model, loaded.processor, recipes[number], group=4)

        def insist(act: Callable[[], Any]) -> Any:
            for _ in range(patience):
                try:
                    return act()
                except UnsupportedModelError as error:
                    assert "already inside" in str(error)
                    refused[number] += 1
                    met.set()
                    time.sleep(0.001)
            raise TimeoutError

        with session:
            insist(lambda: session.watch(clips[number], fps=2.0))
            return [
                insist(lambda: session.generate("what?", max_new_tokens=4, do_sample=False))
                for _ in range(5)
            ]

    refused = [0, 0]
    met = threading.Event()
    alone = [use(number, 1) for number in range(2)]
    assert refused == [0, 0]
    found: dict[int, list[Tensor]] = {}

    def keep(number: int) -> None:
        found[number] = use(number, 100_000)

    # Who is inside first stays until the other has been refused.
    loaded.model.get_input_embeddings().register_forward_pre_hook(lambda *_: met.wait(60) and None)
    in_threads([partial(keep, number) for number in range(2)])
    assert sum(refused) > 0, "they never met"
    for number in range(2):
        assert all(map(torch.equal, found[number], alone[number]))


def in_threads(works: list[Callable[[], Any]]) -> None:
    """Run each in a thread of its own; what one raises is raised here."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result()


# -- leaks


def alive() -> tuple[int, int, int]:
    """Tensors that are alive, their bytes, and patches."""
    gc.collect()
    things = gc.get_objects()
    # Other kinds, such as a compiler's imagined tensors, hold no memory.
    tensors = [thing for thing in things if type(thing) in (Tensor, nn.Parameter)]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    patches = sum(type(thing) in (Patch, Run, Forward) for thing in things)
    return len(tensors), sum(held.values()), patches


@pytest.mark.parametrize(
    "name", [THREE[0], *(pytest.param(one, marks=pytest.mark.full) for one in THREE[1:])]
)
def test_memory_is_flat_over_many_runs(name: str) -> None:
    """Every other one fails in the middle."""
    one = model_of(name)
    inputs = prompt_of(one)
    expected = unpruned(name).output
    before = snapshot(one.model)
    names = len(ALL_ATTENTION_FUNCTIONS), len(ALL_MASK_ATTENTION_FUNCTIONS)
    layer = decoder_of(one.model).layers[2]

    def once(number: int) -> None:
        handle = layer.register_forward_hook(Fuse(0 if number % 2 else -1, Stop))
        try:
            with torch.no_grad(), prune(one.model, EVERYWHERE):
                one.model(**inputs, use_cache=True)
        except Stop:
            assert number % 2
        finally:
            handle.remove()

    for number in range(10):
        once(number)
    first = alive()
    for number in range(200):
        once(number)
    last = alive()
    assert last == first and last[2] == 0
    assert (len(ALL_ATTENTION_FUNCTIONS), len(ALL_MASK_ATTENTION_FUNCTIONS)) == names
    assert snapshot(one.model) == before
    assert torch.equal(logits_of(generate(one, inputs)), logits_of(expected))


def test_a_report_of_a_long_answer_is_no_larger() -> None:
    one = model_of("llava_onevision")
    held = []
    for length in (20, 220):
        with prune(one.model, EVERYWHERE) as report:
            generate(one, prompt_of(one), max_new_tokens=length)
        held.append(alive())
        assert len(report.calls) == 1
        del report
    assert held[0] == held[1]
