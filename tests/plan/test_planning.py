"""Plans: that what they promise before is what a run reports after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from _pytest.mark import ParameterSet
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tests.checkpoints import CHECKPOINTS, HEARING, SEEING
from tests.contract.cases import drawn, refusal
from tests.contract.test_sessions import NO_CHAT, REFUSED
from tests.releases import NEWEST
from tokenprune import Recipe, prune
from tokenprune.adapters.base import adapter_for
from tokenprune.asking import ask
from tokenprune.core.budget import Budget, allocate
from tokenprune.core.context import Candidates, Context
from tokenprune.core.selection import Selection
from tokenprune.core.selectors import top, top_per_group
from tokenprune.core.site import Cache, Input, Layer, Site
from tokenprune.core.stage import Stage
from tokenprune.errors import MediaError, RecipeError, TokenPruneError, UnsupportedModelError
from tokenprune.media.decode.pool import FrameDecoder
from tokenprune.models.load import load_model, load_outline
from tokenprune.plan.flops import _pairs, prefill_flops
from tokenprune.plan.forecast import Prompt, forecast
from tokenprune.plan.planning import plan
from tokenprune.testing.harness import model_of
from tokenprune.testing.tiny import NAMES, build, decoder_of
from tokenprune.testing.tiny.releases import RELEASE

FIXED = {
    # Counts that are fixed by sizes: by name of the kind of file.
    "image": ["vflowopt(keep=0.25)", "random(keep=0.5) + uniform(keep=0.4 at=1 per=frame)"],
    "video": [
        "vflowopt(keep=0.4) + uniform(keep=0.5 at=cache per=item)",
        "random(keep=0.6 per=frame) + uniform(keep=5 at=2) + random(keep=0.5 at=cache)",
        "none",
    ],
    "sound": ["uniform(keep=0.5 at=1 per=second) + random(keep=0.5 at=cache)", "none"],
}

FEW = ("llava_onevision", "qwen2_5_vl", "qwen2_audio")
"""Families that are asked under every recipe in the short suite."""


def questions() -> Iterator[ParameterSet]:
    """Family, kind of file and recipe: in the short suite each pair of the first two."""
    kinds = [(name, kind) for name in SEEING for kind in ("image", "video")]
    for name, kind in [*kinds, *((name, "sound") for name in HEARING)]:
        for number, recipe in enumerate(FIXED[kind]):
            marks = [] if number == 0 or name in FEW else [pytest.mark.full]
            yield pytest.param(name, kind, recipe, marks=marks)


@pytest.mark.parametrize("name, kind, recipe", list(questions()))
def test_ask_reports_what_was_planned(name, kind, recipe, checkpoint, command, files):
    options = ["--model", checkpoint(name), "--json"]
    options += ["--frames", 5] if kind == "video" else []
    if kind == "video" and name in ("qwen2_5_omni", "qwen3_omni_moe"):
        # The sound track is an item of its own: a forecast does not tell which was pruned.
        recipe = recipe.replace(" per=item", "")
    arguments = getattr(files, kind), *options, "--recipe", recipe
    planned = json.loads(command("plan", *arguments, "--question", "what is it?").out)
    if (name, kind) == ("video_llama_3", "video"):  # its processor drops still patches
        assert not planned["exact"] and planned["adaptive"] == ["processor"]
        return
    asked = command("ask", arguments[0], "what is it?", *arguments[1:], "--max-new-tokens", 1)
    assert_as_planned(planned, json.loads(asked.out))


def assert_as_planned(planned, found):
    assert planned["exact"] and not planned["adaptive"]
    for what in ("media_tokens", "kv_bytes", "frames", "recipe", "model"):
        assert planned[what] == found[what], what
    sites = [one["media_tokens"] for one in planned["stages"]]
    assert sites == list(planned["media_tokens"]["per_site"].values())


GROUPED = [
    # Budgets are of each group: with 7 frames in groups of 4 the last one is short.
    "vflowopt(keep=0.4) + uniform(keep=0.5 at=cache per=item)",
    "random(keep=0.6 per=frame) + uniform(keep=5 at=2) + random(keep=0.3 at=cache)",
    "uniform(keep=1 per=second)",
    "none",
]


def questions_in_groups() -> Iterator[ParameterSet]:
    """Family, frames of a group and recipe: in the short suite one of each family."""
    for name in SEEING:
        for group in (4, 6):
            for number, recipe in enumerate(GROUPED):
                if name not in (*REFUSED, *NO_CHAT):
                    short = group == 4 and (number == 0 or name in FEW)
                    marks = [] if short else [pytest.mark.full]
                    yield pytest.param(name, group, recipe, marks=marks)


@pytest.mark.parametrize("name, group, recipe", list(questions_in_groups()))
def test_ask_in_groups_reports_what_was_planned(name, group, recipe, checkpoint, command, files):
    options = ["--model", checkpoint(name), "--json", "--frames", 7, "--group", group]
    options += ["--no-sound"] if name in HEARING else []
    arguments = files.video, *options, "--recipe", recipe
    plans = command("plan", *arguments, "--question", "what is it?")
    asked = command("ask", arguments[0], "what is it?", *arguments[1:], "--max-new-tokens", 1)
    if asked.code and RELEASE < NEWEST:  # what older releases cannot do is refused by both
        assert plans.error == asked.error and "install a newer release" in asked.error
        return
    assert_as_planned(json.loads(plans.out), json.loads(asked.out))


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video", "qwen3_vl"])
def test_watch_reports_what_was_planned(name, checkpoint, command, files, tmp_path):
    options = ["--model", checkpoint(name), "--json", "--fps", 8, "--group", 2, "--recipe"]
    for recipe in GROUPED:
        planned = json.loads(command("plan", files.video, *options, recipe).out)
        saved = tmp_path / "kept.safetensors"
        found = json.loads(command("watch", files.video, *options, recipe, "--save", saved).out)

        assert planned["exact"] and planned["frames"] == found["frames"] == 8
        assert planned["media_tokens"] == found["media_tokens"]


def test_groups_change_what_is_kept(checkpoint, files):
    """Or the tests above would say little."""
    model, recipe = str(checkpoint("qwen3_vl")), "uniform(keep=5)"
    whole = plan(files.video, model, recipe=recipe, frames=8)
    groups = plan(files.video, model, recipe=recipe, frames=8, group=2)

    assert (whole.media_tokens.after, groups.media_tokens.after) == (5, 4 * 5)
    assert whole.media_tokens.before == groups.media_tokens.before


def test_groups_make_the_same_operations_in_parts(checkpoint, files):
    """But for the output head, which runs once more for each group."""
    for name in ("llava_next_video", "gemma3"):  # the latter with sliding windows
        model = str(checkpoint(name))
        whole = plan(files.video, model, recipe="none", frames=8).prefill_flops.before
        parts = plan(files.video, model, recipe="none", frames=8, group=2).prefill_flops.before
        head = load_outline(model).model.get_output_embeddings().weight.numel()
        assert parts == pytest.approx(whole + 4 * 2 * head, rel=1e-12)


def test_queries_of_a_later_group_see_fewer_keys(checkpoint, files):
    model = str(checkpoint("qwen3_vl"))
    kept, pruned = (
        plan(files.video, model, recipe=recipe, frames=8, group=4)
        for recipe in ("none", "random(keep=0.5 at=cache)")
    )
    assert pruned.prefill_flops.after < kept.prefill_flops.after
    once = plan(files.video, model, recipe="random(keep=0.5 at=cache)", frames=8)
    assert once.prefill_flops.after == once.prefill_flops.before


def test_plans_in_groups_refuse_what_sessions_do(checkpoint, files, command):
    model = str(checkpoint("qwen3_vl"))
    refused = [
        ({"recipe": "plphp"}, RecipeError, "plphp decides by the question"),
        ({"group": 3}, TokenPruneError, "a multiple of 2, .* got 3"),
        ({"group": 0}, TokenPruneError, "a multiple of 2, .* got 0"),
        ({"recipe": "random(at=40)"}, RecipeError, "layers 0 to 4"),
    ]
    for settings, kind, error in refused:
        with pytest.raises(kind, match=error):
            plan(files.video, model, **{"group": 4, "frames": 4, **settings})
    with pytest.raises(MediaError, match="is an image: it has no groups of frames"):
        plan(files.image, model, group=4)
    for name in REFUSED:
        with pytest.raises(UnsupportedModelError, match="writes groups of frames otherwise"):
            plan(files.silent, str(checkpoint(name)), frames=4, group=4)
    for name in sorted({"qwen2_5_omni", "qwen3_omni_moe"} & {*SEEING}):
        with pytest.raises(MediaError, match="would hear the sound track"):
            plan(files.video, str(checkpoint(name)), frames=4, group=4)
    with pytest.raises(UnsupportedModelError, match="understands sound only"):
        plan(files.sound, str(checkpoint("qwen2_audio")), group=4, recipe="none")
    ran = command("plan", files.video, "--model", model, "--group", 0)
    assert ran.code == 2 and "--group must be at least 1, got 0" in ran.error


@dataclass(frozen=True, kw_only=True)
class Brightest(Stage):
    """A method of others: settings of other names, and a look at features."""

    of_each_frame: float = 0.3
    where: Site = Input()

    name = "brightest"

    @property
    def site(self) -> Site:
        return self.where

    def budget(self, candidates: Candidates) -> Budget:
        return allocate(self.of_each_frame, "frame", candidates)

    def select(self, context: Context) -> Selection:
        seen = context.keys if isinstance(self.where, Cache) else context.features
        return Selection(top_per_group(seen.sum(dim=-1), self.budget(context)))


BESIDE = {
    # What a method of others acts after, where, what acts after it; and whether that is certain.
    ("none", Input(), "uniform(keep=0.5)"): True,
    ("uniform(keep=0.9)", Layer(2), "random(keep=0.7 at=cache)"): True,
    ("uniform(keep=0.9)", Cache(), "none"): True,
    # A budget over the prompt says nothing of its frames.
    ("vflowopt(keep=0.5 per=prompt)", Cache(), "none"): False,
}


@pytest.mark.parametrize("before, where, after", BESIDE)
def test_a_method_of_others_is_planned_as_it_runs(before, where, after, checkpoint, files):
    recipe = Recipe(before, Brightest(where=where), after)
    name = str(checkpoint("llava_onevision"))
    planned = plan(files.video, name, recipe=recipe, frames=5, question="what is it?")
    found = ask(load_model(name), files.video, "what is it?", recipe=recipe, frames=5)

    assert planned.exact == BESIDE[before, where, after]
    if planned.exact:
        assert planned.media_tokens == found.media_tokens
        assert planned.kv_bytes == found.kv_bytes


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_a_plan_without_sound_is_that_of_asking_without(name, checkpoint, command, files):
    arguments = [files.video, "--model", checkpoint(name), "--frames", 4, "--recipe", "none"]
    arguments += ["--json", "--no-sound"]
    planned = json.loads(command("plan", *arguments, "--question", "what?").out)
    asked = command("ask", arguments[0], "what?", *arguments[1:], "--max-new-tokens", 1)
    found = json.loads(asked.out)

    assert planned["exact"]
    for what in ("media_tokens", "kv_bytes"):
        assert planned[what] == found[what], what
    heard = plan(files.video, str(checkpoint(name)), frames=4, recipe="none")
    assert heard.media_tokens.before > planned["media_tokens"]["before"]


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_no_weights_are_read_and_no_frame_is_decoded(
    name, checkpoint, files, tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    folder = shutil.copytree(checkpoint(name), tmp_path / "bare")
    for weights in [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]:
        weights.unlink()
    monkeypatch.setattr(FrameDecoder, "__init__", refuse)
    found = plan(files.video, str(folder), frames=4)

    assert found.media_tokens.before > found.media_tokens.after > 0


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n < 60 else (pytest.mark.full,)) for n in range(400)]
)
def test_what_is_called_exact_is_what_happens(seed: int) -> None:
    """Recipes made up by chance, on prompts of every family, several items and kinds at once."""
    name, recipe, _, _ = drawn(seed)
    one = model_of(name)
    adapter, inputs = adapter_for(one.model), one.inputs()
    acting = Recipe(recipe).steps(adapter.shape)
    try:
        found = forecast(Prompt.of(adapter, inputs), acting)
    except TokenPruneError as error:
        with prune(one.model, recipe), pytest.raises(type(error)), torch.no_grad():
            one.model(**inputs, use_cache=True)
        return
    with prune(one.model, recipe) as report, torch.no_grad():
        one.model(**inputs, use_cache=True)
    exact, before = found.exact, report.kv_bytes.before

    assert found.call.kv_bytes_before == before
    if all(exact):
        assert found.call.media_tokens == report.media_tokens
        assert found.call.kv_bytes_after == report.kv_bytes.after
        kept = [decision.kept.shape for decision in report.last.decisions]
        assert [decision.kept.shape for decision in found.call.decisions] == kept
    else:
        # What comes before the first uncertain stage is certain.
        first = acting[exact.index(False)]
        for step in acting[: exact.index(False)]:
            site = step.stage.site
            if site == first.stage.site:
                continue
            if not isinstance(site, Cache):
                promised = found.call.media_tokens.per_site.get(site)
                assert promised == report.media_tokens.per_site.get(site)


def test_most_drawn_recipes_are_exact_or_adaptive() -> None:
    """The test above would be empty if hardly anything were called exact."""
    exact = 0
    for seed in range(60):
        name, recipe, _, _ = drawn(seed)
        adapter = adapter_for(model_of(name).model)
        acting = Recipe(recipe).steps(adapter.shape)
        prompt = Prompt.of(adapter, model_of(name).inputs())
        try:
            exact += all(forecast(prompt, acting).exact)
        except TokenPruneError:
            continue
    assert exact >= 20


def test_adaptive_methods_say_so(checkpoint, files):
    found = plan(files.image, str(checkpoint("qwen2_vl")), recipe="random(keep=0.5) + plphp")

    assert not found.exact and found.adaptive == ("plphp",)
    assert [stage.exact for stage in found.stages] == [True, False]
    first, second = found.stages
    assert first.site == Input() and isinstance(second.site, Cache)
    assert first.media_tokens == 9 and second.media_tokens == 4  # 0.4 of 9, as a balanced layer
    text = str(found)
    assert "~4 " in text and "~9" not in text
    assert "decided by what is seen or heard (plphp)" in text


@dataclass(frozen=True, kw_only=True)
class Undecided(Stage):
    """Keeps half, which it does not say: between so many and two more, or nothing at all."""

    least: int | None = None
    where: Site = Input()

    name = "undecided"

    @property
    def site(self) -> Site:
        return self.where

    def budget(self, candidates: Candidates) -> Budget:
        if self.least is None:
            return super().budget(candidates)
        groups, counts = torch.zeros_like(candidates.rows), torch.tensor([self.least + 1])
        return Budget.of(groups, counts, least=self.least, most=self.least + 2)

    def select(self, context: Context) -> Selection:
        seen = context.keys if isinstance(self.where, Cache) else context.features
        return Selection(top(seen.sum(dim=-1), len(context) // 2))


@pytest.mark.parametrize("where", [Input(), Layer(2), Cache()])
def test_stages_that_only_name_bounds_are_planned_by_their_counts(where, checkpoint, files):
    name = str(checkpoint("qwen2_vl"))
    for least, planned in ((None, 18), (7, 8)):
        found = plan(files.image, name, recipe=Recipe(Undecided(least=least, where=where)))
        assert not found.exact and found.adaptive == ("undecided",)
        assert found.stages[0].media_tokens == planned
        # What comes after depends on it; a budget of its own that is sure to be met does not.
        more = Recipe(Undecided(least=least, where=where), "uniform(keep=2 at=cache)")
        found = plan(files.image, name, recipe=more)
        assert found.stages[1].media_tokens == 2


@dataclass(frozen=True, kw_only=True)
class Nothing(Stage):
    """Keeps no token, and says so."""

    where: Site = Input()

    name = "nothing"

    @property
    def site(self) -> Site:
        return self.where

    def budget(self, candidates: Candidates) -> Budget:
        groups = torch.zeros_like(candidates.rows)
        return Budget.of(groups, torch.tensor([0]))

    def select(self, context: Context) -> Selection:
        return Selection(torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("where", [Input(), Layer(2), Cache()])
def test_a_stage_that_keeps_nothing_is_planned_as_it_runs(where, checkpoint, files):
    recipe = Recipe(Nothing(where=where), "uniform(keep=0.5 at=3)")
    name = str(checkpoint("llava_onevision"))
    planned = plan(files.video, name, recipe=recipe, frames=5, question="what is it?")
    found = ask(load_model(name), files.video, "what is it?", recipe=recipe, frames=5)

    assert planned.exact and planned.stages[0].media_tokens == 0
    assert planned.media_tokens == found.media_tokens
    assert planned.kv_bytes == found.kv_bytes


def test_counts_that_hang_on_an_earlier_choice_are_not_called_exact(checkpoint, files):
    # Of which frames the first round keeps tokens is only seen in the run.
    recipe = "vflowopt(keep=0.5 per=prompt) + uniform(keep=0.3 at=cache per=frame)"
    found = plan(files.video, str(checkpoint("qwen2_vl")), recipe=recipe, frames=6)

    assert found.adaptive == ("uniform",)
    # All of them are of one item.
    again = plan(files.video, str(checkpoint("qwen2_vl")), recipe=recipe.replace("frame", "item"))
    assert again.exact


def test_each_stage_is_cheaper_than_the_last(checkpoint, files):
    found = plan(
        files.video,
        str(checkpoint("llava_onevision")),
        frames=8,
        recipe=("uniform(keep=0.8) + uniform(keep=0.5 at=1) + uniform(keep=0.5 at=3)"),
    )
    flops = [found.prefill_flops.before, *(one.prefill_flops for one in found.stages)]
    sizes = [found.kv_bytes.before, *(one.kv_bytes for one in found.stages)]

    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 4
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert flops[-1] == found.prefill_flops.after
    assert sizes[-1] == found.kv_bytes.after


def test_half_precision_halves_the_cache(checkpoint, files, tmp_path):
    folder = shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "half")
    whole = plan(files.image, str(folder), recipe="none").kv_bytes.before
    config = json.loads((folder / "config.json").read_text())
    for dtype, share in (("bfloat16", 2), ("float16", 1 if not torch.cuda.is_available() else 2)):
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        half = plan(files.image, str(folder), recipe="none").kv_bytes.before
        assert half == whole // share


def test_the_text_is_a_table(command, checkpoint, files):
    ran = command("plan", files.video, "--model", checkpoint("qwen2_vl"), "--frames", 4)

    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[:2] == ["recipe  vflowopt(keep=0.25)", "frames  4"]
    assert lines[4].split()[0] == "unpruned" and lines[5].startswith("vflowopt at input")
    assert "GFLOP" in lines[4] and "MiB" in lines[4]


# -- operations


@pytest.mark.parametrize("name", [n for n in NAMES if "moe" not in n])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    """But for attention: its kernels compute pairs that the mask hides."""
    model = build(name).model.to("meta")
    adapter = adapter_for(model)
    length, shape = 40, adapter.shape
    counter = FlopCounterMode(display=False)
    embeddings = torch.zeros(1, length, shape.width, device="meta")
    with counter, torch.no_grad():
        hidden = embeddings
        for layer in adapter.language_model.layers:
            for linear in layer.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear(hidden.new_zeros(length, linear.in_features))
        model.get_output_embeddings()(hidden[:, -1])
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    rows, pairs = torch.arange(length), 0
    for number in range(shape.layers):
        window = windows_of(model)[number]
        near = visible if window is None else visible & (rows[:, None] - rows < window)
        pairs += int(near.sum())
    attention = 4 * pairs * shape.heads * shape.head_width

    assert prefill_flops(model, [rows] * shape.layers) == counter.get_total_flops() + attention


def windows_of(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer, as the attention modules have it."""
    layers = decoder_of(model).layers
    return [getattr(layer.self_attn, "sliding_window", None) for layer in layers]


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    rows = torch.tensor([0, 1, 2, 5, 6, 11, 12, 13, 14, 30])
    visible = rows[:, None] >= rows
    if window is not None:
        visible &= rows[:, None] - rows < window

    assert _pairs(rows, window, rows[:0]) == int(visible.sum())
    # In two parts, of which the second looks back at what is left of the first.
    left = rows[[0, 2, 3]]
    seen = torch.cat([left, rows[5:]])
    visible = rows[5:, None] >= seen
    if window is not None:
        visible &= rows[5:, None] - seen < window
    assert _pairs(rows[5:], window, left) == int(visible.sum())


