"""Layers on several devices, as `device_map` spreads them: index tensors follow what they index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

from tests.contract.cases import COMBINED, EVERYWHERE, THREE, refusal
from tests.contract.devices import FIRST, HOST, SECOND, Devices, device_of, place, place_module
from tokenprune import Session, prune
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.engine.state import cache_from_state, cache_state
from tokenprune.models.load import load_model
from tokenprune.testing import tiny
from tokenprune.testing.harness import generate, logits_of, prompt_of, pruned
from tokenprune.testing.tiny import FAMILIES, decoder_of

SHORT = (*THREE, "gemma3", "qwen3_vl")
"""With windows, and with features that early layers add."""


def spread(model: Any) -> None:
    """The tower and two layers on the first device, the other layers and the head on the second.

    accelerate moves what a layer is given, and leaves there what it returns.
    """
    language_model = decoder_of(model)
    late = [*language_model.layers[2:], language_model.norm, model.get_output_embeddings()]
    for modules, device in ((language_model.layers[:2], FIRST), (late, SECOND)):
        for module in modules:
            add_hook_to_module(module, AlignDevicesHook(execution_device=device))
    place_module(model, FIRST)
    for module in late:
        place_module(module, SECOND)


def placed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the first device."""
    return {
        name: place(value.clone(), FIRST) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def test_devices_are_kept_apart() -> None:
    with Devices():
        one, other = torch.ones(3, device=FIRST), torch.ones(3).to(SECOND)
        assert one.device == FIRST and other.device == SECOND and other.cpu().device == HOST
        assert (one * torch.tensor(2.0))[torch.tensor([0, 1])].device == FIRST
        assert one.to(other).device == other.to(torch.float64).device == SECOND
        for fails in (
            lambda: one + other,
            lambda: one + other.cpu(),
            lambda: one[other.long()],
            lambda: nn.functional.linear(one, other[None]),
        ):
            with pytest.raises(AssertionError, match="of tensors on"):
                fails()
    assert one.device == HOST


def cases() -> list[Any]:
    return [
        pytest.param(name, recipe, marks=() if name in SHORT else pytest.mark.full)
        for name in FAMILIES
        for recipe in ("none", EVERYWHERE, COMBINED[1], "plphp(keep=0.5)")
        if refusal(recipe, name) is None
    ]


@pytest.mark.parametrize("name, recipe", cases())
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_devices_give_the_same_as_one(
    name: str, recipe: str, kind: str, attention: str
) -> None:
    one = tiny.build(name, attention=attention)
    spread(one.model)
    inputs = placed(prompt_of(one, kind))
    with Devices(), prune(one.model, recipe):
        output = generate(one, inputs)
    cache = output.past_key_values
    assert [device_of(layer.keys) for layer in cache.layers] == [FIRST] * 2 + [SECOND] * 3
    expected = pruned(name, recipe, kind, attention).output
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(logits_of(output), logits_of(expected))


@torch.no_grad()
def test_a_stored_cache_goes_to_where_its_layers_are() -> None:
    one = tiny.build("llava_onevision")
    spread(one.model)
    run = pruned("llava_onevision", EVERYWHERE)
    config = decoder_of(one.model).config
    with Devices(), prune(one.model, EVERYWHERE):
        cache = one.model(**placed(run.inputs), use_cache=True).past_key_values
        cache = cache_from_state(config, *cache_state(cache), FIRST)
        assert {device_of(layer.keys) for layer in cache.layers} == {FIRST}
        found = []
        for at in range(run.prompt_length, run.read.shape[1]):
            token = place(run.read[:, at : at + 1], FIRST)
            found.append(one.model(input_ids=token, **{CACHE_NAME: cache}).logits[:, -1])
    assert torch.equal(torch.stack(found, dim=1), logits_of(run.output)[:, 1:])


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_a_session_over_two_devices(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    frames = torch.randint(0, 256, (8, 3, 56, 56), dtype=torch.uint8)

    def ask(model: Any, processor: Any) -> list[Tensor]:
        answers = []
        with Session(model, processor, "uniform(keep=0.5)", group=4) as session:
            session.watch(frames, fps=2.0)
            for question in ("what?", "who is there?"):
                answers.append(session.generate(question, max_new_tokens=6, do_sample=False))
            session.save(tmp_path / "kept.safetensors")
        with Session.load(tmp_path / "kept.safetensors", model, processor) as session:
            answers.append(session.generate("what?", max_new_tokens=6, do_sample=False))
        return answers

    one = load_model(str(checkpoint(name)), device="cpu")
    expected = ask(one.model, one.processor)
    spread(one.model)
    with Devices():
        found = ask(one.model, one.processor)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
