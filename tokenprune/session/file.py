"""Files of what a session has watched: tensors and plain text, nothing that runs when it is read.

A file is a safetensors file whose header says, as JSON, what wrote it and for which model. A digest
of all tensors and of that text tells whether it is whole; digests of the model's configuration and
of samples of its weights tell whether it is for the model at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tokenprune.errors import MediaError, TokenPruneError, UnsupportedModelError

__all__ = ["check_identity", "check_path", "identity", "read", "read_header", "write"]

_FORMAT = 4
_KEY = "tokenprune"
_SAMPLES = 64  # of each parameter
_VOLATILE = ("_name_or_path", "_attn_implementation", "transformers_version", "dtype")
"""Configuration that says nothing about what the model computes, or is compared on its own."""


def write(path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a file; an old one is replaced only by a whole new one.

    Args:
        path: Ends in ".safetensors".
        tensors: By name.
        header: Plain numbers, texts, lists and dictionaries.

    Raises:
        MediaError: The file cannot be written.
    """
    path = check_path(path)
    ready = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    text = json.dumps({**header, "format": _FORMAT}, sort_keys=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(ready, unfinished, metadata={_KEY: text, "digest": _digest(ready, text)})
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise MediaError(
            f"cannot write {str(path)!r}: {error}; give a place with room that can be written to"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_path(path: str | Path) -> Path:
    """Check that a file can be written there.

    Raises:
        MediaError: It has another ending, or the folder is not there.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise MediaError(f"what was watched is saved as .safetensors, got {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise MediaError(f"cannot write {str(path)!r}; give a file in a folder that exists")
    return path


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file, on the CPU: its tensors and its header.

    Raises:
        MediaError: It is damaged, or was not written by `write`.
    """
    text, digest = _texts(path)
    header = _header(path, text)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if _digest(tensors, text) != digest:
        raise _damaged(path, "its digest is another")
    return tensors, header


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a file only.

    Raises:
        MediaError: As `read`; damage of the tensors is not looked for.
    """
    return _header(path, _texts(path)[0])


def _texts(path: str | Path) -> tuple[str, str]:
    if not Path(path).is_file():
        raise MediaError(f"there is no file {str(path)!r}; give one that `watch --save` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if _KEY not in metadata or "digest" not in metadata:
        raise MediaError(
            f"{str(path)!r} holds nothing that was watched; give a file that `watch --save` or "
            "`Session.save` wrote"
        )
    return metadata[_KEY], metadata["digest"]


def _header(path: str | Path, text: str) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise _damaged(path, "its header is no JSON") from error
    if header.get("format") != _FORMAT:
        raise MediaError(
            f"{str(path)!r} is of format {header.get('format')}, written by tokenprune "
            f"{header.get('version')}, but this one reads format {_FORMAT}; watch the video again"
        )
    return header


def _damaged(path: str | Path, why: str) -> MediaError:
    return MediaError(
        f"{str(path)!r} is damaged or cut short ({why}); copy it anew, or watch the video again"
    )


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(tensors):
        one = tensors[name]
        digest.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        digest.update(_bytes(one))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


# -- which model


def identity(model: PreTrainedModel) -> dict[str, str]:
    """What tells a model from another: type, dtype, and digests of configuration and weights.

    Of each parameter, evenly spread samples are read, so that this takes no time with large models.
    Training changes almost every weight; a change of single ones may go by unseen.

    Raises:
        UnsupportedModelError: Weights are not in memory.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.device.type == "meta":
            raise UnsupportedModelError(
                f"weights such as {name} are offloaded, so the model cannot be told from others; "
                "load it into memory to save or to load what it watched"
            )
        step = max(1, parameter.numel() // _SAMPLES)
        samples = parameter.detach().flatten()[::step].cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(_bytes(samples))
    config = json.dumps(_stable(model.config.to_dict()), sort_keys=True, default=str)
    return {
        "model_type": str(model.config.model_type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": hashlib.blake2b(config.encode(), digest_size=16).hexdigest(),
        "weights": digest.hexdigest(),
    }


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stable(one) for name, one in value.items() if name not in _VOLATILE}
    return [_stable(one) for one in value] if isinstance(value, list | tuple) else value


def check_identity(path: str | Path, saved: dict[str, str], model: PreTrainedModel) -> None:
    """Check that a file is for a model.

    Raises:
        TokenPruneError: Another model watched it.
    """
    here = identity(model)
    names = {"model_type": "type", "dtype": "dtype", "config": "configuration"}
    for key, what in names.items():
        if saved[key] != here[key]:
            raise TokenPruneError(
                f"{str(path)!r} was watched by a model of {what} {saved[key]}, but this one's is "
                f"{here[key]}; load the same model, or watch the video again"
            )
    if saved["weights"] != here["weights"]:
        raise TokenPruneError(
            f"{str(path)!r} was watched by a {saved['model_type']} with other weights; load the "
            "same checkpoint, or watch the video again"
        )
