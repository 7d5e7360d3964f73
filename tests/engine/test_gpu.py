"""What only an accelerator can show: kernels, devices of index tensors, memory."""

from __future__ import annotations

import copy
import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.tiny import build
from tokenprune import Session
from tokenprune.engine.patch import prune
from tokenprune.models.loading import load_model

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
def test_keep_all_is_bit_identical_on_cuda(name: str) -> None:
    tiny = build(name)
    model, inputs = copy.deepcopy(tiny.model).cuda(), moved(tiny.batch())
    plain = logits(model, inputs, tiny.suppress)
    with prune(model, "random(keep=1.0) + plphp(keep=1.0)"):
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
    assert report.seconds["prefill"] > 0


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
