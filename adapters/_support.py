"""Architectures that pruning cannot work on, found by the config alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from tokenprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["check_architecture"]

_KINDS: Final = {"attention", "full_attention", "sliding_attention"}
"""Kinds of decoder layers from which any token can go: each stores a key and a value of its own."""


def check_architecture(config: PreTrainedConfig) -> None:
    """Check that tokens of a model can be dropped, whether an adapter serves it or not.

    Raises:
        UnsupportedModelError: They cannot, in this architecture; says why.
    """
    reason = next(_obstacles(config), None)
    if reason is not None:
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} cannot be pruned: {reason}; use a decoder-only "
            "model whose layers each attend to keys and values of their own (`tokenprune list`)"
        )


def _obstacles(config: PreTrainedConfig) -> Iterator[str]:
    text: Any = config.get_text_config(decoder=True)
    if config.is_encoder_decoder or text.is_encoder_decoder:
        yield "an encoder reads the media, and the decoder's prompt holds none of their tokens"
    if getattr(text, "cross_attention_layers", None) or getattr(text, "cross_layer_interval", None):
        yield "the media are reached by cross-attention, and the prompt holds none of their tokens"
    shared = getattr(text, "num_kv_shared_layers", None)
    if shared:
        yield f"its last {shared} layers read keys and values of earlier layers"
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    if others := sorted(set(kinds) - _KINDS):
        named = ", ".join(others)
        yield f"it has layers of kind {named}, and tokens are taken from full and sliding attention"
