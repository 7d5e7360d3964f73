"""Models inside wrappers: of PEFT, accelerate, `torch.compile` and data-parallel training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from tests.contract.cases import COMBINED, EVERYWHERE, THREE, keep_all, refusal
from tests.contract.test_labels import (
    assert_same_gradients,
    dense_logits_and_gradients,
    expected_loss,
    gradients,
    in_double,
    labels_of,
    rows_left,
)
from tests.releases import WATCHER
from tokenprune import Session, prune
from tokenprune.adapters.base import adapter_for
from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.models.load import load_model
from tokenprune.testing import tiny
from tokenprune.testing.harness import generate, logits_of, prompt_of, pruned, replay_of, unpruned
from tokenprune.testing.oracle import assert_close, dense_logits, positions_logged
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import Tiny, decoder_of

try:
    import peft
except ImportError:  # pragma: no cover
    peft = None

pytestmark = pytest.mark.filterwarnings(
    # PEFT reads what transformers has renamed.
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)
needs_peft = pytest.mark.skipif(peft is None, reason="PEFT is not installed: pip install peft")


def with_lora(name: str, **settings: Any) -> Tiny:
    """A tiny model in PEFT's wrapper, with adapters of some weight in every linear layer."""
    return wrapped_in_lora(tiny.build(name), **settings)


def wrapped_in_lora(one: Tiny, **settings: Any) -> Tiny:
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    wrapper = peft.get_peft_model(one.model, config)
    with torch.no_grad():
        for parameter_name, parameter in wrapper.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.2)
    return replace(one, model=wrapper.eval())


# -- PEFT


@needs_peft
@pytest.mark.parametrize("recipe", ["none", EVERYWHERE])
@pytest.mark.parametrize("name", THREE)
def test_keep_all_is_bit_identical_through_lora(name: str, recipe: str) -> None:
    one = with_lora(name)
    inputs = prompt_of(one, "batch")
    plain, loss = generate(one, inputs), one.model(**inputs, labels=labels_of(one, inputs)).loss
    before = snapshot(one.model)
    with prune(one.model, keep_all(recipe)):
        got = generate(one, inputs)
        assert torch.equal(one.model(**inputs, labels=labels_of(one, inputs)).loss, loss)
    assert torch.equal(logits_of(got), logits_of(plain))
    assert snapshot(one.model) == before
    without = logits_of(unpruned(name, "batch").output)
    assert (logits_of(got) - without).abs().max() > 1e-2, "adapters change nothing"


@needs_peft
@pytest.mark.parametrize("recipe", [EVERYWHERE, COMBINED[1]])
@pytest.mark.parametrize("name", THREE)
def test_generation_through_lora_matches_the_oracle(name: str, recipe: str) -> None:
    if refusal(recipe, name):
        pytest.skip("refused")
    one = with_lora(name)
    inputs = prompt_of(one, "batch")
    with positions_logged(decoder_of(one.model)) as log:
        generate(one, inputs)
    with prune(one.model, recipe) as report:
        output = generate(one, inputs)
    read = output.sequences[:, :-1]
    replay = replay_of(one, recipe, report.calls, *read.shape)
    expected = dense_logits(one.model, inputs, read, replay, log.whole())
    assert_close(logits_of(output), expected[:, inputs["input_ids"].shape[1] - 1 :])


@needs_peft
@pytest.mark.parametrize("name", [*THREE, "granite_speech"])
def test_adapters_are_trained_as_by_the_oracle(name: str) -> None:
    one = with_lora(name)
    one.model.double()
    inputs = in_double(prompt_of(one, "batch"))
    labels = labels_of(one, inputs)
    with prune(one.model, EVERYWHERE) as report:
        loss = one.model(**inputs, labels=labels).loss
    replay = replay_of(one, EVERYWHERE, report.calls, *labels.shape)
    dense = dense_logits_and_gradients(one.model, inputs, inputs["input_ids"], replay)
    expected = expected_loss(dense, labels, rows_left(inputs, replay))
    assert_close(loss.detach(), expected.detach(), "loss")
    found = gradients(one.model, loss)
    assert found and all("lora_" in parameter_name for parameter_name in found)
    assert_same_gradients(found, gradients(one.model, expected), tolerance=1e-6)


@needs_peft
def test_an_adapter_may_be_turned_off_inside_the_block() -> None:
    one = with_lora("llava")
    inputs = prompt_of(one)
    with prune(one.model, EVERYWHERE), one.model.disable_adapter():
        got = logits_of(generate(one, inputs))
    assert_close(got, logits_of(pruned("llava", EVERYWHERE).output))
    with prune(one.model, EVERYWHERE):
        other = logits_of(generate(one, inputs))
    assert (got - other).abs().max() > 1e-2


