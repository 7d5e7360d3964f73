"""Pruning amid what else goes on around a model: text alone, other precisions, accelerate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

from tests.contract.cases import COMBINED, EVERYWHERE, THREE, keep_all, refusal
from tokenprune import prune
from tokenprune.testing import tiny
from tokenprune.testing.harness import (
    generate,
    logits_of,
    model_of,
    prompt_of,
    pruned,
    replay_of,
    unpruned,
)
from tokenprune.testing.oracle import assert_close, dense_logits
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import FAMILIES, decoder_of


def text_only(one: tiny.Tiny, length: int = 12) -> dict[str, Any]:
    ids = torch.randint(5, 140, (1, length), generator=torch.Generator().manual_seed(4))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in prompt_of(one):
        inputs["mm_token_type_ids"] = torch.zeros_like(prompt_of(one)["mm_token_type_ids"])[:, :1]
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"].expand(1, length)
    return inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_is_left_as_it_is(name: str) -> None:
    one = model_of(name)
    inputs = text_only(one)
    expected = generate(one, inputs)
    with prune(one.model, EVERYWHERE) as report:
        # A prompt with media before it leaves nothing behind.
        generate(one, prompt_of(one))
        output = generate(one, inputs)
    assert torch.equal(logits_of(output), logits_of(expected))
    assert len([call for call in report.calls if call.decisions]) == 1


@pytest.mark.parametrize("recipe", [EVERYWHERE, COMBINED[1]])
@pytest.mark.parametrize("name", ["llava", "internvl", "llava_next", "qwen2_vl", "qwen2_audio"])
def test_a_row_without_media_is_left_as_it_is(name: str, recipe: str) -> None:
    if refusal(recipe, name):
        recipe = EVERYWHERE
    one = model_of(name)
    text, media = text_only(one), prompt_of(one)
    length = media["input_ids"].shape[1]
    inputs = dict(media)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in media:
            row = torch.nn.functional.pad(text[key], (length - text[key].shape[1], 0))
            inputs[key] = torch.cat([row, media[key]])
    with prune(one.model, recipe):
        output = generate(one, inputs)
    assert_close(logits_of(output)[0], logits_of(generate(one, text))[0])
    assert_close(logits_of(output)[1], logits_of(pruned(name, recipe).output)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", [EVERYWHERE, COMBINED[1]])
@pytest.mark.parametrize("name", [*THREE, "qwen3_vl"])
def test_half_precision(name: str, recipe: str, dtype: torch.dtype) -> None:
    if refusal(recipe, name):
        recipe = EVERYWHERE
    one = tiny.build(name)
    one.model.to(dtype)
    inputs = {
        key: value.to(dtype) if value.is_floating_point() and "second" not in key else value
        for key, value in prompt_of(one).items()
    }
    plain = generate(one, inputs)
    with prune(one.model, keep_all(recipe)):
        assert torch.equal(logits_of(generate(one, inputs)), logits_of(plain))
    with prune(one.model, recipe) as report:
        output = generate(one, inputs)
    assert output.past_key_values.layers[0].keys.dtype == dtype
    # Against the dense model in float32: as near as half the bits get without pruning.
    replay = replay_of(one, recipe, report.calls, *output.sequences[:, :-1].shape)
    one.model.float()
    positions = unpruned(name).positions
    inputs = prompt_of(one)
    start = inputs["input_ids"].shape[1] - 1
    noise = logits_of(plain).float()[:, 0] - logits_of(unpruned(name).output)[:, 0]
    exact = dense_logits(one.model, inputs, output.sequences[:, :-1], replay, positions)
    difference = logits_of(output).float()[:, 0] - exact[:, start]
    assert difference.abs().max() < 4 * noise.abs().max() + 0.05


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_gradients_pass_through(name: str) -> None:
    one = tiny.build(name)
    with prune(one.model, COMBINED[1]):
        logits = one.model(**prompt_of(one), use_cache=False).logits
        logits[:, -1].logsumexp(-1).sum().backward()
    gradients = [p.grad for p in one.model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    tower = getattr(one.model.model, "visual", None) or one.model.model.vision_tower
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in tower.parameters())


@pytest.mark.parametrize("name", THREE)
def test_hooks_of_accelerate_stay(name: str) -> None:
    """With `device_map` accelerate puts a forward of its own on each module."""
    one = tiny.build(name)
    language_model = decoder_of(one.model)
    for module in (language_model, *language_model.layers):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    plain = generate(one, prompt_of(one))
    before = snapshot(one.model)
    forward = language_model.forward
    with prune(one.model, keep_all(EVERYWHERE)):
        assert torch.equal(logits_of(generate(one, prompt_of(one))), logits_of(plain))
    with prune(one.model, EVERYWHERE):
        output = generate(one, prompt_of(one))
    assert_close(logits_of(output), logits_of(pruned(name, EVERYWHERE).output))
    assert language_model.forward is forward
    assert snapshot(one.model) == before
    remove_hook_from_submodules(one.model)
