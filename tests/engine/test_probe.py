"""The probe: what a decoder layer will give to its attention, and nothing left behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenprune.engine.cache import CACHE_NAME, cache_among
from tokenprune.engine.hooks import switch_attention
from tokenprune.engine.probe import Probe, Probed
from tokenprune.errors import UnsupportedModelError
from tokenprune.testing import tiny
from tokenprune.testing.harness import generate, logits_of, prompt_of
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import FAMILIES, Tiny, decoder_of

try:
    import peft
except ImportError:  # pragma: no cover
    peft = None

pytestmark = pytest.mark.filterwarnings(
    # PEFT, and these tests, use what transformers has renamed.
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)
needs_peft = pytest.mark.skipif(peft is None, reason="PEFT is not installed: pip install peft")

Attended = tuple[Tensor, Tensor, Tensor]


@dataclass
class Probing:
    """What was probed before each layer, and what its attention was called with afterwards."""

    probe: Probe = field(default_factory=Probe)
    probed: list[Probed] = field(default_factory=list)
    real: list[Attended] = field(default_factory=list)

    def assert_equal(self) -> None:
        """Each layer gave its attention what the probe had seen, keys of earlier rows aside."""
        assert len(self.probed) == len(self.real) > 0
        for probed, (query, key, value) in zip(self.probed, self.real, strict=True):
            rows = query.shape[2]
            assert torch.equal(probed.query, query)
            assert torch.equal(probed.key, key[:, :, -rows:])
            assert torch.equal(probed.value, value[:, :, -rows:])


@contextmanager
def probing(decoder: Any, *, rotary: bool = True, probe: bool = True) -> Iterator[Probing]:
    """Inside, every decoder layer is probed before it runs, as the engine would.

    Args:
        decoder: The language model, which attends by sdpa.
        rotary: Whether it is probed with rotary embedding.
        probe: Whether it is probed at all.
    """
    seen = Probing()

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        if seen.probe.active:
            return seen.probe.attend(module, query, key, value, mask, **kwargs)
        seen.real.append((query.detach(), key.detach(), value.detach()))
        kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return kernel(module, query, key, value, mask, **kwargs)

    def before(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        copy, cache = hidden.clone(), cache_among(kwargs)
        length = None if cache is None else cache.get_seq_length()
        seen.probed.append(seen.probe.run(layer, hidden, args, kwargs, rotary=rotary))
        assert torch.equal(hidden, copy) and not seen.probe.active
        assert cache is cache_among(kwargs)
        assert cache is None or cache.get_seq_length() == length

    with ExitStack() as stack:
        mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        switch_attention(stack, decoder.config, "of_this_test", attend, mask)
        for layer in decoder.layers if probe else ():
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield seen


def small_layer(name: str = "llava") -> tuple[Tiny, Any, Any]:
    """A tiny model, its decoder and its second layer."""
    one = tiny.build(name)
    decoder = decoder_of(one.model)
    return one, decoder, decoder.layers[1]


def run_once(decoder: Any, layer: nn.Module, seen: Probing, **settings: Any) -> Probed:
    """Probe one layer, on its own, with rows by chance."""
    hidden = torch.randn(2, 6, decoder.config.hidden_size)
    positions = torch.arange(6).expand(2, 6)
    embeddings = decoder.rotary_emb(hidden, positions)
    kwargs = {"attention_mask": None, "position_embeddings": embeddings}
    return seen.probe.run(layer, hidden, (hidden,), kwargs, **settings)


# -- the same as the layer


@torch.no_grad()
@pytest.mark.parametrize("kind", ["alone", "batch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_queries_and_keys_are_those_of_the_forward_that_follows(name: str, kind: str) -> None:
    one = tiny.build(name)
    inputs = prompt_of(one, kind)
    expected = generate(one, inputs)
    before = snapshot(one.model)
    with probing(decoder_of(one.model)) as seen:
        got = generate(one, inputs)
    assert snapshot(one.model) == before
    assert torch.equal(logits_of(got), logits_of(expected))
    assert len(seen.probed) == len(got.logits) * len(decoder_of(one.model).layers)
    seen.assert_equal()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_queries_and_keys_without_rotary_embedding(name: str) -> None:
    """Every family gives them; values are those of the layer, and the model goes on as usual."""
    one = tiny.build(name)
    inputs = prompt_of(one)
    expected = one.model(**inputs).logits
    with probing(decoder_of(one.model), rotary=False) as seen:
        assert torch.equal(one.model(**inputs).logits, expected)
    for probed, (query, key, value) in zip(seen.probed, seen.real, strict=True):
        assert torch.equal(probed.value, value)
        assert probed.query.shape == query.shape and probed.key.shape == key.shape
    assert any(
        not torch.equal(p.key, real[1]) for p, real in zip(seen.probed, seen.real, strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_without_rotary_embedding_they_are_projections(name: str) -> None:
    _, decoder, layer = small_layer(name)
    attention, hidden = layer.self_attn, torch.randn(2, 6, decoder.config.hidden_size)
    width = attention.head_dim
    normed = layer.input_layernorm(hidden)
    by_hand = []  # [B, heads, Q, d]
    for part in ("q", "k"):
        heads = getattr(attention, f"{part}_proj")(normed).unflatten(-1, (-1, width))
        norm = getattr(attention, f"{part}_norm", nn.Identity())  # of Gemma and Qwen3
        by_hand.append(norm(heads).transpose(1, 2))
    embeddings = (torch.randn(2, 6, width), torch.randn(2, 6, width))
    with probing(decoder, probe=False) as seen:
        kwargs = {"position_embeddings": embeddings, "attention_mask": None}
        probed = seen.probe.run(layer, hidden, (hidden,), kwargs, rotary=False)
    assert torch.equal(probed.query, by_hand[0]) and torch.equal(probed.key, by_hand[1])
    assert probed.arguments["scaling"] == attention.scaling


@torch.no_grad()
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"position_embeddings": None},
        {"position_embeddings": torch.ones(1, 6, 8, dtype=torch.complex64)},
        {"position_embeddings": {"full_attention": (torch.ones(1), torch.ones(1))}},
    ],
)
def test_rotary_embedding_that_cannot_be_left_out_is_refused(given: dict[str, Any]) -> None:
    _, decoder, layer = small_layer()
    before, hidden = snapshot(layer), torch.randn(2, 6, 64)
    message = "a 'llama' layer before.*must take \\(cos, sin\\).*read them with rotary embedding"
    with probing(decoder, probe=False) as seen:
        with pytest.raises(UnsupportedModelError, match=message):
            seen.probe.run(layer, hidden, (hidden,), given, rotary=False)
    assert snapshot(layer) == before and not seen.probe.active


class Recurrent(nn.Module):
    """A layer without attention."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def test_a_layer_that_does_not_attend_is_refused() -> None:
    probe = Probe()
    with pytest.raises(UnsupportedModelError, match="a Recurrent layer: it did not call the atten"):
        probe.run(Recurrent(), torch.ones(1, 1, 1), (), {})
    assert not probe.active


