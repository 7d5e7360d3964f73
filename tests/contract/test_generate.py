"""What else `generate` can do: mixed prompts, chunks, compiled steps, offloaded weights, drafts."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor
from transformers import GenerationMixin

from tests.contract.beams import failure_of_beams
from tests.contract.cases import (
    COMBINED,
    EVERYWHERE,
    NO_BEAMS,
    NO_CHUNKS,
    THREE,
    TORN_BY_BEAMS,
    keep_all,
    uses,
)
from tests.releases import NEWEST
from tokenprune import prune
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.errors import UnsupportedModelError
from tokenprune.testing import tiny
from tokenprune.testing.harness import (
    NEW_TOKENS,
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
from tokenprune.testing.tiny import AUDIO, AUDIO_END, AUDIO_START, IMAGE, NAMES, VIDEO, decoder_of
from tokenprune.testing.tiny import VISION_END as END
from tokenprune.testing.tiny import VISION_START as START
from tokenprune.testing.tiny.base import merged, noise, pad_batch, patches, prompt
from tokenprune.testing.tiny.releases import OLD, RELEASE

# -- several images, clips and sounds in one prompt

IMAGES = [(1, 4, 8), (1, 8, 4), (1, 8, 12)]
CLIPS = [(2, 4, 8), (3, 4, 4)]


def mixed(name: str, seed: int, closing: int, images: int, clips: int) -> dict[str, Any]:
    """Images and clips in turns, then a sound for a family that hears."""
    generator = torch.Generator().manual_seed(seed)
    if name.startswith("qwen"):
        return mixed_grids(name, generator, closing, IMAGES[:images], CLIPS[:clips])
    image, clip = [IMAGE] * 16, [VIDEO] * 8
    inputs: dict[str, Any] = {}
    if name == "llava_onevision":  # several images are not tiled; each ends with a newline
        image, clip = [IMAGE] * 17, [VIDEO] * 9
        inputs["pixel_values"] = noise(generator, images, 1, 3, 56, 56)
        inputs["image_sizes"] = torch.tensor([[56, 56]] * images)
        inputs["batch_num_images"] = torch.tensor([images])
    else:  # 1x2 tiles of 4x4 patches, of which 4 columns hold the picture, and the base view
        image = [IMAGE] * (16 + 4 * 5)
        inputs["pixel_values"] = noise(generator, images, 3, 3, 56, 56)
        inputs["image_sizes"] = torch.tensor([[56, 56]] * images)
    inputs["pixel_values_videos"] = noise(generator, clips, 2, 3, 56, 56)
    spans = in_turns([image] * images, [clip] * clips)
    ids = prompt(generator, spans, closing)
    return {"input_ids": ids, **inputs, "attention_mask": torch.ones_like(ids)}


def mixed_grids(
    name: str,
    generator: torch.Generator,
    closing: int,
    images: list[tuple[int, int, int]],
    clips: list[tuple[int, int, int]],
) -> dict[str, Any]:
    spans = in_turns(
        [[START] + [IMAGE] * merged(grid) + [END] for grid in images],
        [clip_span(name, grid) for grid in clips],
    )
    inputs: dict[str, Any] = {
        "pixel_values": patches(generator, images),
        "image_grid_thw": torch.tensor(images),
        "pixel_values_videos": patches(generator, clips),
        "video_grid_thw": torch.tensor(clips),
    }
    if name == "qwen2_5_vl" and not OLD:
        inputs["second_per_grid_ts"] = torch.tensor([1.0, 0.5][: len(clips)])
    if name == "qwen2_5_omni":
        inputs["video_second_per_grid"] = torch.tensor([1.0, 0.5][: len(clips)])
        inputs["input_features"] = noise(generator, 1, 16, 48)
        inputs["feature_attention_mask"] = torch.ones(1, 48, dtype=torch.int64)
        spans.append([AUDIO_START] + [AUDIO] * 12 + [AUDIO_END])
    ids = prompt(generator, spans, closing)
    inputs = {"input_ids": ids, **inputs, "attention_mask": torch.ones_like(ids)}
    if name != "qwen2_5_omni":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


def clip_span(name: str, grid: tuple[int, int, int]) -> list[int]:
    """The placeholders of a clip; Qwen3-VL writes each frame on its own."""
    parts = [(1, *grid[1:])] * grid[0] if name == "qwen3_vl" else [grid]
    return [token for part in parts for token in [START] + [VIDEO] * merged(part) + [END]]


def in_turns(one: list[Any], other: list[Any]) -> list[Any]:
    """One of each by turns, then what is left of the longer list."""
    both = [part for pair in zip(one, other, strict=False) for part in pair]
    return both + one[len(other) :] + other[len(one) :]


MIXED = [
    "llava_next_video",
    "llava_onevision",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
]


@pytest.mark.parametrize("recipe", [EVERYWHERE, COMBINED[1], "uniform(keep=0.5 per=frame)"])
@pytest.mark.parametrize("name", MIXED)
def test_several_images_and_clips_match_the_oracle(name: str, recipe: str) -> None:
    if name == "qwen2_5_omni" and "vflowopt" in recipe:
        recipe = "vflowopt(keep=0.4) + uniform(keep=0.5 at=2)"  # it leaves the sound alone
    one = model_of(name)
    inputs = mixed(name, 3, 6, images=3, clips=2)
    with positions_logged(decoder_of(one.model)) as log:
        plain = generate(one, inputs)
    with prune(one.model, keep_all(recipe)):
        assert torch.equal(logits_of(generate(one, inputs)), logits_of(plain))
    with prune(one.model, recipe) as report:
        output = generate(one, inputs)
    [layout] = report.last.layouts
    kinds = [int(layout.modality[layout.item == n][0]) for n in range(int(layout.item.max()) + 1)]
    assert kinds[:5] == [1, 2, 1, 2, 1]
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = dense_logits(one.model, inputs, read, replay, log.whole())
    assert_close(logits_of(output), expected[:, inputs["input_ids"].shape[1] - 1 :])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_batch_of_different_mixtures_equals_each_alone(name: str) -> None:
    one = model_of(name)
    rows = [mixed(name, 3, 6, images=3, clips=2), mixed(name, 4, 9, images=1, clips=1)]
    with prune(one.model, EVERYWHERE):
        alone = [logits_of(generate(one, row)) for row in rows]
        together = logits_of(generate(one, pad_batch(*rows)))
    for got, expected in zip(together, alone, strict=True):
        assert_close(got, expected[0])


# -- prefill in chunks


CHUNKS_HOLD_MEDIA = "mm_encoder_outputs" in inspect.getsource(GenerationMixin._prefill)
in_chunks = pytest.mark.skipif(
    not CHUNKS_HOLD_MEDIA,
    reason="this release of transformers loses media where it prefills in chunks",
)


@pytest.mark.skipif(CHUNKS_HOLD_MEDIA, reason="this release of transformers loses no media")
@pytest.mark.parametrize("size", [7, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_that_lose_media_are_refused(name: str, size: int) -> None:
    one = model_of(name)
    error = failure_of_chunks(one, size)
    if error is not None:
        assert_fails_alike(one, EVERYWHERE, size, error)
        return
    with prune(one.model, EVERYWHERE):
        output = generate(one, prompt_of(one), prefill_chunk_size=size)
    assert_close(logits_of(output), logits_of(pruned(name, EVERYWHERE).output))


@in_chunks
@pytest.mark.parametrize("name, recipe", uses())
def test_a_chunk_that_holds_the_prompt_changes_nothing(name: str, recipe: str) -> None:
    """Where transformers can do without pruning what is asked for."""
    one = model_of(name)
    error = failure_of_chunks(one, 1000)
    assert (error is not None) == (name in NO_CHUNKS), error
    if error is None:
        with prune(one.model, recipe):
            output = generate(one, prompt_of(one), prefill_chunk_size=1000)
        assert_close(logits_of(output), logits_of(pruned(name, recipe).output))
    elif not isinstance(error, AssertionError):
        assert_fails_alike(one, recipe, 1000, error)


@in_chunks
@pytest.mark.parametrize("name", NAMES)
def test_chunks_that_cut_media_are_refused(name: str) -> None:
    """By us where media are encoded ahead, by transformers where they are not."""
    one = model_of(name)
    error = failure_of_chunks(one, 7)
    if isinstance(error, TypeError | IndexError):  # it stumbles instead
        assert name in (*NO_CHUNKS, "video_llama_3", "video_llama_3_image")
        assert_fails_alike(one, EVERYWHERE, 7, error)
        return
    before = snapshot(one.model)
    with pytest.raises(ValueError, match="prefill_chunk_size=None"), prune(one.model, EVERYWHERE):
        generate(one, prompt_of(one), prefill_chunk_size=7)
    assert snapshot(one.model) == before
    assert torch.equal(logits_of(generate(one, prompt_of(one))), logits_of(unpruned(name).output))


def failure_of_chunks(one: tiny.Tiny, size: int) -> Exception | None:
    """What goes wrong in transformers, without pruning, with a prefill in chunks."""
    try:
        output = generate(one, prompt_of(one), prefill_chunk_size=size)
        assert_close(logits_of(output), logits_of(unpruned(one.name).output))
    except (
        AssertionError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return error
    return None


def assert_fails_alike(one: tiny.Tiny, recipe: str, size: int, error: Exception) -> None:
    """Pruned as unpruned, with nothing left behind."""
    before = snapshot(one.model)
    with pytest.raises((type(error), UnsupportedModelError)), prune(one.model, recipe):
        generate(one, prompt_of(one), prefill_chunk_size=size)
    assert snapshot(one.model) == before
    expected = logits_of(unpruned(one.name).output)
    assert torch.equal(logits_of(generate(one, prompt_of(one))), expected)


@in_chunks
@pytest.mark.parametrize("name", THREE)
def test_a_second_turn_may_be_read_in_chunks(name: str) -> None:
    one = model_of(name)
    inputs = prompt_of(one)
    found = []
    for settings in ({}, {"prefill_chunk_size": 4}):
        with prune(one.model, EVERYWHERE):
            first = generate(one, inputs)
            more = torch.randint(5, 140, (1, 11), generator=torch.Generator().manual_seed(1))
            tokens = torch.cat([first.sequences, more], dim=1)
            grown = tokens.shape[1] - inputs["input_ids"].shape[1]
            turn = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            if "mm_token_type_ids" in inputs:
                kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, grown))
                turn["mm_token_type_ids"] = kinds
            output = generate(one, turn, **{CACHE_NAME: first.past_key_values}, **settings)
        found.append(logits_of(output))
    assert_close(found[1], found[0])


# -- beams


@pytest.mark.parametrize("name", NAMES)
def test_media_that_would_go_to_the_wrong_beams_are_refused(name: str) -> None:
    one = model_of(name)
    error = failure_of_beams(name, "alone")
    if RELEASE >= NEWEST:
        assert (error is not None) == (name in (*TORN_BY_BEAMS, *NO_BEAMS)), error
    before = snapshot(one.model)
    for settings in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with prune(one.model, EVERYWHERE) as report:
            if error is None:
                generate(one, prompt_of(one), **settings)
            elif isinstance(error, AssertionError):
                with pytest.raises(UnsupportedModelError, match="to the wrong ones of 1 rows"):
                    generate(one, prompt_of(one), **settings)
            else:
                with pytest.raises((type(error), UnsupportedModelError)):
                    generate(one, prompt_of(one), **settings)
        assert len(report.calls) == (error is None), "refused before any work"
    assert snapshot(one.model) == before


# -- compiled, offloaded, drafted


COMPILED = [("eager", name) for name in THREE] + [("aot_eager", "qwen2_5_vl")]
FULLY_COMPILED = [(backend, name) for backend in ("aot_eager", "inductor") for name in THREE]


@pytest.mark.parametrize(
    "backend, name",
    [
        *COMPILED,
        *(
            pytest.param(*one, marks=pytest.mark.full)
            for one in FULLY_COMPILED
            if one not in COMPILED
        ),
    ],
)
@torch.no_grad()
def test_a_compiled_decoder_gives_the_same_logits(name: str, backend: str) -> None:
    """The language model is compiled inside the block, as it runs when a step is decoded."""
    one = tiny.build(name)
    run = pruned(name, EVERYWHERE)
    torch._dynamo.reset()
    graphs = 0

    def count(graph: Any, examples: Any) -> Any:
        nonlocal graphs
        graphs += 1
        if backend == "eager":
            return graph.forward
        return torch._dynamo.lookup_backend(backend)(graph, examples)

    position = run.positions
    with prune(one.model, EVERYWHERE) as report:
        cache = one.model(**run.inputs, use_cache=True).past_key_values
        step = torch.compile(one.model, backend=count, dynamic=True)
        found = []
        for at in range(run.prompt_length, run.read.shape[1]):
            more = {} if position is None else {"position_ids": position[..., at : at + 1]}
            tokens = run.read[:, at : at + 1]
            output = step(input_ids=tokens, **{CACHE_NAME: cache}, use_cache=True, **more)
            found.append(output.logits[:, -1])
    torch._dynamo.reset()
    # Once for all steps. (Unpruned, too, dynamo has other backends make each graph twice.)
    expected = 1 if backend == "eager" else 2
    assert graphs <= expected, "steps were cut to pieces, or compiled again and again"
    assert report.seconds.per_token is None and report.seconds.prefill > 0
    assert_close(torch.stack(found, dim=1), logits_of(run.output)[:, 1:])


@pytest.mark.parametrize("to", ["memory", "disk"])
@pytest.mark.parametrize("name", THREE)
def test_offloaded_weights_come_back_for_each_layer(name: str, to: str, tmp_path: Path) -> None:
    """accelerate leaves parameters on the meta device, and brings them in when a layer runs."""
    one = tiny.build(name)
    layers = decoder_of(one.model).layers
    for number, layer in enumerate(layers):
        if to == "memory":
            cpu_offload(layer, execution_device=torch.device("cpu"))
        else:
            disk_offload(layer, tmp_path / str(number), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in layers.parameters())
    generate(one, prompt_of(one))
    before = snapshot(one.model)
    with prune(one.model, keep_all(EVERYWHERE)):
        output = generate(one, prompt_of(one))
    assert torch.equal(logits_of(output), logits_of(unpruned(name).output))
    for recipe in (EVERYWHERE, PROBING, f"groups(size=2) + {EVERYWHERE}"):
        with prune(one.model, recipe):
            output = generate(one, prompt_of(one))
        assert_close(logits_of(output), logits_of(pruned(name, recipe).output))
        assert all(parameter.is_meta for parameter in layers.parameters())
    after = snapshot(one.model)
    for what in ("modules", "configs", "attention", "masks"):  # parameters come and go
        assert after[what] == before[what], what


@pytest.mark.parametrize("name", THREE)
def test_hooks_of_users_count_what_they_count_without_probes(name: str) -> None:
    """A layer that is probed for its queries and keys is not called by that."""
    one = model_of(name)
    layers = decoder_of(one.model).layers
    calls: dict[Any, int] = {}
    with ExitStack() as hooks:

        def count(module: Any, *_: object) -> None:
            calls[module] = calls.get(module, 0) + 1

        for layer in layers:
            for module in (layer, layer.self_attn, layer.self_attn.q_proj):
                hooks.callback(module.register_forward_pre_hook(count).remove)
                hooks.callback(module.register_forward_hook(count).remove)
        generate(one, prompt_of(one))
        expected = dict(calls)
        calls.clear()
        with prune(one.model, PROBING):
            generate(one, prompt_of(one))
    assert calls == expected and set(expected.values()) == {2 * NEW_TOKENS}


PROBING = "pyramiddrop(keep=0.6) + fastv(keep=0.8 layer=2 rotary=false)"
"""Layers are run until their attention, before and after tokens leave."""


class Drafts:
    """Counts the tokens that an assistant drafts."""

    def __init__(self, model: Any) -> None:
        self.calls = 0
        self._handle = model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def remove(self) -> None:
        self._handle.remove()


@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
def test_a_second_model_may_draft(name: str) -> None:
    """The assistant is not pruned; its guesses are checked by the pruned model."""
    one = model_of(name)
    assistant = tiny.build(name).model
    with torch.no_grad():
        for parameter in decoder_of(assistant).layers[4].parameters():
            parameter.mul_(0.5)  # a little off, so that some guesses are wrong
    steps = 12
    with prune(one.model, EVERYWHERE):
        expected = generate(one, prompt_of(one), max_new_tokens=steps)
    drafts = Drafts(assistant)
    with prune(one.model, EVERYWHERE):
        output = generate(one, prompt_of(one), max_new_tokens=steps, assistant_model=assistant)
    drafts.remove()
    assert drafts.calls >= steps // 2
    tokens: Tensor = output.sequences
    assert torch.equal(tokens, expected.sequences)
