"""Architectures that cannot be pruned are refused, with the reason, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from tokenprune import prune
from tokenprune.adapters._support import check_architecture
from tokenprune.adapters.base import adapter_for, list_models
from tokenprune.errors import UnsupportedModelError
from tokenprune.models.load import load_model
from tokenprune.testing.snapshot import snapshot
from tokenprune.testing.tiny import FAMILIES, build
from tokenprune.testing.tiny.base import clip, text_config

HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
VISION = {"depth": 1, "hidden_size": 16, "out_hidden_size": 64, "num_heads": 2}
AUTO = transformers.AutoConfig.for_model


def _gemma3n() -> Any:
    text = text_config("gemma3n_text", num_kv_shared_layers=2).to_dict()
    return transformers.Gemma3nConfig(text_config=text)


def _qwen3_5() -> Any:
    text = text_config("qwen3_5_text", **HYBRID).to_dict()
    return transformers.Qwen3_5Config(text_config=text, vision_config=VISION)


def _mllama() -> Any:
    text = text_config(MllamaTextConfig, cross_attention_layers=[1, 3]).to_dict()
    return transformers.MllamaConfig(text_config=text)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    # An architecture with its tiny config, and why it is refused.
    "gemma3n": (_gemma3n, "its last 2 layers read keys and values of earlier layers"),
    "qwen3_5": (_qwen3_5, "layers of kind linear_attention"),
    "qwen3_next": (lambda: text_config("qwen3_next", **HYBRID), "layers of kind linear_attention"),
    "lfm2_vl": (
        lambda: AUTO("lfm2_vl", text_config=text_config("lfm2", layer_types=["conv"] * 5)),
        "layers of kind conv",
    ),
    "falcon_h1": (lambda: AUTO("falcon_h1"), "layers of kind hybrid"),
    "llama4": (lambda: AUTO("llama4"), "layers of kind chunked_attention"),
    "mllama": (_mllama, "reached by cross-attention"),
    "idefics": (lambda: AUTO("idefics"), "reached by cross-attention"),
    "florence2": (lambda: AUTO("florence2"), "an encoder reads the media"),
    "whisper": (lambda: AUTO("whisper"), "an encoder reads the media"),
    "t5gemma2": (lambda: AUTO("t5gemma2"), "an encoder reads the media"),
}

over_refused = pytest.mark.parametrize("kind, make, why", [(k, *v) for k, v in REFUSED.items()])


@over_refused
def test_a_config_is_enough_to_refuse(kind: str, make: Callable[[], Any], why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{kind}' cannot be pruned: .*{why}.*; use"):
        check_architecture(make())


@over_refused
def test_a_checkpoint_is_refused_before_its_weights_are_read(
    kind: str, make: Callable[[], Any], why: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=why):
        load_model(str(tmp_path), device="cpu")  # there are no weights to read


@pytest.mark.parametrize("kind", ["qwen3_5", "mllama"])
def test_a_model_is_refused_and_left_alone(kind: str) -> None:
    make, why = REFUSED[kind]
    config = make()
    with torch.device("meta"):
        model = transformers.AutoModelForMultimodalLM.from_config(config)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=why), prune(model, "none"):
        pass
    assert snapshot(model) == before


def test_a_served_family_on_a_hybrid_language_model_is_refused() -> None:
    """LLaVA takes any text model, also one that cannot be pruned."""
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=text_config("qwen3_next", **HYBRID)
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    assert config.model_type in list_models()
    with pytest.raises(UnsupportedModelError, match="layers of kind linear_attention"):
        adapter_for(model)


def test_the_command_says_why(tmp_path: Path, command: Any, files: Any) -> None:
    _gemma3n().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3n"
    ran = command("ask", files.image, "what is this?", "--model", tmp_path)
    assert ran.code == 2
    assert "its last 2 layers read keys and values of earlier layers" in ran.err


@pytest.mark.parametrize("name", FAMILIES)
def test_served_families_are_not_refused(name: str) -> None:
    check_architecture(build(name).model.config)