def test_hidden_states_by_name_and_caches_by_any_name() -> None:
    one, decoder, layer = small_layer()
    with torch.no_grad():
        cache = one.model(**one.inputs(), use_cache=True)[CACHE_NAME]
    length, hidden = cache.get_seq_length(), torch.randn(2, 6, 64)
    embeddings = decoder.rotary_emb(hidden, torch.arange(6)[None])
    rest = {"position_embeddings": embeddings, CACHE_NAME: cache, "attention_mask": None}
    with probing(decoder, probe=False) as seen:
        by_name = seen.probe.run(layer, hidden, (), {"hidden_states": hidden[:1], **rest})
        by_place = seen.probe.run(layer, hidden, (hidden[:1],), rest)
    assert torch.equal(by_name.key, by_place.key) and by_name.key.shape == (2, 2, 6, 16)
    assert cache.get_seq_length() == length and rest[CACHE_NAME] is cache
    assert repr(by_name).startswith("Probed(query=[2, 4, 6, 16], key=[2, 2, 6, 16], arguments=[")


# -- nothing left behind


def test_no_gradient_no_random_number_and_no_memory() -> None:
    _, decoder, layer = small_layer()
    layer.train()
    with probing(decoder, probe=False) as seen:
        hidden = torch.randn(2, 6, 64, requires_grad=True)
        embeddings = decoder.rotary_emb(hidden, torch.arange(6)[None])
        state = torch.get_rng_state()
        kwargs = {"position_embeddings": embeddings, "attention_mask": None}
        probed = seen.probe.run(layer, hidden, (hidden,), kwargs)
        assert torch.equal(torch.get_rng_state(), state)
        assert not probed.query.requires_grad and not probed.key.requires_grad
        assert torch.is_grad_enabled()
        query = weakref.ref(probed.query)
        del probed
        assert query() is None  # not only after the garbage collector has passed


