"""Seconds of audio tokens, against the sound that reaches them.

With the blocks of a tower switched off, nothing but convolutions (or a Q-Former's window) joins
the mel frames to a token. Which of them move its embedding says when it was heard, and in which
of the windows that a long sound was cut into.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.test_adapters import layouts, watching
from tests.contract.cases import SOUND_ONLY
from tokenprune import prune
from tokenprune.adapters._audio import MEL_SECONDS
from tokenprune.adapters.base import adapter_for
from tokenprune.core.layout import AUDIO, TokenLayout
from tokenprune.errors import UnsupportedModelError
from tokenprune.testing.tiny import AUDIO as PLACEHOLDER
from tokenprune.testing.tiny import NAMES, Tiny, build, decoder_of, family_of
from tokenprune.testing.tiny.releases import OLD, UNUSABLE


@dataclass(frozen=True)
class Ear:
    """How a family hears.

    Attributes:
        blocks: Where the blocks of its tower are.
        features: The model's input of sound.
        time: Its dimension of time.
        step: Seconds between tokens.
        state: Seconds between steps of that dimension.
        reach: Seconds by which convolutions look beyond what a token stands for.
        cut: Whether a window is shorter than a sound may be.
    """

    blocks: str
    features: str = "input_features"
    time: int = 2
    step: float = 0.04
    state: float = MEL_SECONDS
    reach: float = 0.02
    cut: bool = False


EARS = {
    "audioflamingo3": Ear("audio_tower.layers", cut=True),
    "granite_speech": Ear("encoder.layers", time=1, step=0.3, state=2 * MEL_SECONDS),
    "phi4_multimodal": Ear(
        "embed_tokens_extend.audio_embed.encoder.encoders",
        "audio_input_features",
        1,
        0.08,
        reach=0.07,
    ),
    "phi4_multimodal_sounds": Ear(
        "embed_tokens_extend.audio_embed.encoder.encoders",
        "audio_input_features",
        1,
        0.08,
        reach=0.07,
    ),
    "qwen2_5_omni": Ear("audio_tower.layers"),
    "qwen2_5_omni_interleaved": Ear("audio_tower.layers"),
    "qwen2_audio": Ear("audio_tower.layers"),
    "qwen3_omni_moe": Ear("audio_tower.layers", step=0.08, reach=0.07),
    "qwen3_omni_moe_interleaved": Ear("audio_tower.layers", step=0.08, reach=0.07),
    "voxtral": Ear("audio_tower.layers", step=0.08, cut=True),
}


class Embedded(Exception):
    """Raised where the language model would begin."""


def embeddings(tiny: Tiny, inputs: dict[str, Any], blocks: str) -> tuple[TokenLayout, Tensor]:
    """The layout of the prompt's sounds, and what enters the language model: `[S, D]`."""
    base = adapter_for(tiny.model).base_model
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise Embedded

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    hooks = [block.register_forward_hook(leave) for block in base.get_submodule(blocks)]
    first = decoder_of(tiny.model).layers[0]
    hooks.append(first.register_forward_pre_hook(stop, with_kwargs=True))
    try:
        with watching(tiny) as calls, torch.enable_grad(), pytest.raises(Embedded):
            tiny.model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    (layout,) = layouts(adapter_for(tiny.model), calls, inputs)
    return layout[layout.modality == AUDIO], seen[0][0]


@pytest.mark.parametrize("name", EARS)
def test_a_token_is_heard_at_its_seconds(name: str) -> None:
    if name == "audioflamingo3" and OLD:
        pytest.skip("this release of transformers takes padding of windows for sound")
    ear = EARS[name]
    tiny = build(name)
    inputs = tiny.inputs()
    features = inputs[ear.features].clone().requires_grad_()
    layout, embedded = embeddings(tiny, {**inputs, ear.features: features}, ear.blocks)
    length = features.shape[ear.time]
    windows: dict[int, set[int]] = {}
    for n in range(len(layout)):
        (slope,) = torch.autograd.grad(
            embedded[layout.position[n]].sum(), features, retain_graph=True
        )
        moved = slope.abs().sum(dim=3 - ear.time) > 0  # [windows, time]
        (window,) = moved.any(dim=1).nonzero()[:, 0].tolist()
        before = windows.setdefault(int(layout.item[n]), set())
        before.add(window)
        # The windows of a sound follow each other.
        start = (window - min(before)) * length * ear.state
        heard = start + moved[window].nonzero()[:, 0].double() * ear.state
        begins = float(layout.seconds[n])
        assert heard[0] == pytest.approx(begins, abs=ear.reach + 1e-9), (n, heard)
        assert begins < heard[-1] + ear.state <= begins + ear.step + ear.reach + 1e-9, (n, heard)
    used = [sorted(one) for one in windows.values()]
    assert sum(used, []) == list(range(len(features))), "each window belongs to one sound"
    assert any(len(one) > 1 for one in used) == ear.cut


def test_every_family_that_hears_is_here() -> None:
    hearing = set()
    for name in NAMES:
        with suppress(pytest.skip.Exception):  # some need a package, and do not hear
            if "audio" in adapter_for(build(name).model).modalities:
                hearing.add(name)
    assert hearing == {name for name in EARS if family_of(name) not in UNUSABLE}


@pytest.mark.parametrize("name", [*SOUND_ONLY, "phi4_multimodal_sounds"])
def test_sounds_that_beams_tear_apart_are_refused(name: str) -> None:
    tiny = build(name)
    with prune(tiny.model, "random(keep=0.5)"):
        with pytest.raises(UnsupportedModelError, match="num_beams=1"):
            tiny.model.generate(**tiny.inputs(), num_beams=2, max_new_tokens=1)


@pytest.mark.parametrize("name", [*SOUND_ONLY, "phi4_multimodal_sounds"])
def test_equal_rows_of_a_batch_are_no_beams(name: str) -> None:
    tiny = build(name)
    inputs = {key: torch.cat([one, one]) for key, one in tiny.inputs().items()}
    with torch.no_grad(), prune(tiny.model, "random(keep=0.5)") as report:
        tiny.model(**inputs)
    first, second = report.calls[0].layouts
    assert torch.equal(first.position, second.position)


def test_windows_that_fill_no_run_are_told_apart() -> None:
    """Two sounds side by side: only the last window of a sound may be short."""
    tiny = build("audioflamingo3")
    inputs = tiny.inputs()
    ids = inputs["input_ids"]
    held = ids == PLACEHOLDER
    inputs["input_ids"] = torch.cat([ids[~held][None], ids[held][None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad(), prune(tiny.model) as report:
        tiny.model(**inputs)
    (layout,) = report.calls[0].layouts
    assert torch.bincount(layout.item).tolist() == [57, 15]
    assert layout.seconds[57] == 0
