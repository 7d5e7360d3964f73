"""Maps of audio towers, against what the model makes of the states of their last blocks.

As in `test_adapters`, a state is painted: the last block is made to output numbers of our choice,
and what follows passes them on, joined only where the model joins states to a token. Where they
turn up among the embeddings says of which states each token is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.test_adapters import CHANNELS, passed_on, watching
from tests.adapters.test_audio_layouts import EARS
from tests.contract.doubles import Spy, Viewed
from tokenprune import prune
from tokenprune.adapters.base import Adapter, MediaCall, adapter_for
from tokenprune.core.context import EncoderView
from tokenprune.core.layout import Modality
from tokenprune.core.signal import EncoderSignal
from tokenprune.core.site import Input
from tokenprune.engine import encoders, views
from tokenprune.engine.layouts import lay_out
from tokenprune.report.report import Report
from tokenprune.testing.tiny import AUDIO, Tiny, build, decoder_of, family_of
from tokenprune.testing.tiny.base import noise, prompt
from tokenprune.testing.tiny.hearing import mask_of
from tokenprune.testing.tiny.releases import OLD, UNUSABLE

BLOCKS = {name: f"{ear.blocks}.1" for name, ear in EARS.items()}
"""The last block of each tower."""

HEARING = [name for name in EARS if family_of(name) not in UNUSABLE]

Sounds = tuple[dict[str, Any], list[int]]
"""Inputs of the model without its prompt, and the tokens of each sound."""


# -- painting


class Paint:
    """Numbers `[..., 4]` for all states of the last block of the audio tower.

    Attributes:
        states: What it puts out, painted.
        cuts: Where attention begins anew in one sequence of windows.
    """

    def __init__(self, tiny: Tiny) -> None:
        self.states = torch.empty(0)
        self.cuts: list[int] = []
        base: Any = adapter_for(tiny.model).base_model
        self._width = decoder_of(tiny.model).config.hidden_size
        self._hooks = ExitStack()
        self._kept = torch.empty(0)
        block = base.get_submodule(BLOCKS[tiny.name])
        self._hook(block, self._cover)
        family = family_of(tiny.name)
        if family == "granite_speech":
            self._hook(base.projector.qformer, self._window)
            self._hook(base.projector.linear, self._pass)
        elif family == "phi4_multimodal":
            sounds = base.embed_tokens_extend.audio_embed
            for kind in ("speech", "vision_speech"):
                self._hook(getattr(sounds, f"up_proj_for_{kind}"), self._hold)
                self._hook(getattr(sounds, f"down_proj_for_{kind}"), self._give)
        else:
            tower = base.audio_tower
            omni = family in ("qwen2_5_omni", "qwen3_omni_moe")
            self._hook(tower.ln_post if omni else tower.layer_norm, self._leave)
            if family == "qwen3_omni_moe":
                self._hook(tower.proj1, self._leave)
                self._hook(tower.act, self._leave)
                self._hook(tower.proj2, self._pass)
            elif omni:
                self._hook(tower.proj, self._pass)
            else:
                joined = 4 if family == "voxtral" else 1
                self._hook(
                    base.multi_modal_projector,
                    lambda args, kwargs, out: passed_on(
                        args[0].unflatten(-1, (joined, -1)).mean(dim=-2), self._width
                    ),
                )

    def __enter__(self) -> Paint:
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def views(self) -> list[Tensor]:
        """The states of each view, `[Nv, 4]`."""
        if self.states.ndim == 3:
            return list(self.states)
        return list(self.states.tensor_split(self.cuts[1:-1]))

    def _hook(self, module: nn.Module, change: Callable[[Any, Any, Any], Any]) -> None:
        def changed(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return change(args, kwargs, output)

        hook = module.register_forward_hook(changed, with_kwargs=True)
        self._hooks.callback(hook.remove)

    def _cover(self, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        self.states = torch.rand(*hidden.shape[:-1], CHANNELS)
        self.states[..., -1] = 1
        if self.states.ndim == 2:
            self.cuts = (kwargs["cu_seqlens"] if "cu_seqlens" in kwargs else args[1]).tolist()
        painted = passed_on(self.states, hidden.shape[-1])
        return (painted, *output[1:]) if isinstance(output, tuple) else painted

    def _leave(self, args: Any, kwargs: Any, output: Any) -> Any:
        return args[0]

    def _pass(self, args: Any, kwargs: Any, output: Any) -> Any:
        return passed_on(args[0], self._width)

    def _hold(self, args: Any, kwargs: Any, output: Any) -> Any:
        self._kept = passed_on(args[0], self._width)
        return output

    def _give(self, args: Any, kwargs: Any, output: Any) -> Any:
        return self._kept

    def _window(self, args: Any, kwargs: Any, output: Any) -> Any:
        """Give each query the mean of its window; states, other than padding, are 1 at the end."""
        states = kwargs["encoder_hidden_states"]
        mean = states.sum(dim=1, keepdim=True) / states[..., CHANNELS - 1].sum(dim=1)[:, None, None]
        queries = kwargs["query_embeds"].shape[1]
        output.last_hidden_state = mean.repeat(1, queries, 1)
        return output


# -- sounds of many lengths


def audio_of(lengths: list[int], longest: int, name: str = "feature_attention_mask") -> dict:
    mask = mask_of(lengths, longest)
    features = noise(torch.Generator().manual_seed(0), len(lengths), 16, longest) * mask[:, None]
    return {"input_features": features, name: mask}


def granite(states: int, tokens: list[int]) -> Sounds:
    features = noise(torch.Generator().manual_seed(0), len(tokens), states, 16)
    mask = mask_of(tokens, -(-states // 15) * 3).bool()
    return {"input_features": features, "input_features_mask": mask}, tokens


def phi4(frames: int, tokens: list[int]) -> Sounds:
    features = noise(torch.Generator().manual_seed(0), len(tokens), frames, 16)
    return {
        "audio_input_features": features,
        "audio_embed_sizes": torch.tensor(tokens),
        "audio_attention_mask": mask_of([8 * one for one in tokens], frames).bool(),
    }, tokens


SOUNDS: dict[str, dict[str, Sounds]] = {
    "audioflamingo3": {
        # Windows of 100 mel frames; one sound fills the first and part of the second.
        "odd": (audio_of([100, 77, 5, 100], 100, "input_features_mask"), [25 + 19, 1, 25]),
        "full": (audio_of([100, 100], 100, "input_features_mask"), [50]),
    },
    "granite_speech": {
        # Blocks of 20 states; windows of 15, the last one of 7.
        "odd": granite(52, [12, 9, 1]),
        "short": granite(4, [3, 2]),
    },
    "phi4_multimodal": {
        "odd": phi4(120, [15, 9, 1]),
        "cut": phi4(8 * 510, [507]),  # views of 500 states; transformers takes one such sound
    },
    "qwen2_5_omni": {
        # Windows of 20 mel frames, which are 10 states.
        "odd": (audio_of([83, 7, 40], 83), [21, 2, 10]),
        "short": (audio_of([14], 14), [3]),
    },
    "qwen2_audio": {
        "odd": (audio_of([77, 100, 5], 100), [19, 25, 1]),
        "full": (audio_of([100, 100], 100), [25, 25]),
    },
    "qwen3_omni_moe": {
        # Convolutions over 100 mel frames at a time; windows of two such chunks, 26 states.
        "odd": (audio_of([230, 7, 330], 330), [30, 1, 43]),
        "short": (audio_of([14], 14), [2]),
    },
    "voxtral": {
        "full": ({"input_features": noise(torch.Generator().manual_seed(0), 3, 16, 80)}, [20, 10]),
    },
}


def inputs_of(kind: Sounds) -> dict[str, Any]:
    features, tokens = kind
    ids = prompt(torch.Generator().manual_seed(0), [[AUDIO] * count for count in tokens], 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features}


CASES = [
    *((name, kind) for name in HEARING for kind in ("one", "batch")),
    *((name, kind) for name in HEARING for kind in SOUNDS.get(name, ())),
]


def case(name: str, kind: str) -> tuple[Tiny, dict[str, Any]]:
    if name == "audioflamingo3" and OLD:
        pytest.skip("this release of transformers takes padding of windows for sound")
    tiny = build(name)
    if kind in ("one", "batch"):
        return tiny, tiny.batch() if kind == "batch" else tiny.inputs()
    return tiny, inputs_of(SOUNDS[name][kind])


@dataclass
class Heard:
    """A forward with painted states."""

    adapter: Adapter
    calls: list[MediaCall] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: list[Any] = field(default_factory=list)

    @property
    def call(self) -> MediaCall:
        (call,) = [one for one in self.calls if one.modality == "audio"]
        return call


def listen(tiny: Tiny, inputs: dict[str, Any]) -> Heard:
    adapter = adapter_for(tiny.model)
    with watching(tiny) as seen, Paint(tiny) as paint:
        tiny.model(**inputs)
    rows = lay_out(adapter, inputs["input_ids"], seen.calls, seen.prompt)
    return Heard(adapter, seen.calls, paint.views(), seen.embeddings, rows)


# -- alignment


def assert_aligned(heard: Heard) -> None:
    """What `align` makes of the states is what the model made of them."""
    aligned = heard.adapter.align(heard.call, heard.views)
    sounds = 0
    for b, (layout, items) in enumerate(heard.rows):
        for number, (call, place) in enumerate(items):
            if heard.calls[call] is not heard.call:
                continue
            sounds += 1
            position = layout.position[layout.item == number]
            packed = heard.embeddings[b, position, :CHANNELS]
            torch.testing.assert_close(aligned[place], packed, rtol=0, atol=1e-6)
    assert sounds == len(aligned) > 0


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_align_joins_states_as_the_model_does(name: str, kind: str) -> None:
    assert_aligned(listen(*case(name, kind)))


def test_pairs_of_states_go_across_windows() -> None:
    tiny, inputs = case("qwen2_5_omni", "odd")
    tower: Any = adapter_for(tiny.model).base_model.get_submodule("audio_tower")
    tower.n_window = 5  # windows of five states
    heard = listen(tiny, inputs)
    assert [len(one) for one in heard.views] == [5] * 8 + [2] + [4] + [5] * 4
    assert_aligned(heard)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_align_takes_each_channel_of_sounds_by_itself(name: str, kind: str) -> None:
    heard = listen(*case(name, kind))
    together = heard.adapter.align(heard.call, heard.views)
    deeper = heard.adapter.align(heard.call, [one.unflatten(1, (2, 2)) for one in heard.views])
    assert [len(one) for one in together] == [len(item.column) for item in heard.call.items]
    for channel in range(CHANNELS):
        alone = heard.adapter.align(heard.call, [one[:, channel] for one in heard.views])
        for one, several, nested in zip(alone, together, deeper, strict=True):
            torch.testing.assert_close(several[:, channel], one, rtol=0, atol=1e-6)
            assert torch.equal(nested.flatten(1), several)


@pytest.mark.parametrize("name", HEARING)
def test_align_keeps_a_constant_sound(name: str) -> None:
    heard = listen(*case(name, "one"))
    for one in heard.adapter.align(heard.call, [view[:, 0] * 0 + 3 for view in heard.views]):
        torch.testing.assert_close(one, torch.full_like(one, 3))


# -- towers


@pytest.mark.parametrize("name", HEARING)
def test_audio_towers_are_the_last_blocks(name: str) -> None:
    adapter = adapter_for(build(name).model)
    tower = adapter.tower("audio")
    assert tower is not None
    assert tower.block is adapter.base_model.get_submodule(BLOCKS[name])
    assert tower.prefix_tokens == 0
    assert all(adapter.tower(one) for one in adapter.modalities if one != "audio")


# -- attention


def weights_of(name: str, inputs: dict[str, Any]) -> list[Tensor]:
    """The attention weights of the last block, `[heads, Nv, Nv]` a view, by eager attention."""
    tiny = build(name, attention="eager")
    block: Any = adapter_for(tiny.model).base_model.get_submodule(BLOCKS[name])
    weights: list[Tensor] = []
    inside: list[bool] = []

    def of_torch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float) -> Any:
        scores = query @ key.transpose(2, 3) * scale + attn_mask  # [W, heads, Nv, Nv]
        found = scores.softmax(dim=-1)
        if inside:  # rows of padding have no score that counts
            weights.extend((found * (attn_mask.amax(-1, keepdim=True) > -1e30)).unbind())
        return found @ value

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), ExitStack() as hooks:
        if family_of(name) == "granite_speech":  # which knows no other attention
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", of_torch)
            hooks.callback(
                block.register_forward_pre_hook(lambda *args: inside.append(True)).remove
            )
        else:
            module = sys.modules[type(block.self_attn).__module__]
            plain = next(one for one in EAGER if hasattr(module, one))
            eager = getattr(module, plain)

            def logged(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
                output, found = eager(attention, *args, **kwargs)
                if attention is block.self_attn:
                    weights.extend(found.unbind())
                return output, found

            patch.setattr(module, plain, logged)
        tiny.model(**inputs)
    return weights


EAGER = ("simple_eager_attention_forward", "eager_attention_forward")
"""What transformers calls the plain attention of a tower; the first one a module has."""


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_padding_of_sounds_is_what_no_state_attends_to(
    name: str, kind: str, attention: str
) -> None:
    _, inputs = case(name, kind)
    unseen = [one.sum(dim=(0, 1)) == 0 for one in weights_of(name, inputs)]
    tiny = build(name, attention=attention)  # kernels differ in their masks
    with watching(tiny) as seen:
        tiny.model(**inputs)
    (call,) = [one for one in seen.calls if one.modality == "audio"]
    padding = adapter_for(tiny.model).padding(call)
    if padding is None:
        assert not any(bool(one.any()) for one in unseen)
    else:
        assert torch.equal(padding, torch.stack(unseen))


def test_padding_of_sounds_in_masks_of_frames() -> None:
    adapter = adapter_for(build("qwen2_audio").model)
    frames = mask_of([5, 8], 8)
    padding = adapter.padding(MediaCall("audio", {"feature_attention_mask": frames}))
    assert padding is not None
    assert padding.tolist() == [[False, False, False, True], [False] * 4]
    packed = adapter.padding(MediaCall("audio", {"attention_mask": mask_of([3, 4], 4)}))
    assert packed is not None and torch.equal(packed, padding)
    whole = {"feature_attention_mask": mask_of([8, 8], 8), "attention_mask": None}
    assert adapter.padding(MediaCall("audio", whole)) is None


@dataclass(frozen=True)
class Received(EncoderSignal):
    """Notes how much attention each state receives."""

    maps: list[Tensor] = field(default_factory=list, compare=False)

    def of(self, view: EncoderView) -> Tensor:
        received = view.received()
        self.maps.extend(received.unbind())
        return received


@dataclass(frozen=True, eq=False)
class Looking(Spy):
    """Looks at some kinds of media alone."""

    kinds: tuple[Modality, ...] = ("audio",)

    name = "looking"

    @property
    def acts_on(self) -> frozenset[Modality]:
        return frozenset(self.kinds)

    def maps(self) -> list[Tensor]:
        """What the only signal was, `[N]` a sample."""
        return [found[self.needs[0]] for _, found in self.seen]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_stage_reads_the_attention_that_sounds_receive(name: str, kind: str) -> None:
    tiny, inputs = case(name, kind)
    weights = weights_of(name, inputs)
    reader = Received()
    spy = Looking(Input(), (reader,))
    with torch.no_grad(), prune(tiny.model, spy):
        tiny.model(**inputs)
    assert len(reader.maps) == len(weights) > 0
    dense = []
    for received, full in zip(reader.maps, weights, strict=True):
        mean = full.mean(dim=0)  # [Nv, Nv]
        dense.append(mean[mean.sum(dim=0) > 0].sum(dim=0))  # padding attends to no purpose
        torch.testing.assert_close(received, dense[-1], rtol=1e-5, atol=1e-5)
    heard = listen(tiny, inputs)
    aligned = torch.cat(heard.adapter.align(heard.call, dense))
    # Sounds of a batch are encoded in the order of its rows.
    torch.testing.assert_close(torch.cat(spy.maps()), aligned, rtol=1e-5, atol=1e-5)


# -- sounds beside pictures

MIXED = [
    "phi4_multimodal",
    "phi4_multimodal_sounds",
    "qwen2_5_omni",
    "qwen2_5_omni_interleaved",
    "qwen3_omni_moe",
    "qwen3_omni_moe_interleaved",
]
"""Whose prompts hold both."""

PICTURES: tuple[Modality, ...] = ("image", "video")


@pytest.mark.parametrize("kind", ["one", "batch"])
@pytest.mark.parametrize("name", [one for one in MIXED if family_of(one) not in UNUSABLE])
def test_signals_of_sounds_and_of_pictures_go_together(name: str, kind: str) -> None:
    tiny, inputs = case(name, kind)

    def shown(*spies: Looking) -> Report:
        with torch.no_grad(), prune(tiny.model, "vflowopt(keep=0.5)", *spies) as report:
            tiny.model(**inputs)
        return report

    alone = shown()
    sounds, pictures = (Looking(needs=(Viewed(),), kinds=kinds) for kinds in (("audio",), PICTURES))
    shown(sounds)
    shown(pictures)
    assert all(len(one) and bool(one.isfinite().all()) for one in sounds.maps() + pictures.maps())
    # Two signals, each of its own kind of media, and one that is wanted of both.
    for signal in (Viewed("rows"), Viewed()):
        both = [Looking(needs=(Viewed(),)), Looking(needs=(signal,), kinds=PICTURES)]
        together = shown(*both)
        for one, other in zip(both[0].maps(), sounds.maps(), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(both[1].maps(), pictures.maps(), strict=True):
            assert len(one) == len(other)
            assert one.ndim == 2 if signal == Viewed("rows") else torch.equal(one, other)
        decisions = [one.kept for one in together.last.decisions if one.method == "vflowopt"]
        assert len(decisions) == len(alone.last.decisions) > 0
        for kept, decision in zip(decisions, alone.last.decisions, strict=True):
            assert torch.equal(kept, decision.kept)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("qwen2_vl", ("image",)),  # one tower serves both
        ("qwen2_vl", ("video",)),
        ("qwen2_5_omni", ("audio",)),
        ("qwen2_5_omni", ("video",)),
        ("phi4_multimodal", ("audio",)),
        ("phi4_multimodal", ("image",)),
    ],
)
def test_media_that_no_signal_is_wanted_of_are_not_read(
    name: str, kinds: tuple[Modality, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if family_of(name) in UNUSABLE:
        pytest.skip("this release of transformers cannot run it")
    tiny = build(name)
    adapter = adapter_for(tiny.model)
    calls: list[MediaCall] = []

    def made(*args: Any) -> MediaCall:
        calls.append(MediaCall(*args))
        return calls[-1]

    monkeypatch.setattr(encoders, "MediaCall", made)
    with torch.no_grad(), prune(tiny.model, Looking(needs=(Viewed(),), kinds=kinds)):
        for modality in adapter.modalities:
            tower = adapter.tower(modality)
            used = {
                str(module.config._attn_implementation).startswith("tokenprune")
                for module in (tower.block.modules() if tower else ())
                if hasattr(module, "config")
            }
            # Images and clips share a tower.
            assert used == {(modality == "audio") == (kinds == ("audio",))}
        tiny.model(**tiny.inputs())
    assert len({call.modality for call in calls}) == 2
    for call in calls:
        assert set(call.maps) == ({Viewed()} if call.modality in kinds else set())
        assert bool(call.view_tokens) == (call.modality in kinds)


# -- relative positions


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [(3, 2), (1, 2), (3, 1), (1, 1)])
def test_views_add_the_bias_to_the_scores(
    sizes: tuple[int, int], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 2, 7, 4, generator=generator)  # a class token and six others
    bias = 3 * torch.randn(*sizes, 7, 7, generator=generator)
    padding = torch.arange(6) >= torch.tensor([6, 4, 5])[:, None] if padded else None
    scores = query @ key.mT * 0.5 + bias
    if padding is not None:
        scores[..., 1:] = scores[..., 1:].masked_fill(padding[:, None, None], -torch.inf)
    dense = scores.softmax(dim=-1).mean(dim=1)[..., 1:]  # [W, 1 + Nv, Nv]
    dense = dense / dense.sum(dim=-1, keepdim=True)
    of_class, dense = dense[:, 0], dense[:, 1:]
    counted = dense if padding is None else dense * ~padding[..., None]
    picked = torch.tensor([[0, 3], [2, 2], [4, 1]])
    rows = dense.gather(1, picked[..., None].expand(-1, -1, 6))
    for most in (1, 1 << 20):  # a row at a time; all at once
        monkeypatch.setattr(views, "_BLOCK_ELEMENTS_CPU", most)
        view = views.StreamedView(query, key, None, 1, padding, bias)
        torch.testing.assert_close(view.received(), counted.sum(dim=1))
        torch.testing.assert_close(view.rows(picked), rows)
        torch.testing.assert_close(view.class_row(), of_class)