def gradients_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).logits.float().pow(2).mean().backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def checkpointed(model: Any, reentrant: bool) -> list[Any]:
    """Turn gradient checkpointing on, and list what is checkpointed from then on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls: list[Any] = []
    for layer in decoder_of(model).layers:
        layer._gradient_checkpointing_func = noting(layer._gradient_checkpointing_func, calls)
    return calls


def noting(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        calls.append(function)
        return function(*args)

    return called


@pytest.mark.parametrize("how", ["plain", "autocast", "checkpointing", "reentrant"])
def test_training_goes_on_as_without_it(how: str) -> None:
    one, decoder, _ = small_layer("qwen2_5_vl")
    one.model.train()
    calls = None if how in ("plain", "autocast") else checkpointed(one.model, how == "reentrant")
    inputs = {**one.inputs(), "use_cache": False}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
    with autocast, probing(decoder, probe=False):
        expected = gradients_of(one.model, inputs)
    before = snapshot(one.model)
    with autocast, probing(decoder) as seen:
        found = gradients_of(one.model, inputs)
        assert torch.is_autocast_cache_enabled()
    assert snapshot(one.model) == before
    assert calls is None or len(calls) == 2 * len(decoder.layers)  # the probe is not
    del seen.real[len(decoder.layers) :]  # of the backward, which runs checkpointed layers again
    del seen.probed[len(decoder.layers) :]  # in older releases of transformers with their hooks
    seen.assert_equal()
    assert how != "autocast" or seen.probed[0].value.dtype == torch.bfloat16
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@needs_peft
def test_dropout_of_adapters_is_that_of_the_layer() -> None:
    one = tiny.build("llava")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj"],
        lora_dropout=0.5,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(one.model, config).train()
    decoder = decoder_of(one.model)
    torch.manual_seed(3)
    with probing(decoder, probe=False):
        expected = model(**one.inputs()).logits
    torch.manual_seed(3)
    with probing(decoder) as seen:
        assert torch.equal(model(**one.inputs()).logits, expected)
    seen.assert_equal()


@needs_peft
@torch.no_grad()
def test_adapters_of_each_row_stay_in_force() -> None:
    """PEFT tells modules of them by forward pre-hooks, which are put there for each call."""
    one = tiny.build("llava")
    config = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*\.[qk]_proj", init_lora_weights=False
    )
    model = peft.get_peft_model(one.model, config)
    model.add_adapter("other", config)
    model.eval()
    inputs = {**one.batch(), "adapter_names": ["other", "__base__"]}
    expected = model(**inputs).logits
    with probing(decoder_of(one.model)) as seen:
        assert torch.equal(model(**inputs).logits, expected)
    seen.assert_equal()
    assert not torch.equal(expected, model(**one.batch()).logits)


# -- hooks of others


def counting(counts: dict[str, int], name: str) -> Callable[..., None]:
    def count(*_: Any) -> None:
        counts[name] = counts.get(name, 0) + 1

    return count


def watch_calls(layer: nn.Module, counts: dict[str, int]) -> None:
    """Count the calls of every module of a layer, by hooks of each kind."""
    for name, module in layer.named_modules():
        for kwargs in (False, True):
            before = counting(counts, f"before {name}")
            module.register_forward_pre_hook(before, with_kwargs=kwargs)
            module.register_forward_hook(counting(counts, f"after {name}"), with_kwargs=kwargs)
        always = counting(counts, f"always {name}")
        module.register_forward_hook(always, always_call=True)
        module.register_full_backward_hook(counting(counts, f"backward {name}"))


@torch.no_grad()
def test_hooks_of_others_do_not_fire() -> None:
    one, decoder, layer = small_layer()
    expected: dict[str, int] = {}
    watch_calls(layer, expected)
    one.model(**one.inputs())
    other, decoder, layer = small_layer()
    counts: dict[str, int] = {}
    watch_calls(layer, counts)
    before = snapshot(layer)
    with probing(decoder) as seen:
        other.model(**one.inputs())
    seen.assert_equal()
    assert counts == expected and expected["after self_attn.q_proj"] == 2
    assert snapshot(layer) == before


@torch.no_grad()
def test_a_hook_may_be_removed_while_it_is_hidden() -> None:
    """A handle finds the dictionary that it was put into."""
    _, decoder, layer = small_layer()
    handle = layer.self_attn.register_forward_hook(lambda *_: None)
    forward = layer.self_attn.q_proj.forward

    def remove(*args: Any) -> Tensor:
        handle.remove()
        return forward(*args)

    layer.self_attn.q_proj.forward = remove
    with probing(decoder, probe=False) as seen:
        run_once(decoder, layer, seen)
    assert not layer.self_attn._forward_hooks


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_torch_computes_are_those_of_the_layer() -> None:
    one, decoder, layer = small_layer()
    nn.utils.prune.random_unstructured(layer.self_attn.q_proj, "weight", 0.5)
    nn.utils.weight_norm(layer.self_attn.k_proj)
    nn.utils.parametrizations.orthogonal(layer.self_attn.v_proj)
    layer.self_attn.q_proj.weight_orig.mul_(2)  # as an optimiser would: `weight` is of before
    layer.self_attn.k_proj.weight_g.mul_(2)
    with probing(decoder) as seen:
        one.model(**one.inputs())
    seen.assert_equal()


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_errors_pass_through_and_leave_everything_as_before(error: BaseException) -> None:
    _, decoder, layer = small_layer()
    watch_calls(layer, {})
    cpu_offload(layer, execution_device=torch.device("cpu"))

    def fail(*_: Any) -> Tensor:
        raise error

    layer.self_attn.k_proj._old_forward = fail
    before, places = snapshot(layer), devices_of(layer)
    with probing(decoder, probe=False) as seen:
        with pytest.raises(type(error)) as caught:
            run_once(decoder, layer, seen)
    assert caught.value is error and not seen.probe.active
    assert devices_of(layer) == places
    assert snapshot(layer)["modules"] == before["modules"]
    hooks = [module._hf_hook for module in layer.modules() if hasattr(module, "_hf_hook")]
    assert hooks and not any({"pre_forward", "post_forward"} & vars(hook).keys() for hook in hooks)


# -- accelerate


def devices_of(model: nn.Module) -> dict[str, str]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: one.device.type for name, one in tensors}


def spread_over_disk(model: Any, folder: Path, **settings: Any) -> None:
    """As `device_map` does without accelerators: some layers on the CPU, some on disk."""
    places = {name: "cpu" for name, _ in model.named_children()}
    decoder = decoder_of(model)
    prefix = next(name for name, one in model.named_modules() if one is decoder)
    inner = prefix.split(".")
    for depth in range(len(inner)):  # every child on the way, but for the decoder's own
        above = ".".join(inner[:depth])
        places.pop(above, None)
        for name, _ in model.get_submodule(above).named_children():
            places[f"{above}.{name}".lstrip(".")] = "cpu"
    places.pop(prefix)
    for name, _ in decoder.named_children():
        places[f"{prefix}.{name}"] = "cpu"
    places.pop(f"{prefix}.layers")
    for number in range(len(decoder.layers)):
        places[f"{prefix}.layers.{number}"] = "disk" if number % 2 else "cpu"
    dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True, **settings
    )


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=torch.device("cpu")),
    "device_map": spread_over_disk,
    "whole_layers": lambda model, folder: spread_over_disk(
        model, folder, preload_module_classes=[type(decoder_of(model).layers[0]).__name__]
    ),
    "no offload": lambda model, folder: dispatch_model(
        model, {"": "cpu"}, main_device="cpu", force_hooks=True
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("where", OFFLOADS)
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_offloaded_weights_are_offloaded_again(name: str, where: str, tmp_path: Path) -> None:
    one = tiny.build(name)
    decoder, inputs = decoder_of(one.model), one.batch()
    expected = one.model(**inputs).logits
    OFFLOADS[where](one.model, tmp_path)
    places = devices_of(one.model)
    assert ("meta" in places.values()) == (where != "no offload")
    seen_between = []

    def look(layer: nn.Module, *_: Any) -> None:
        seen_between.append(devices_of(layer))

    with probing(decoder) as seen:
        for layer in decoder.layers:  # called after the probe
            layer.register_forward_pre_hook(look)
        before = snapshot(one.model)
        assert torch.equal(one.model(**inputs).logits, expected)
    assert devices_of(one.model) == places
    assert seen_between == [devices_of(layer) for layer in decoder.layers]
    seen.assert_equal()
    assert snapshot(one.model)["modules"].keys() == before["modules"].keys()
    assert torch.equal(one.model(**inputs).logits, expected)
    assert devices_of(one.model) == places


class Noting(ModelHook):
    """Notes when it is called."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.notes.append(f"{self.name} begins")
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.notes.append(f"{self.name} ends")
        return output


