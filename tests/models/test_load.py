"""Loading checkpoints, and what is wrong with those that cannot be loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokenprune.models.load
from tests.checkpoints import loader
from tokenprune.errors import MissingExtraError, TokenPruneError, UnsupportedModelError
from tokenprune.models.load import load_model


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return loader(checkpoint)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint that may be spoilt."""
    return shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "copy")


def test_models_are_ready_to_answer(loaded):
    one = loaded("qwen2_vl")

    assert not one.model.training
    assert one.model.dtype == torch.float32
    assert type(one.adapter).__name__ == "Qwen2VL"


def test_omni_checkpoints_load_their_thinker_with_all_its_weights(loaded, checkpoint):
    one = loaded("qwen2_5_omni")
    saved = load_file(checkpoint("qwen2_5_omni") / "model.safetensors")

    assert type(one.model).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    state = one.model.state_dict()
    assert {f"thinker.{name}" for name in state} == set(saved)
    assert all(torch.equal(value, saved[f"thinker.{name}"]) for name, value in state.items())


def test_a_thinker_on_its_own_loads(loaded, tmp_path):
    one = loaded("qwen2_5_omni")
    one.model.save_pretrained(tmp_path)
    one.processor.save_pretrained(tmp_path)
    alone = load_model(str(tmp_path), device="cpu")

    state = alone.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.model.state_dict().items())


def test_a_missing_package_fails(copy, monkeypatch):
    def absent(*args, **kwargs):
        raise ImportError("\nSomeTower requires the timm library. Do so with pip:\n`x`")

    monkeypatch.setattr(
        tokenprune.models.load.transformers.AutoProcessor, "from_pretrained", absent
    )
    with pytest.raises(MissingExtraError, match="requires the timm library.* install that package"):
        load_model(str(copy), device="cpu")


def test_half_precision_is_widened_on_a_cpu_only(copy):
    weights = load_file(copy / "model.safetensors")
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))

    assert load_model(str(copy), device="cpu").model.dtype == torch.float32
    assert load_model(str(copy), device="cpu", dtype=torch.float16).model.dtype == torch.float16


def test_an_attention_can_be_chosen(checkpoint):
    folder = str(checkpoint("qwen2_vl"))
    one = load_model(folder, device="cpu", attention="eager")

    assert one.model.get_decoder().config._attn_implementation == "eager"
    with pytest.raises(TokenPruneError, match="cannot load model .*magic"):
        load_model(folder, device="cpu", attention="magic")


def test_a_missing_folder_fails(tmp_path):
    for name in (str(tmp_path / "nothing"), "./nothing", "a/b/c", "nothing"):
        with pytest.raises(TokenPruneError, match=r"no such folder; give a hub name \(owner/name"):
            load_model(name)


def test_the_built_in_model_is_the_default(copy, monkeypatch):
    monkeypatch.setattr(tokenprune.models.load, "built_in_models", lambda: {"mini-video": copy})

    assert load_model(device="cpu").name == "mini-video"


def test_a_folder_without_a_config_fails(copy):
    (copy / "config.json").unlink()
    with pytest.raises(TokenPruneError, match="cannot load model .*config.json"):
        load_model(str(copy))


def test_an_unreadable_config_fails(copy):
    (copy / "config.json").write_text("{]")
    with pytest.raises(TokenPruneError, match="cannot load model .*; give a hub name"):
        load_model(str(copy))


def test_a_folder_without_weights_fails(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(TokenPruneError, match="cannot load model .*safetensors"):
        load_model(str(copy))


def test_broken_weights_fail(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(TokenPruneError, match="cannot load model .*; give a hub name"):
        load_model(str(copy))


def test_weights_of_another_shape_fail(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 112
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(TokenPruneError, match="cannot load model"):
        load_model(str(copy))


def test_missing_weights_fail(copy):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "layers.3" in name)
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TokenPruneError, match="its weights lack 1 tensors, such as .*layers.3"):
        load_model(str(copy))


def test_a_folder_without_a_processor_fails(copy):
    for file in copy.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    with pytest.raises(TokenPruneError, match="cannot load model"):
        load_model(str(copy))


def test_a_model_type_without_an_adapter_fails(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(
        UnsupportedModelError, match="no adapter for model_type 'gpt2' of .*; known"
    ):
        load_model(str(copy))
