"""Beams and several return sequences: whether `generate` gives each row its own media.

`generate` repeats its inputs, each row once a beam. Features that are encoded before that are
repeated sample by sample, or ought to be; pixels and mel frames are repeated one by one, so that
where a sample holds several images, tiles, audio items or windows its first beam would be given
the first of them several times. Releases of transformers differ in what they encode before, and
some mix up even that.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin

from tokenprune.adapters.base import Adapter
from tokenprune.core.layout import Modality
from tokenprune.errors import UnsupportedModelError

__all__ = ["check_beam_media"]

_DEFAULT_EXPAND: Final = GenerationMixin._expand_inputs_for_generation


def check_beam_media(adapter: Adapter, expand: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `expand`, by which `generate` repeats its inputs, in a check of the media.

    The check raises `UnsupportedModelError` if rows would be given media of other rows.
    """
    own_expand = type(adapter.model)._expand_inputs_for_generation is not _DEFAULT_EXPAND

    @functools.wraps(expand)
    def checked(*args: Any, **kwargs: Any) -> Any:
        ids, times = kwargs.get("input_ids"), kwargs.get("expand_size", 1)
        if times == 1 or ids is None:
            return expand(*args, **kwargs)
        placeholders = adapter.placeholders(ids, kwargs.get("mm_token_type_ids"))
        if not own_expand:  # some families know how to repeat pixels
            with_media = _rows_with_media(adapter, placeholders)
            for name, parts in _not_encoded(kwargs):
                # More parts than rows to hold them: one of the rows holds several.
                if parts > with_media.get(name, len(ids)):
                    raise _mixed_up(name, parts, len(ids))
        before = {name: list(one) for name, one in _encoded(kwargs)}
        repeated = expand(*args, **kwargs)
        for name, after in _encoded(repeated[1]):
            if len(before[name]) > 1 and name in placeholders:
                counts = placeholders[name].sum(dim=1).tolist()
                right = _sample_by_sample(before[name], counts, times)
                if not all(map(torch.equal, after, right)):
                    raise _mixed_up(f"{name} features", len(before[name]), len(ids))
        return repeated

    return checked


def _rows_with_media(adapter: Adapter, placeholders: dict[Modality, Tensor]) -> dict[str, int]:
    """How many rows hold what an argument of an encoder is encoded to, by the argument's name."""
    holding: dict[str, Tensor] = {}
    for path, modality in adapter.encoders().items():
        encode = operator.attrgetter(path)(adapter.base_model)
        for name in inspect.signature(encode).parameters:
            rows = placeholders[modality].any(dim=1)  # [B]
            holding[name] = holding[name] | rows if name in holding else rows
    return {name: int(rows.sum()) for name, rows in holding.items()}


def _not_encoded(arguments: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Arguments of `generate` that hold pixels or mel frames, and how many parts each has."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            if name != "position_ids":
                yield name, len(value)


def _encoded(arguments: dict[str, Any]) -> Iterator[tuple[Any, Sequence[Tensor]]]:
    """What is encoded before, by modality: features `[tokens, D]` of each part."""
    for name, output in (arguments.get("mm_encoder_outputs") or {}).items():
        if getattr(output, "pooler_output", None) is not None:
            yield name, output.pooler_output


def _sample_by_sample(parts: list[Tensor], counts: list[int], times: int) -> Iterator[Tensor]:
    """Parts in the order in which rows need them.

    Args:
        parts: Of all samples.
        counts: Placeholders of each sample.
        times: Rows of a sample.
    """
    left = iter(parts)
    for count in counts:
        mine: list[Tensor] = []
        while sum(map(len, mine)) < count and (more := list(islice(left, 1))):
            mine += more
        yield from mine * times


def _mixed_up(name: str, parts: int, rows: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        "beams and several return sequences need one picture or sound a row, in one piece: "
        f"transformers {transformers.__version__} would deal the {parts} parts of {name} to the "
        f"wrong ones of {rows} rows; use num_beams=1 and num_return_sequences=1, one medium a row, "
        "or, for pictures, a newer release"
    )