@torch.no_grad()
def test_modules_in_progress_end_innermost_first() -> None:
    _, decoder, layer = small_layer()
    notes: list[str] = []
    shared = Noting("any norm", notes)  # one hook for two modules
    for name in ("", "self_attn", "self_attn.q_proj", "mlp"):
        add_hook_to_module(layer.get_submodule(name), Noting(name or "layer", notes))
    add_hook_to_module(layer.self_attn, Noting("appended", notes), append=True)
    add_hook_to_module(layer.input_layernorm, shared)
    add_hook_to_module(layer.post_attention_layernorm, shared)
    with probing(decoder, probe=False) as seen:
        run_once(decoder, layer, seen)
    assert notes == [
        "layer begins",
        "any norm begins",
        "any norm ends",
        "self_attn begins",
        "appended begins",
        "self_attn.q_proj begins",
        "self_attn.q_proj ends",
        "self_attn ends",
        "appended ends",
        "layer ends",
    ]
    assert "pre_forward" not in vars(shared) and "post_forward" not in vars(shared)


# -- compiled layers


def compile_layers(decoder: Any) -> None:
    for number, layer in enumerate(decoder.layers):
        decoder.layers[number] = torch.compile(layer, backend="eager")


def compile_attention(decoder: Any) -> None:
    for layer in decoder.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="eager")


