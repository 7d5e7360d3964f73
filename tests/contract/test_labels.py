"""Losses and log-likelihoods under pruning, by the oracle: its loss over the rows that are left."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.cases import (
    COMBINED,
    EVERYWHERE,
    ONE_PER_SITE,
    THREE,
    keep_all,
    refusal,
    uses,
)
from tests.releases import NEWEST
from tokenprune import prune
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.testing import tiny
from tokenprune.testing.harness import model_of, prompt_of, replay_of
from tokenprune.testing.oracle import Replay, assert_close, dense_logits
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import FAMILIES, NAMES, Tiny
from tokenprune.testing.tiny.releases import RELEASE

RECIPES = [EVERYWHERE, *ONE_PER_SITE, COMBINED[1]]

dense_logits_and_gradients = inspect.unwrap(dense_logits)


def labels_of(one: Tiny, inputs: dict[str, Any]) -> Tensor:
    """Every token but media, what is around them, padding, and the token that padding precedes."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    text = real & ~torch.isin(ids, torch.tensor(one.suppress))
    text[:, 1:] &= real[:, :-1]
    return torch.where(text, ids, -100)


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs for a model in double precision (but for its norms, which transformers casts)."""
    return {
        key: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one
        for key, one in inputs.items()
    }


def rows_left(inputs: dict[str, Any], replay: Replay) -> Tensor:
    """`[B, S]`: rows of tokens that come out of the last layer."""
    left = inputs["attention_mask"].bool()
    for gone in replay.gone.values():
        left = left & ~gone
    return left


def expected_loss(logits: Tensor, labels: Tensor, left: Tensor) -> Tensor:
    """Row by row: what is left at `p` predicts the label at `p + 1`."""
    found = []
    for sample, row in left[:, :-1].nonzero().tolist():
        label = labels[sample, row + 1]
        if label != -100:
            found.append(nn.functional.cross_entropy(logits[sample, row], label))
    return torch.stack(found).mean()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """By parameter; those that the loss does not depend on are left out."""
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: one for name, one in zip(named, found, strict=True) if one is not None}


def assert_same_gradients(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Each as close as logits are, relative to the largest of its parameter."""
    assert got.keys() == expected.keys()
    for name, one in expected.items():
        scale = float(one.abs().max())
        difference = float((got[name] - one).abs().max())
        # What is nothing but rounding (the bias of keys) has no scale of its own.
        assert difference <= tolerance * max(scale, 1e-2), (
            f"{name}: {difference:.2e} of {scale:.2e}"
        )


# -- losses


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["alone", "batch"])
def test_keep_all_losses_are_bit_identical(name: str, kind: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one, kind)
    labels = labels_of(one, inputs)
    expected = one.model(**inputs, labels=labels)
    before = snapshot(one.model)
    with prune(one.model, keep_all(EVERYWHERE)):
        got = one.model(**inputs, labels=labels)
    assert snapshot(one.model) == before
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.logits, expected.logits)
    assert got.keys() == expected.keys()
    here, there = gradients(one.model, got.loss), gradients(one.model, expected.loss)
    assert here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in there)


@pytest.mark.parametrize("name, recipe", uses(RECIPES))
@pytest.mark.parametrize("kind", ["alone", "batch"])
def test_losses_and_gradients_match_the_oracle(name: str, recipe: str, kind: str) -> None:
    if refusal(recipe, name):
        pytest.skip("refused")
    one = model_of(name)
    check_against_oracle(one, recipe, prompt_of(one, kind))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in THREE])
def test_every_family_has_the_loss_of_the_oracle(name: str) -> None:
    one = tiny.build(name)
    inputs = prompt_of(one, "batch")
    if name.endswith("_moe"):  # experts know no double precision
        check_against_oracle(one, EVERYWHERE, inputs)
        return
    one.model.double()
    check_against_oracle(one, EVERYWHERE, in_double(inputs), tolerance=1e-6)