@needs_peft
def test_the_model_and_its_wrapper_are_one() -> None:
    one = with_lora("llava")
    inner = one.model.get_base_model()
    assert adapter_for(one.model).model is inner
    inputs = prompt_of(one)
    with prune(inner, EVERYWHERE):
        expected = logits_of(generate(one, inputs))
        with pytest.raises(UnsupportedModelError, match="already inside"), prune(one.model, "none"):
            pass
    with prune(one.model, EVERYWHERE):
        assert torch.equal(logits_of(generate(one, inputs)), expected)


@needs_peft
def test_mixed_adapters() -> None:
    one = tiny.build("llava")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    mixed = peft.get_peft_model(one.model, config, mixed=True)
    mixed.add_adapter(
        "other",
        peft.LoHaConfig(r=4, target_modules=["k_proj"], init_weights=False),
    )
    mixed.set_adapter(["default", "other"])
    inputs = prompt_of(one)
    with torch.no_grad():
        expected = mixed(**inputs).logits
        with prune(mixed, keep_all(EVERYWHERE)):
            assert torch.equal(mixed(**inputs).logits, expected)


def unlike_weights() -> dict[str, tuple[str, Callable[[], Any]]]:
    """Kinds of adapters that do not only change weights: what they are told, and how they begin."""
    text = {"task_type": "CAUSAL_LM"}
    sizes = {"num_layers": 5, "token_dim": 64, "num_attention_heads": 4}
    return {
        "prompt": (
            "virtual tokens",
            lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **text, **sizes),
        ),
        "prefix": (
            "virtual tokens",
            lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **text, **sizes),
        ),
        "activated": (
            "begins at a token",
            lambda: peft.LoraConfig(
                target_modules=["q_proj"], alora_invocation_tokens=[7, 8], **text
            ),
        ),
    }


@needs_peft
@pytest.mark.parametrize("kind", ["prompt", "prefix", "activated"])
def test_adapters_that_do_more_than_change_weights_are_refused(kind: str) -> None:
    one = tiny.build("llava")
    why, config = unlike_weights()[kind]
    wrapper = peft.get_peft_model(one.model, config())
    before = snapshot(wrapper)
    with pytest.raises(UnsupportedModelError, match=f"{why}.*use an adapter that only changes"):
        with prune(wrapper, EVERYWHERE):
            pass
    with pytest.raises(UnsupportedModelError, match=why):
        Session(wrapper, None, "none")
    assert snapshot(wrapper) == before


@needs_peft
@pytest.mark.parametrize("kind", ["XLORA", "ADAPTION_PROMPT"])
def test_adapters_with_forwards_of_their_own_are_refused(kind: str) -> None:
    one = with_lora("llava")
    one.model.peft_config["default"].peft_type = kind
    with pytest.raises(UnsupportedModelError, match=f"the {kind} adapter 'default' of PEFT"):
        adapter_for(one.model)


@needs_peft
def test_a_session_looks_through_a_wrapper(
    checkpoint: Callable[[str], Path], files: Any, tmp_path: Path
) -> None:
    loaded = load_model(str(checkpoint(WATCHER)), device="cpu")
    question = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}

    def watch(model: nn.Module) -> tuple[Session, Tensor]:
        session = Session(model, loaded.processor, "uniform(keep=0.5)", group=4)
        session.watch(files.video, frames=8)
        return session, logits_of(session.generate("what?", **question))

    _, plain = watch(loaded.model)
    one = wrapped_in_lora(Tiny(WATCHER, loaded.model, [], lambda *_: {}))
    session, adapted = watch(one.model)
    _, inner = watch(one.model.get_base_model())
    assert torch.equal(adapted, inner) and (adapted - plain).abs().max() > 1e-3
    path = session.save(tmp_path / "kept.safetensors")
    again = Session.load(path, one.model, loaded.processor)
    assert torch.equal(logits_of(again.generate("what?", **question)), adapted)
    bare = load_model(str(checkpoint(WATCHER)), device="cpu")
    with pytest.raises(TokenPruneError, match="another model|other weights"):
        Session.load(path, bare.model, bare.processor)


# -- accelerate


@pytest.fixture
def accelerated() -> Iterator[Callable[..., Accelerator]]:
    """Makes accelerators, and takes their state back."""
    yield lambda **settings: Accelerator(cpu=True, **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_audio"])
def test_a_model_that_accelerate_has_prepared(
    name: str, precision: str, accelerated: Callable[..., Accelerator]
) -> None:
    one = tiny.build(name)
    inputs = prompt_of(one, "batch")
    labels = labels_of(one, inputs)
    accelerator = accelerated(mixed_precision=precision)
    prepared = accelerator.prepare(one.model)
    assert adapter_for(prepared).model is extract_model_from_parallel(prepared)
    expected = prepared(**inputs, labels=labels)
    before = snapshot(prepared)
    with prune(prepared, keep_all(EVERYWHERE)):
        got = prepared(**inputs, labels=labels)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.logits, expected.logits)
    with prune(prepared, EVERYWHERE) as report:
        loss = prepared(**inputs, labels=labels).loss
        accelerator.backward(loss)
    assert report.media_tokens.after < report.media_tokens.before
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in prepared.parameters())
    prepared.zero_grad()
    assert snapshot(prepared) == before


