"""What only an accelerator can show: kernels, devices of index tensors, memory."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from tokenprune import Session, ask, load_model, prune, read_media
from tokenprune.eval.bench.gpu_answers import answer
from tokenprune.eval.bench.gpu_models import TINY_SIGLIP, TINY_TEXT
from tokenprune.eval.bench.random_models import build as build_large
from tokenprune.eval.bench.random_models import llava_config, llava_inputs
from tokenprune.testing.tiny import build, decoder_of

RECIPE = "vflowopt(keep=0.5) + random(keep=0.7 at=2) + plphp(keep=0.5)"
FAMILIES = ["llava_onevision", "qwen2_5_vl", "qwen3_vl"]

absent = not torch.cuda.is_available()
pytestmark = [
    pytest.mark.needs_gpu,
    # Where a device must be there, its absence is a failure and not a skip.
    pytest.mark.skipif(
        absent and "FAIL_WITHOUT_GPU" not in os.environ, reason="no CUDA device here"
    ),
]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Without TF32, which convolutions use by default, and which is off by a thousandth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the setting has a second name in newer releases
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        yield
        torch.backends.cudnn.allow_tf32 = before


def moved(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        name: value.to("cuda", dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def logits(model: Any, inputs: dict[str, Any], suppress: list[int]) -> torch.Tensor:
    output = model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        suppress_tokens=suppress,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits, 1).float()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keep_all_is_bit_identical_on_cuda(name: str, kind: str, dtype: torch.dtype) -> None:
    tiny = build(name)
    model = copy.deepcopy(tiny.model).to("cuda", dtype)
    # Alone, a prompt needs no mask, and torch has other kernels for it.
    inputs = moved(tiny.batch() if kind == "batch" else tiny.inputs(), dtype)
    plain = logits(model, inputs, tiny.suppress)
    with prune(model, "random(keep=1.0) + random(keep=1.0 at=2) + plphp(keep=1.0)"):
        assert torch.equal(logits(model, inputs, tiny.suppress), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_decisions_and_logits_are_those_of_the_processor(name: str) -> None:
    tiny = build(name)
    with prune(tiny.model, RECIPE) as expected:
        wanted = logits(tiny.model, tiny.batch(), tiny.suppress)
    model = copy.deepcopy(tiny.model).cuda()
    with prune(model, RECIPE) as report:
        got = logits(model, moved(tiny.batch()), tiny.suppress)
    for mine, theirs in zip(report.last.decisions, expected.last.decisions, strict=True):
        assert mine.kept.device.type == "cuda"
        assert torch.equal(mine.kept.cpu(), theirs.kept)
    assert (got.cpu() - wanted).abs().max() < 1e-3
    assert report.kv_bytes == expected.kv_bytes
    assert report.seconds.prefill > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_session_on_cuda_is_that_on_the_processor(name: str, checkpoint: Any) -> None:
    frames = torch.randint(0, 256, (12, 3, 56, 56), dtype=torch.uint8)
    answers = []
    for device in ("cpu", "cuda"):
        one = load_model(str(checkpoint(name)), device=device, dtype=torch.float32)
        with Session(one.model, one.processor, "uniform(keep=0.5)", group=4) as session:
            session.watch(frames, fps=2.0)
            answers.append(session.generate("what?", max_new_tokens=6, do_sample=False).cpu())
            timeline = session.timeline
    assert torch.equal(*answers)
    # One clock shows what the host and what the device did.
    for group in timeline.groups:
        moments = [group[phase][0] for phase in ("process", "encode", "prefill")]
        begins, ends = zip(*moments, strict=True)
        assert all(begin < end for begin, end in moments)
        assert 0 < begins[0] < begins[1] < begins[2] and ends[0] < ends[1] < ends[2] < 600


@pytest.mark.parametrize("name", FAMILIES)
def test_index_tensors_follow_layers_to_two_devices(name: str) -> None:
    """The first layers lie on the accelerator, the others and the head on the processor."""
    tiny = build(name)
    with prune(tiny.model, RECIPE) as expected:
        wanted = logits(tiny.model, tiny.batch(), tiny.suppress)
    model = copy.deepcopy(tiny.model).to("cuda")
    decoder = decoder_of(model)
    late = [*decoder.layers[2:], decoder.norm, model.get_output_embeddings()]
    for modules, device in ((decoder.layers[:2], "cuda"), (late, "cpu")):
        for module in modules:
            add_hook_to_module(module.to(device), AlignDevicesHook(execution_device=device))
    with prune(model, RECIPE) as report:
        got = logits(model, moved(tiny.batch()), tiny.suppress)
    for mine, theirs in zip(report.last.decisions, expected.last.decisions, strict=True):
        assert torch.equal(mine.kept.cpu(), theirs.kept)
    assert (got.cpu() - wanted).abs().max() < 1e-3


def test_the_mini_model_answers_alike_on_both_devices(tmp_path: Path) -> None:
    from tokenprune.eval.mini.sample import write_sample  # without PyAV the other tests run

    path = tmp_path / "sample.mp4"
    questions = [one["question"] for one in write_sample(path, seconds=20, size=(112, 192))[:3]]
    answers = []
    for device in ("cpu", "cuda"):
        loaded = load_model(device=device, dtype=torch.float32)
        recipe = "vflowopt(keep=0.5) + plphp(keep=0.5)"
        found = [ask(loaded, path, one, recipe=recipe, frames=16) for one in questions]
        answers.append([(one.answer, one.report.media_tokens.after) for one in found])
    assert answers[0] == answers[1]


def test_the_host_does_not_wait_for_copies(checkpoint: Any, files: Any) -> None:
    loaded = load_model(str(checkpoint("llava_onevision")), device="cuda", dtype=torch.float32)
    media = read_media(files.silent, loaded, frames=4)
    loaded.encode(media, "what?")  # memory is pinned once, which may wait
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(3_000_000_000)  # cycles: more than a second
    encoded = loaded.encode(media, "what?")
    done.record()
    assert not done.query()
    for name, value in loaded.process(media, "what?").items():
        assert encoded[name].device.type == "cuda"
        assert torch.equal(encoded[name].cpu(), value)


def test_pruning_takes_no_more_memory_at_the_peak() -> None:
    # With the proportions of a large one: activations outweigh all else.
    text = TINY_TEXT | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    text |= {"num_attention_heads": 8, "max_position_embeddings": 8192}
    vision = TINY_SIGLIP | {"image_size": 384, "hidden_size": 128, "intermediate_size": 512}
    model = build_large(llava_config(text, vision), "cuda")
    inputs = llava_inputs(model, frames=31)
    answer(model, inputs, "none", 2)  # handles and workspaces of libraries
    plain = answer(model, inputs, "none", 2)[0].peak_bytes
    for recipe in ("random(keep=0.1)", "vflowopt(keep=0.1)", "plphp(keep=0.5)"):
        run, report = answer(model, inputs, recipe, 2)
        assert run.peak_bytes <= 1.01 * plain, recipe
        assert report is not None and run.kv_bytes < report.kv_bytes.before


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_flash_attention_agrees_with_sdpa(name: str) -> None:
    found = {}
    for kernel in ("sdpa", "flash_attention_2"):
        tiny = build(name, attention=kernel)
        model = copy.deepcopy(tiny.model).to("cuda", torch.float16)
        with prune(model, RECIPE):
            found[kernel] = logits(model, moved(tiny.batch(), torch.float16), tiny.suppress)
    assert (found["sdpa"] - found["flash_attention_2"]).abs().max() < 0.1