def check_against_oracle(
    one: Tiny,
    recipe: str,
    inputs: dict[str, Any],
    labels: Tensor | None = None,
    tolerance: float = 1e-5,
) -> None:
    labels = labels_of(one, inputs) if labels is None else labels
    with prune(one.model, recipe) as report:
        output = one.model(**inputs, labels=labels)
    replay = replay_of(one, recipe, report.calls, *labels.shape)
    dense = dense_logits_and_gradients(one.model, inputs, inputs["input_ids"], replay)
    left = rows_left(inputs, replay)
    expected = expected_loss(dense, labels, left)
    assert_close(output.loss.detach(), expected.detach(), "loss")
    found, wanted = gradients(one.model, output.loss), gradients(one.model, expected)
    assert_same_gradients(found, wanted, tolerance)


@pytest.mark.parametrize("name", [*THREE, "granite_speech"])
@pytest.mark.parametrize("kind", ["alone", "batch"])
def test_labels_of_media_are_targets_of_the_rows_before_them(name: str, kind: str) -> None:
    """Also where the token itself was dropped; by default media are no targets."""
    one = model_of(name)
    inputs = prompt_of(one, kind)
    real = inputs["attention_mask"].bool()
    real[:, 1:] &= inputs["attention_mask"].bool()[:, :-1]
    labels = torch.where(real, inputs["input_ids"], -100)
    check_against_oracle(one, EVERYWHERE, inputs, labels)


@pytest.mark.parametrize("name", ["llava", "qwen2_audio"])
def test_the_last_row_has_its_target_where_media_end_the_prompt(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one)
    media = torch.isin(inputs["input_ids"], torch.tensor(one.suppress))
    end = int(media.nonzero()[-1, 1]) + (1 if name == "llava" else 0)
    inputs |= {key: inputs[key][:, :end] for key in ("input_ids", "attention_mask")}
    recipe = "uniform(keep=2)"
    with prune(one.model, recipe) as report:
        one.model(**inputs)
    assert report.last.logit_rows is not None
    assert int(report.last.logit_rows[0, -1]) < end - 1, "the last token was to be dropped"
    check_against_oracle(one, recipe, inputs, inputs["input_ids"])