# -- bad input


def test_bad_requests_fail(checkpoint, command, files):
    model = str(checkpoint("qwen2_vl"))
    with pytest.raises(MediaError, match="frames must be a whole number of at least 1, got 0"):
        plan(files.video, model, frames=0)
    with pytest.raises(MediaError, match="no such file"):
        plan("nothing.mp4", model)
    with pytest.raises(TokenPruneError, match="a question must have words"):
        plan(files.video, model, question=" ")
    with pytest.raises(RecipeError, match="layers 0 to 4"):
        plan(files.video, model, recipe="random(at=40)")
    with pytest.raises(UnsupportedModelError, match="has only audio tokens"):
        plan(files.sound, str(checkpoint("qwen2_audio")), recipe="vflowopt")
    with pytest.raises(TokenPruneError, match="cannot load model"):
        plan(files.video, "/nowhere")
    ran = command("plan", files.video, "--model", model, "--frames", 4, "--fps", 2)
    assert ran.code == 2 and "give --frames or --fps, got both (4 and 2.0)" in ran.error


def test_refusals_of_a_run_are_those_of_its_plan(checkpoint, files):
    """A cache stage that prunes only some of the kinds of media in a prompt."""
    one = model_of("qwen2_5_omni")
    assert refusal("vflowopt(keep=0.5)", "qwen2_5_omni") is None
    adapter = adapter_for(one.model)
    found = forecast(Prompt.of(adapter, one.inputs()), [])

    assert found.call.media_tokens.per_site == {}
    assert found.call.media_tokens.before == sum(map(len, found.call.layouts))


@pytest.mark.parametrize(
    "recipe",
    [
        "groups(size=2)",
        "groups(size=2) + uniform(keep=0.5) + random(keep=0.5 at=2)",
        "groups(size=4) + knorm(keep=0.3)",
        "groups(size=5 per=token) + random(keep=0.4 at=cache)",
    ],
)
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_groups_within_a_prompt_are_planned_as_they_run(name, recipe, checkpoint, files):
    model = str(checkpoint(name))
    planned = plan(files.video, model, recipe=recipe, frames=8, question="what?")
    found = ask(load_model(model), files.video, "what?", recipe=recipe, frames=8)

    assert planned.exact
    assert planned.media_tokens == found.media_tokens
    assert planned.kv_bytes == found.kv_bytes