def compile_in_place(decoder: Any) -> None:
    for layer in decoder.layers:
        layer.compile(backend="eager")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [compile_layers, compile_attention, compile_in_place])
def test_compiled_layers_are_run_uncompiled(compiled: Callable[[Any], None]) -> None:
    one = tiny.build("llava")
    decoder = decoder_of(one.model)
    expected = one.model(**one.inputs()).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled(decoder)
    before = snapshot(one.model)
    with probing(decoder, probe=False) as seen:
        for layer in decoder.layers[:2]:
            run_once(decoder, layer, seen)
    assert torch._dynamo.utils.counters["frames"]["total"] == 0, "the probe was compiled"
    with probing(decoder) as seen:
        assert torch.equal(one.model(**one.inputs()).logits, expected)
    seen.assert_equal()
    assert snapshot(one.model) == before
    torch._dynamo.reset()


@pytest.mark.full
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_probed_outside_its_graphs() -> None:
    one = tiny.build("llava")
    expected = one.model(**one.inputs()).logits
    torch._dynamo.reset()
    with probing(decoder_of(one.model)) as seen:
        compiled = torch.compile(one.model, backend="eager")
        assert torch.equal(compiled(**one.inputs()).logits, expected)
    seen.assert_equal()
    torch._dynamo.reset()
