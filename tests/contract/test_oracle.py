"""The oracle itself: without decisions it is the plain model, with them it hides what it should."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tokenprune.testing.harness import (
    NEW_TOKENS,
    generate,
    logits_of,
    model_of,
    prompt_of,
    replay_of,
)
from tokenprune.testing.oracle import (
    Replay,
    assert_close,
    dense_logits,
    positions_logged,
    read_decisions,
)
from tokenprune.testing.tiny import FAMILIES, decoder_of


def plain_run(name: str, kind: str = "alone", attention: str = "sdpa"):
    one = model_of(name, attention)
    inputs = prompt_of(one, kind)
    with positions_logged(decoder_of(one.model)) as log:
        output = generate(one, inputs)
    return one, inputs, output, log.whole()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_without_decisions_it_is_the_model(name: str, kind: str, attention: str) -> None:
    one, inputs, output, positions = plain_run(name, kind, attention)
    dense = dense_logits(one.model, inputs, output.sequences[:, :-1], Replay(), positions)
    assert dense.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS - 1
    assert_close(logits_of(output), dense[:, inputs["input_ids"].shape[1] - 1 :])


def decision(layer: int, kept: torch.Tensor, candidates: int, merge=None):
    return SimpleNamespace(
        method="by hand",
        layer=layer,
        sample=0,
        kept=kept,
        candidates=candidates,
        merge=merge,
        step=0,
    )


def by_hand(name: str, *decisions):
    """One unpruned run, and the oracle with decisions made up on its media tokens."""
    one, inputs, output, positions = plain_run(name)
    ids = inputs["input_ids"][0]
    media = ((ids > 150) & (ids < 153)).nonzero()[:, 0]
    layout = SimpleNamespace(position=media, modality=torch.ones_like(media))
    length = len(ids)
    call = SimpleNamespace(
        layouts=[layout], length=length, decisions=[make(media) for make in decisions]
    )
    replay = read_decisions([call], 1, length + NEW_TOKENS - 1, 2)
    dense = dense_logits(one.model, inputs, output.sequences[:, :-1], replay, positions)
    return logits_of(output), dense[:, length - 1 :], replay


@pytest.mark.parametrize("layer", range(5))
def test_a_dropped_token_is_missed(layer: int) -> None:
    got, dense, _ = by_hand("llava", lambda media: decision(layer, media[3:], 32))
    assert (got - dense).abs().max() > 1e-3


def test_tokens_dropped_at_the_input_are_as_if_never_there() -> None:
    """Against an independent way to leave tokens out: a shorter sequence of embeddings."""
    _, dense, replay = by_hand("llava", lambda media: decision(0, media[::2], 32))
    one, inputs, output, _ = plain_run("llava")
    seen = []
    handle = decoder_of(one.model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    generate(one, inputs)
    handle.remove()
    embeddings = torch.cat(seen, dim=1)
    kept = (~replay.gone[0][0]).nonzero()[:, 0]
    with torch.no_grad():
        out = decoder_of(one.model)(
            inputs_embeds=embeddings[:, kept],
            position_ids=kept[None],
            attention_mask=torch.ones(1, len(kept)),
            use_cache=False,
        )
        shorter = one.model.lm_head(out.last_hidden_state)
    assert_close(shorter[:, -NEW_TOKENS:], dense)


def test_a_cache_entry_is_missed_by_later_queries_only() -> None:
    got, dense, _ = by_hand(
        "llava", lambda media: decision(2, torch.stack([media[:9], media[5:14]]), 32)
    )
    assert_close(dense[:, 0], got[:, 0])
    assert (got[:, 1:] - dense[:, 1:]).abs().amax(-1).min() > 1e-3


def test_a_cache_entry_is_missed_in_its_head_only() -> None:
    masks = by_hand("llava", lambda media: decision(2, torch.stack([media[:9], media[5:14]]), 32))[
        2
    ].dropped
    [(layer, start, mask)] = masks
    assert layer == 2 and mask.sum(-1).tolist() == [[32 - 9, 32 - 9]]
    assert not torch.equal(mask[0, 0], mask[0, 1])


def test_merging_a_token_with_itself_changes_nothing() -> None:
    def make(media):
        one = SimpleNamespace(source=media[:1], target=media[:1], weight=torch.ones(1))
        return decision(0, media, 32, one)

    got, dense, _ = by_hand("llava", make)
    assert_close(dense, got)


def test_merging_moves_the_target() -> None:
    def make(media):
        merge = SimpleNamespace(
            source=media[:2], target=media[[0, 0]], weight=torch.tensor([0.25, 0.75])
        )
        return decision(0, torch.cat([media[:1], media[2:]]), 32, merge)

    def drop(media):
        return decision(0, torch.cat([media[:1], media[2:]]), 32)

    _, merged, _ = by_hand("llava", make)
    _, dropped, _ = by_hand("llava", drop)
    assert (merged - dropped).abs().max() > 1e-3


@pytest.mark.parametrize(
    "made_up, message",
    [
        (lambda media: decision(0, media[3:], 31), "had 32 candidates"),
        (lambda media: decision(0, media[:2] - 2, 32), "kept what was no candidate"),
        (lambda media: decision(0, media[[1, 0]], 32), "do not increase"),
    ],
)
def test_decisions_that_cannot_be_fail(made_up, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        by_hand("llava", made_up)


def test_helpers_agree_on_an_empty_record() -> None:
    assert replay_of(model_of("llava"), "none", [], 1, 9) == Replay()
