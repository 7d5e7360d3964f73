"""Holds a method to the contracts, on tiny models of every family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, cast
from unittest import SkipTest

import torch
from torch import Tensor

from tokenprune.adapters.base import adapter_for
from tokenprune.core.context import Candidates
from tokenprune.core.layout import VIDEO, TokenLayout
from tokenprune.core.recipe import Recipe
from tokenprune.core.site import Cache, Layer
from tokenprune.core.stage import Method
from tokenprune.engine.patch import prune
from tokenprune.errors import RecipeError, UnsupportedModelError, first_line
from tokenprune.plan.forecast import Prompt, forecast
from tokenprune.testing.harness import (
    Run,
    assert_matches_oracle,
    generate,
    logits_of,
    prompt_of,
    replay_of,
    same,
    second_turn,
)
from tokenprune.testing.oracle import assert_close, dense_logits, positions_logged
from tokenprune.testing.outcomes import Outcomes, Row, failing, hold, some
from tokenprune.testing.randomness import disturb, restored
from tokenprune.testing.snapshot import differences, snapshot
from tokenprune.testing.tiny import FAMILIES, Tiny, build, decoder_of

__all__ = ["check_method"]

QUESTION = "what is it?"


def check_method(
    method: Method | Recipe | str,
    families: Iterable[str] | None = None,
    *,
    keep_all: Method | Recipe | str | None = None,
    attention: Sequence[str] = ("sdpa", "eager"),
) -> Outcomes:
    """Hold a method, or a recipe of several, to the contracts on tiny models.

    On each family: with everything kept the answer is bit-identical; pruned, prefill and decoding
    are those of the unpruned model with the same tokens masked, alone, in a left-padded batch of
    prompts of different length, and in a second turn; each row of the batch decides as it does
    alone; the model is as before afterwards; as many tokens stay as the budget promised; the same
    prompt is decided alike twice, whatever ran in between; a plan that calls itself exact says
    what happens. And the recipe is read again from its text.

    ```python
    print(check_method("mine(keep=0.5)", ["llava", "qwen2_5_vl"]))
    ```

    Args:
        method: What to check, with its settings: they should prune something, and tiny models
            have five layers and some 20 to 130 media tokens.
        families: Names of tiny models, of `tiny.FAMILIES` or `tiny.VARIANTS`; None for all
            families. Those that refuse the method are noted with the reason.
        keep_all: The same with nothing pruned; None for `keep=1.0`, where all methods have it.
        attention: Attention implementations; the first one gets every check, others those on
            logits.

    Returns:
        The outcomes, which print as a table.

    Raises:
        AssertionError: A check failed, or no family can run the method.
    """
    with restored():
        with failing(str(method), "any family", "recipe"):
            recipe = Recipe(method)
            hold(bool(recipe.methods), "there is no method in it")
            hold(Recipe.parse(str(recipe)) == recipe, f"{recipe} is not read again as it was")
            everything = _everything(recipe) if keep_all is None else Recipe(keep_all)
        outcomes = Outcomes(str(recipe))
        for name in FAMILIES if families is None else families:
            _check_family(outcomes, recipe, everything, name, attention)
    if not outcomes.passed:
        raise AssertionError(f"no family can run this method:\n{outcomes}")
    return outcomes


def _check_family(
    outcomes: Outcomes,
    recipe: Recipe,
    everything: Recipe | None,
    name: str,
    attention: Sequence[str],
) -> None:
    for number, kernel in enumerate(attention):
        suffix = f", {kernel}" if number else ""
        try:
            case = _Case(build(name, attention=kernel), recipe, everything)
        except SkipTest as reason:
            outcomes.rows.append(Row(name, "all", f"left out: {reason}"))
            return
        with failing(str(recipe), name, f"first answer{suffix}"):
            refused = case.refusal()
        if refused is not None:
            outcomes.rows.append(Row(name, "all" + suffix, f"refused: {refused}"))
            return
        checks: dict[str, Callable[[], str | None]] = {
            "model as before": case.check_traces,
            "same decisions twice": case.check_again,
            "promised budget": case.check_budget,
            "everything kept": case.check_everything,
            "oracle": case.check_oracle,
            "oracle, batch": case.check_oracle_in_a_batch,
            "batch as alone": case.check_batch,
            "second turn": case.check_second_turn,
            "plan": case.check_plan,
        }
        of_logits = ("model as before", "everything kept", "oracle", "oracle, batch")
        for check, function in checks.items():
            if not number or check in of_logits:
                outcomes.run(name, check + suffix, function)


class _Case:
    """A tiny model and a recipe, with their runs, each made once.

    Args:
        one: A model that nobody else uses.
        recipe: What to check.
        everything: The recipe with everything kept, if there is one.
    """

    def __init__(self, one: Tiny, recipe: Recipe, everything: Recipe | None) -> None:
        self.one = one
        self.recipe = recipe
        self.everything = everything
        with torch.no_grad():  # in its first forward transformers puts hooks into a model, for good
            one.model(**one.inputs())
        self.before = snapshot(one.model)
        self._plain: dict[str, Run] = {}
        self._pruned: dict[str, Run] = {}

    def plain(self, kind: str) -> Run:
        """A prompt, answered without tokenprune."""
        if kind not in self._plain:
            inputs = prompt_of(self.one, kind)
            with positions_logged(decoder_of(self.one.model)) as log:
                output = generate(self.one, inputs)
            self._plain[kind] = Run(self.one, "none", inputs, output, [], log.whole())
        return self._plain[kind]

    def run(self, kind: str) -> Run:
        """A prompt, answered under the recipe."""
        if kind not in self._pruned:
            self._pruned[kind] = self._run(kind, self.recipe)
        return self._pruned[kind]

    def _run(self, kind: str, recipe: Recipe) -> Run:
        plain = self.plain(kind)
        with prune(self.one.model, recipe, **self._given(kind)) as report:
            output = generate(self.one, plain.inputs)
        return Run(self.one, recipe, plain.inputs, output, report.calls, plain.positions)

    @cached_property
    def _pictures(self) -> dict[str, list[Tensor]]:
        """By kind of prompt: pictures for methods that ask for them."""
        found: dict[str, list[Tensor]] = {}
        for kind in ("alone", "second", "batch"):
            with prune(self.one.model, "random(keep=1.0)") as report, torch.no_grad():
                self.one.model(**prompt_of(self.one, kind))
            found[kind] = _pictures_of(report.calls[0].layouts)
        return found

    def _given(self, kind: str) -> dict[str, Any]:
        return {"question": QUESTION, "frames": self._pictures[kind]}

    def refusal(self) -> str | None:
        """Why the family refuses the recipe; None if it does not."""
        for kind in ("alone", "second", "batch"):
            self.plain(kind)
        disturb(1)
        try:
            self.run("alone")
        except UnsupportedModelError as error:
            left = differences(self.before, snapshot(self.one.model))
            hold(not left, f"refused, but the model has changed: {some(left)}")
            return first_line(error)
        return None

    # -- checks; each says why it is left out

    def check_traces(self) -> None:
        left = differences(self.before, snapshot(self.one.model))
        hold(not left, f"the model has changed: {some(left)}")
        again = generate(self.one, self.plain("alone").inputs)
        hold(same(again, self.plain("alone").output), "the model answers otherwise than before")

    def check_again(self) -> None:
        first = self.run("alone")
        self.run("second")
        disturb(2)
        again = self._run("alone", self.recipe)
        _compare(first.calls, again.calls, "the second time")
        hold(same(again.output, first.output), "the same prompt was answered in two ways")

    def check_budget(self) -> None:
        adapter = adapter_for(self.one.model)
        steps = self.recipe.steps(adapter.shape)
        layouts = self.run("alone").calls[0].layouts
        for decision, candidates in self.run("alone").replay.steps:
            at_cache = isinstance(decision.site, Cache)
            layered = at_cache or isinstance(decision.site, Layer)
            there = Candidates(
                layout=layouts[0],
                rows=torch.searchsorted(layouts[0].position, candidates.contiguous()),
                shape=adapter.shape,
                layer=decision.layer if layered else None,
            )
            budgets = [
                step.stage.budget(there)
                for step in steps
                if step.number == decision.step and step.stage.site == decision.site
            ]
            kept = decision.kept.shape[-1]
            told = " or ".join(f"{one.least} to {one.most}" for one in budgets)
            hold(
                any(one.least <= kept <= one.most for one in budgets),
                f"{decision}, but the budget says {told}",
            )

    def check_everything(self) -> str | None:
        if self.everything is None:
            return "not every method has keep=1.0; give keep_all"
        run = self._run("alone", self.everything)
        for decision, candidates in run.replay.steps:
            hold(torch.equal(decision.kept, candidates), f"{self.everything} drops: {decision}")
        largest = (logits_of(run.output) - logits_of(self.plain("alone").output)).abs().max()
        hold(
            same(run.output, self.plain("alone").output),
            f"{self.everything} is not bit-identical to the unpruned model: logits differ by "
            f"{float(largest):.2e}",
        )
        return None

    def check_oracle(self) -> None:
        assert_matches_oracle(self.run("alone"))

    def check_oracle_in_a_batch(self) -> None:
        assert_matches_oracle(self.run("batch"))

    def check_batch(self) -> str | None:
        batch = self.run("batch")
        for row, kind in enumerate(("alone", "second")):
            unpadded = logits_of(self.plain(kind).output)[0]
            if (logits_of(self.plain("batch").output)[row] - unpadded).abs().max() > 1e-3:
                return "this release of transformers lets padding leak in this family"
            alone = self.run(kind)
            shift = batch.prompt_length - alone.prompt_length
            _compare(alone.calls, batch.calls, f"in row {row} of a batch", row, shift)
            assert_close(logits_of(batch.output)[row], logits_of(alone.output)[0])
        return None

    def check_second_turn(self) -> None:
        inputs = self.plain("alone").inputs
        with positions_logged(decoder_of(self.one.model)) as log:
            second_turn(self.one, inputs)
        with prune(self.one.model, self.recipe, **self._given("alone")) as report:
            output, length = second_turn(self.one, inputs)
        read = output.sequences[:, :-1]
        replay = replay_of(self.one, self.recipe, report.calls, *read.shape)
        expected = dense_logits(self.one.model, inputs, read, replay, log.whole())
        assert_close(logits_of(output), expected[:, length - 1 :])

    def check_plan(self) -> str | None:
        run, adapter = self.run("alone"), adapter_for(self.one.model)
        prompt = Prompt.of(adapter, dict(run.inputs))
        found = forecast(prompt, self.recipe.steps(adapter.shape))
        if not all(found.exact):
            return "what is seen decides how many stay"
        [call] = run.calls
        for what in ("media_tokens", "kv_bytes_after"):
            planned, happened = getattr(found.call, what), getattr(call, what)
            hold(planned == happened, f"{what} was planned as {planned} and became {happened}")
        return None


def _compare(calls: list[Any], others: list[Any], when: str, row: int = 0, shift: int = 0) -> None:
    """Hold decisions on one prompt to those on the same prompt elsewhere.

    Args:
        calls: The prompt alone.
        others: The prompt as a row of a batch.
        when: Where the others come from, in words.
        row: Which row.
        shift: How far it was moved to the right by padding.
    """
    mine = calls[0].decisions
    theirs = [one for one in others[0].decisions if one.sample == row]
    hold(len(mine) == len(theirs), f"{len(theirs)} decisions {when}, and {len(mine)} before")
    for one, other in zip(mine, theirs, strict=True):
        moved = one.kept + shift
        if moved.shape == other.kept.shape:
            differ = int((moved != other.kept).sum())
            told = f"{differ} of {moved.numel()} kept tokens differ"
        else:
            told = f"{other.kept.shape[-1]} tokens are kept, not {moved.shape[-1]}"
        hold(torch.equal(moved, other.kept), f"{when} {told} ({one})")


def _everything(recipe: Recipe) -> Recipe | None:
    """The recipe with nothing pruned, if all its methods have `keep=1.0`."""
    found: list[Method] = []
    for method in recipe.methods:
        settings: Any = method  # a dataclass
        if "keep" not in {one.name for one in fields(settings)}:
            return None
        try:
            found.append(cast("Method", replace(settings, keep=1.0)))
        except RecipeError:
            return None
    return Recipe(*found)


def _pictures_of(layouts: list[TokenLayout]) -> list[Tensor]:
    """Pictures `[F, 3, H, W]` of each clip of a batch, or of each image without clips."""
    clips = any(bool((one.modality == VIDEO).any()) for one in layouts)
    generator = torch.Generator().manual_seed(0)
    found = []
    for layout in layouts:
        for item in sorted(set(layout.item.tolist())):
            mine = layout.frame[(layout.item == item) & (layout.row >= 0)]
            if len(mine) and (not clips or bool((mine >= 0).all())):
                size = (max(1, int(mine.max()) + 1), 3, 28, 28)
                found.append(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8))
    return found
