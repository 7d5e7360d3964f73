"""Loading: from a name to a model with its processor, with its weights or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenprune.adapters._support import check_architecture
from tokenprune.adapters.base import ADAPTERS, find_adapter, list_models
from tokenprune.errors import (
    MissingExtraError,
    TokenPruneError,
    UnsupportedModelError,
    first_line,
)
from tokenprune.models import built_in_models
from tokenprune.models.loaded import LoadedModel

__all__ = ["DEFAULT_MODEL", "auto_class", "load_model", "load_outline"]

DEFAULT_MODEL = "mini-video"


def load_model(
    name: str | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> LoadedModel:
    """Load a model by its hub name, its folder, or the name of a built-in one.

    Args:
        name: For example "Qwen/Qwen2.5-VL-3B-Instruct"; None for the built-in mini video model.
        device: Where to put it; None for the accelerator, if there is one.
        dtype: None for the checkpoint's own (float32 for float16 checkpoints on a CPU).
        attention: Name of the attention implementation; None for the model's default.

    Raises:
        UnsupportedModelError: No adapter serves its type.
        TokenPruneError: It cannot be found or read.
        MissingExtraError: It rests on a package that is not installed.
    """
    name = name or DEFAULT_MODEL
    path = _find(name)
    device = device or _default_device()
    with _reading(name):
        config = _served_config(transformers.AutoConfig.from_pretrained(path), name)
        processor = _served_processor(path, config)
        model, found = auto_class(config).from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attention,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise _cannot_load(name, f"its weights lack {len(missing)} tensors, such as {missing[0]}")
    if dtype is None and _default_dtype(model.dtype, device) != model.dtype:
        model = model.to(_default_dtype(model.dtype, device))
    return LoadedModel(model.to(device).eval(), processor, name)


def load_outline(name: str | None = None, *, device: str | None = None) -> LoadedModel:
    """Load a model without its weights: parameters have shapes, but no data.

    Args:
        name: As in `load_model`.
        device: Where the model would be put. Parameters have the dtype that they would have there,
            if the checkpoint's config names one; float32 if not.

    Raises:
        TokenPruneError: As `load_model`.
    """
    name = name or DEFAULT_MODEL
    path = _find(name)
    with _reading(name):
        config = _served_config(transformers.AutoConfig.from_pretrained(path), name)
        processor = _served_processor(path, config)
        dtype = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
        dtype = _default_dtype(dtype, device or _default_device())
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=dtype)
    return LoadedModel(model.eval(), processor, name)


def auto_class(config: transformers.PreTrainedConfig) -> Any:
    """Choose the auto class of transformers that makes a generating model of this config."""
    # Some audio models are not on the list of multimodal ones; lists have no public names.
    audio = type(config) in transformers.AutoModelForSeq2SeqLM._model_mapping
    found = transformers.AutoModelForSeq2SeqLM if audio else transformers.AutoModelForMultimodalLM
    if type(config) not in found._model_mapping and config.architectures:
        # Older releases of transformers list Qwen-Omni, but not its thinkers.
        found.register(type(config), getattr(transformers, config.architectures[0]))
    return found


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _default_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """The dtype of a model whose checkpoint has another: processors are slow in float16."""
    return torch.float32 if (stored, device) == (torch.float16, "cpu") else stored


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what goes wrong with the files of a model into one error."""
    try:
        yield
    except TokenPruneError:
        raise
    except ImportError as error:  # some towers and processors rest on packages of their own
        raise MissingExtraError(
            f"cannot load model {name!r}: {first_line(error).rstrip(':')}; install that package"
        ) from error
    except Exception as error:  # broken files raise whatever their readers raise
        raise _cannot_load(name, first_line(error)) from error


def _find(name: str) -> str:
    """The folder of a model, or its hub name; only names of the form owner/name go to the hub."""
    path = str(built_in_models().get(name, name))
    if Path(path).is_dir() or (name.count("/") == 1 and name[0].isalnum()):
        return path
    raise _cannot_load(name, "there is no such folder")


def _served_config(config: Any, name: str) -> Any:
    """The config that an adapter serves: the checkpoint's, or that of a part which is a model.

    Qwen-Omni checkpoints hold a model that understands, the thinker, and one that speaks.
    """
    parts = [getattr(config, part, None) for part in getattr(config, "sub_configs", ())]
    for one in (config, *parts):
        if ADAPTERS.knows(getattr(one, "model_type", "")):
            check_architecture(one)
            return find_adapter(one.model_type).fix_config(one)
    check_architecture(config)
    raise UnsupportedModelError(
        f"no adapter for model_type {config.model_type!r} of {name}; "
        f"known: {', '.join(list_models())}"
    )


def _served_processor(path: str, config: Any) -> Any:
    """The processor of a checkpoint whose config an adapter serves."""
    processor = transformers.AutoProcessor.from_pretrained(path)
    return find_adapter(config.model_type).fix_processor(processor)


def _cannot_load(name: str, why: str) -> TokenPruneError:
    built_in = ", ".join(built_in_models()) or "none"
    return TokenPruneError(
        f"cannot load model {name!r}: {why}; give a hub name (owner/name), a folder with "
        f"config.json and weights, or a built-in model ({built_in})"
    )