@pytest.mark.parametrize("name", THREE)
def test_a_model_that_accelerate_has_dispatched(name: str) -> None:
    one = tiny.build(name)
    dispatch_model(one.model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    inputs = prompt_of(one)
    with prune(one.model, keep_all(EVERYWHERE)):
        assert torch.equal(logits_of(generate(one, inputs)), logits_of(unpruned(name).output))
    with prune(one.model, EVERYWHERE):
        assert torch.equal(
            logits_of(generate(one, inputs)), logits_of(pruned(name, EVERYWHERE).output)
        )


# -- torch.compile


@torch.no_grad()
def test_generate_of_a_compiled_model_is_pruned() -> None:
    """It runs uncompiled: what is compiled is the call."""
    one = tiny.build("llava")
    compiled = torch.compile(one.model, backend="eager")
    assert adapter_for(compiled).model is one.model
    with prune(compiled, EVERYWHERE):
        output = generate(replace(one, model=compiled), prompt_of(one))
    assert torch.equal(logits_of(output), logits_of(pruned("llava", EVERYWHERE).output))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_compiled_model_is_pruned_inside_the_block_and_not_outside() -> None:
    """Also where it was compiled before: what it has compiled is not reused for the other."""
    one = tiny.build("llava")
    inputs = prompt_of(one)
    plain = one.model(**inputs).logits
    with prune(one.model, EVERYWHERE):
        expected = one.model(**inputs).logits
    torch._dynamo.reset()
    compiled = torch.compile(one.model, backend="eager")
    assert torch.equal(compiled(**inputs).logits, plain)
    with prune(compiled, EVERYWHERE) as report:
        assert torch.equal(compiled(**inputs).logits, expected)
        assert len(report.calls) == 1
    assert torch.equal(compiled(**inputs).logits, plain)
    torch._dynamo.reset()


# -- data-parallel training


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", THREE)
@pytest.mark.usefixtures("one_process")
def test_distributed_training_goes_on_through_its_wrapper(name: str) -> None:
    one = tiny.build(name)
    inputs = prompt_of(one, "batch")
    labels = labels_of(one, inputs)
    with prune(one.model, EVERYWHERE):
        loss = one.model(**inputs, labels=labels).loss
        expected = gradients(one.model, loss)
    parallel = nn.parallel.DistributedDataParallel(one.model, find_unused_parameters=True)
    assert adapter_for(parallel).model is one.model
    with prune(parallel, EVERYWHERE) as report:
        parallel(**inputs, labels=labels).loss.backward()
    assert len(report.calls) == 1
    for parameter_name, parameter in one.model.named_parameters():
        if parameter_name in expected:
            assert parameter.grad is not None
            assert_close(parameter.grad, expected[parameter_name], parameter_name)


def test_data_parallel_over_one_device_only() -> None:
    one = tiny.build("llava")
    inputs = prompt_of(one)
    parallel = nn.DataParallel(one.model)
    parallel.device_ids = []
    with torch.no_grad(), prune(parallel, EVERYWHERE) as report:
        parallel(**inputs)
    assert len(report.calls) == 1
    parallel.device_ids = [0, 1]
    with pytest.raises(UnsupportedModelError, match="over 2 devices"), prune(parallel, "none"):
        pass


@needs_peft
@pytest.mark.usefixtures("one_process")
def test_wrappers_in_wrappers() -> None:
    one = with_lora("llava")
    inputs = prompt_of(one)
    with prune(one.model, EVERYWHERE):
        expected = one.model(**inputs).logits
    parallel = nn.parallel.DistributedDataParallel(one.model, find_unused_parameters=True)
    with prune(parallel, EVERYWHERE):
        assert torch.equal(parallel(**inputs).logits, expected)


class Wrapper(nn.Module):
    """Of a kind that is not known."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model


def test_other_wrappers_are_refused_and_name_the_model_inside() -> None:
    wrapper = Wrapper(tiny.build("llava").model)
    message = "cannot prune a Wrapper.*give the LlavaForConditionalGeneration inside it"
    with pytest.raises(UnsupportedModelError, match=message), prune(wrapper, "none"):
        pass
    with pytest.raises(UnsupportedModelError, match=message):
        Session(wrapper, None, "none")
    with pytest.raises(UnsupportedModelError, match="no adapter for model_type None"):
        adapter_for(nn.Linear(2, 2))
