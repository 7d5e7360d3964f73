"""Weight files: which tensors a checkpoint has, and a copy of them under other names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file

from tokenprune.errors import TokenPruneError

__all__ = ["Source", "plan_weights", "weight_files", "write_weights"]


class Source(NamedTuple):
    """A tensor of the original: its file, and its name there."""

    file: Path
    name: str


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint.

    Raises:
        TokenPruneError: There are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TokenPruneError(f"no .safetensors file in {str(folder)!r}; save the weights as such")
    return files


def plan_weights(
    files: list[Path], wanted: dict[str, tuple[int, ...]], rename: Callable[[str], str | None]
) -> dict[str, Source]:
    """Find for each tensor of a model where it comes from, without reading any.

    Args:
        files: An earlier one goes before a later one.
        wanted: Names and shapes in the model.
        rename: From a name of the original to that in the model; None for what is left behind.

    Raises:
        TokenPruneError: A tensor is missing, has another shape, or has no place in the model.
    """
    found: dict[str, Source] = {}
    for file in files:
        for name, shape in _shapes(file):
            target = rename(name)
            if target is None or target in found:
                continue
            if wanted.get(target) != shape:
                raise TokenPruneError(
                    f"{name} in {str(file)!r} has shape {shape}, but the model has "
                    f"{wanted.get(target, 'no such tensor')}; check config.json and --tower"
                )
            found[target] = Source(file, name)
    if missing := sorted(wanted.keys() - found.keys()):
        raise TokenPruneError(
            f"the weights lack {len(missing)} tensors, such as {missing[0]}; if these are the "
            "tower's, give the folder of its checkpoint with --tower"
        )
    return found


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
            yield name, tuple(tensors.get_slice(name).get_shape())


def write_weights(tensors: dict[str, Source], out: Path) -> None:
    """Write the tensors under their names in the model, one file of the original after the other.

    Memory holds one of these files at a time.
    """
    files = list(dict.fromkeys(source.file for source in tensors.values()))
    places: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, 1):
        shard = f"model-{number:05}-of-{len(files):05}.safetensors"
        with safe_open(file, framework="pt") as opened:
            weights = {
                target: opened.get_tensor(source.name)
                for target, source in tensors.items()
                if source.file == file
            }
        save_file(weights, out / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, shard)
        size += sum(one.nbytes for one in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