def test_a_row_is_not_paired_with_the_row_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What narrowed labels would do: the last text before media would predict a media token."""

    def next_row(rows: Tensor, labels: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        narrowed = labels.gather(1, rows.clamp_min(0))
        return nn.functional.pad(narrowed[:, 1:], (0, 1), value=-100)

    monkeypatch.setattr("tokenprune.engine.labels._targets", next_row)
    one = model_of("llava")
    inputs = prompt_of(one)
    with pytest.raises(AssertionError, match="loss differ"):
        check_against_oracle(one, EVERYWHERE, inputs, inputs["input_ids"])


@pytest.mark.parametrize("name", THREE)
def test_labels_of_the_last_tokens_only(name: str) -> None:
    """As they go with `logits_to_keep`: `[B, n]`, of which the first predicts nothing."""
    one = model_of(name)
    inputs = prompt_of(one)
    labels = labels_of(one, inputs)
    last = labels.clone()
    last[:, :-4] = -100
    cut = {} if name == "qwen2_audio" else {"logits_to_keep": 5}
    with prune(one.model, EVERYWHERE):
        expected = one.model(**inputs, labels=last).loss
        got = one.model(**inputs, labels=labels[:, -5:], **cut).loss
        also = one.model(**inputs, labels=labels, **cut).loss
    assert_close(got.detach(), expected.detach(), "loss")
    if cut:
        assert_close(also.detach(), expected.detach(), "loss")
    with prune(one.model, EVERYWHERE), pytest.raises(UnsupportedModelError, match="labels must be"):
        one.model(**inputs, labels=torch.cat([labels, labels], dim=1))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_settings_of_the_loss_reach_it(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one, "batch")
    labels = labels_of(one, inputs)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with prune(one.model, EVERYWHERE) as report:
        expected = one.model(**inputs, labels=labels).loss.detach()
        summed = one.model(**inputs, labels=labels, num_items_in_batch=3).loss.detach()
        given = one.model(**inputs, labels=labels * 0 - 100, shift_labels=shifted).loss.detach()
        others = torch.where(labels == -100, -7, labels)
        ignoring = one.model(**inputs, labels=others, ignore_index=-7).loss.detach()
    rows = report.last.logit_rows
    assert rows is not None
    targets = shifted.gather(1, rows.clamp_min(0)).masked_fill(rows < 0, -100) != -100
    assert_close(summed, expected * int(targets.sum()) / 3, "sum")
    assert torch.equal(given, expected) and torch.equal(ignoring, expected)


def test_a_loss_of_the_users_own_may_shift_labels_itself() -> None:
    one = model_of("llava")
    inputs = prompt_of(one, "batch")
    labels = labels_of(one, inputs)

    def mine(logits: Tensor, labels: Tensor, vocab_size: int, **others: Any) -> Tensor:
        flat, targets = logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1)
        return 2 * nn.functional.cross_entropy(flat, targets)

    with prune(one.model, EVERYWHERE):
        expected = 2 * one.model(**inputs, labels=labels).loss
    one.model.loss_function = mine
    try:
        with prune(one.model, EVERYWHERE):
            got = one.model(**inputs, labels=labels).loss
        assert one.model.loss_function is mine
    finally:
        del one.model._loss_function
    assert_close(got.detach(), expected.detach(), "loss")


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_audio", "granite_speech"])
def test_a_tuple_begins_with_the_loss(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one)
    labels = labels_of(one, inputs)
    with prune(one.model, EVERYWHERE):
        expected = one.model(**inputs, labels=labels)
        got = one.model(**inputs, labels=labels, return_dict=False)
        without = one.model(**inputs, return_dict=False)
    assert next(iter(expected)) == "loss"
    assert torch.equal(got[0], expected.loss) and torch.equal(got[1], expected.logits)
    assert torch.equal(without[0], expected.logits)


@pytest.mark.parametrize("name", ["qwen2_audio", "llava"])
def test_losses_in_half_precision_are_those_of_the_model(name: str) -> None:
    one = tiny.build(name)
    one.model.bfloat16()
    inputs = prompt_of(one, "batch")
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    labels = labels_of(one, inputs)
    expected = one.model(**inputs, labels=labels).loss
    with prune(one.model, keep_all(EVERYWHERE)):
        assert torch.equal(one.model(**inputs, labels=labels).loss, expected)


def test_adapters_train_under_pruning() -> None:
    """A few steps bring the loss down, with the model in training mode."""
    one = tiny.build("qwen2_5_vl")
    inputs = prompt_of(one, "batch")
    labels = labels_of(one, inputs)
    optimizer = torch.optim.SGD(one.model.parameters(), lr=0.05)
    one.model.train()
    losses = []
    with prune(one.model, EVERYWHERE):
        for _ in range(4):
            optimizer.zero_grad()
            loss = one.model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_layers_that_are_computed_twice_are_refused() -> None:
    one = tiny.build("llava")
    inputs = prompt_of(one)
    one.model.train()
    one.model.gradient_checkpointing_enable()
    with prune(one.model, EVERYWHERE), pytest.raises(UnsupportedModelError, match="checkpointed"):
        one.model(**inputs, labels=labels_of(one, inputs))


# -- which row is which


@pytest.mark.parametrize("name, recipe", uses(RECIPES))
@pytest.mark.parametrize("kind", ["alone", "batch"])
@torch.no_grad()
def test_log_likelihoods_of_text_match_the_oracle(name: str, recipe: str, kind: str) -> None:
    if refusal(recipe, name):
        pytest.skip("refused")
    one = model_of(name)
    inputs = prompt_of(one, kind)
    with prune(one.model, recipe) as report:
        logits = one.model(**inputs).logits
    replay = replay_of(one, recipe, report.calls, *inputs["input_ids"].shape)
    dense = dense_logits(one.model, inputs, inputs["input_ids"], replay)
    left = rows_left(inputs, replay)
    spread = report.scatter_logits(logits)
    assert_close(spread[left], dense[left])
    gone = inputs["attention_mask"].bool() & ~left
    assert spread[gone].isnan().all()
    labels = labels_of(one, inputs)
    scored = left[:, :-1] & (labels[:, 1:] != -100)

    def likelihood(of: Tensor) -> Tensor:
        words = of[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp_min(0))[..., 0]
        return torch.where(scored, words, 0).sum(1)

    assert_close(likelihood(spread), likelihood(dense), "log-likelihood")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_rows_of_a_forward_that_cuts_its_logits(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one, "batch")
    with prune(one.model, EVERYWHERE) as report:
        whole = one.model(**inputs).logits
        rows = report.last.logit_rows
        cut = one.model(**inputs, logits_to_keep=3).logits
    assert rows is not None and report.last.logit_rows is not None
    assert rows.shape == whole.shape[:2] and rows.dtype == torch.int64
    assert (rows[:, -1] == inputs["input_ids"].shape[1] - 1).all()
    kept = rows[rows >= 0]
    assert inputs["attention_mask"].bool()[:, kept.unique()].any(0).all()
    assert cut.shape[1] in (3, whole.shape[1])
    assert torch.equal(report.last.logit_rows, rows[:, -cut.shape[1] :])
    assert_close(report.scatter_logits(cut)[:, -3:], report_of(rows[:, -3:], whole[:, -3:]))


def report_of(rows: Tensor, logits: Tensor) -> Tensor:
    """The closing text is never pruned."""
    assert (rows.diff(dim=1) == 1).all()
    return logits


@torch.no_grad()
def test_rows_of_a_generation_are_those_of_the_logits_it_computed() -> None:
    one = model_of("llava")
    inputs = prompt_of(one)
    with prune(one.model, EVERYWHERE) as report:
        one.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert report.last.logit_rows is not None
    assert report.last.logit_rows.tolist() == [[inputs["input_ids"].shape[1] - 1]]
    with pytest.raises(TokenPruneError, match=r"for the rows \(1, 1\), got \(1, 5, 9\)"):
        report.scatter_logits(torch.zeros(1, 5, 9))


@torch.no_grad()
def test_rows_count_on_after_what_is_in_the_cache() -> None:
    """A second picture, after the cache that the first has left."""
    one = model_of("llava")
    first, second = prompt_of(one), prompt_of(one, "second")
    lengths = [first["input_ids"].shape[1], second["input_ids"].shape[1]]
    labels = labels_of(one, second)
    mask = torch.ones(1, sum(lengths), dtype=torch.int64)
    with prune(one.model, EVERYWHERE) as report:
        cache = one.model(**first, use_cache=True).past_key_values
        more = {**second, "attention_mask": mask, CACHE_NAME: cache, "labels": labels}
        output = one.model(**more)
    rows = report.last.logit_rows
    assert rows is not None
    assert rows.min() >= lengths[0] and rows[0, -1] == sum(lengths) - 1
    spread = report.scatter_logits(output.logits)
    assert spread.shape[1] == sum(lengths) and spread[:, : lengths[0]].isnan().all()
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)[0, rows[0] - lengths[0]]
    assert_close(output.loss, nn.functional.cross_entropy(output.logits[0], targets), "loss")


@torch.no_grad()
def test_rows_by_number_are_refused_where_some_are_gone() -> None:
    one = model_of("llava")
    inputs = prompt_of(one)
    length = inputs["input_ids"].shape[1]
    wanted = [torch.tensor([3, length - 1])]
    if RELEASE >= NEWEST:  # of each row its own
        wanted.append(wanted[0][None])
        wanted.append(torch.zeros(1, length, dtype=torch.bool).scatter(1, wanted[1], True))
    for rows in wanted:
        with prune(one.model, keep_all(EVERYWHERE)) as report:
            logits = one.model(**inputs, logits_to_keep=rows).logits
        assert report.last.logit_rows is not None
        assert report.last.logit_rows.shape == logits.shape[:-1]
        assert report.last.logit_rows.flatten().tolist() == [3, length - 1]
        with prune(one.model, EVERYWHERE), pytest.raises(UnsupportedModelError, match="as a tens"):
            one.model(**inputs, logits_to_keep=rows)


@torch.no_grad()
def test_balance_of_experts_is_refused_where_rows_are_gone() -> None:
    one = model_of("qwen3_omni_moe")
    inputs = prompt_of(one)
    asked = {"labels": labels_of(one, inputs), "output_router_logits": True}
    expected = one.model(**inputs, **asked)
    with prune(one.model, keep_all(EVERYWHERE)):
        assert torch.equal(one.model(**inputs, **asked).loss, expected.loss)
    with prune(one.model, EVERYWHERE), pytest.raises(UnsupportedModelError, match="experts"):
        one.model(**inputs, **asked)
