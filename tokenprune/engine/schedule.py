"""The stages of a recipe on one model, by where they act."""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune.adapters.base import Adapter
from tokenprune.core.recipe import Recipe
from tokenprune.core.site import Cache, Input, Layer
from tokenprune.core.stage import EncoderStage, Stage
from tokenprune.errors import RecipeError, UnsupportedModelError

__all__ = ["Schedule", "make_schedule"]


class Schedule:
    """Which stages act where.

    Attributes:
        adapter: Of the model.
        stages: All of them, in the order of the recipe.
        compact: Whether what is left of the input is numbered anew.
        encoder: Stages that read the encoder's attention.
        input: Stages on the embeddings.
        layer: Stages on the hidden states that enter a layer, by the layer's number.
        cache: Stages on the caches of layers.
    """

    def __init__(self, adapter: Adapter, stages: Iterable[Stage], compact: bool = False) -> None:
        self.adapter = adapter
        self.stages = tuple(stages)
        self.compact = compact
        self.encoder = [stage for stage in self.stages if isinstance(stage, EncoderStage)]
        self.input = [stage for stage in self.stages if isinstance(stage.site, Input)]
        self.cache = [stage for stage in self.stages if isinstance(stage.site, Cache)]
        self.layer: dict[int, list[Stage]] = {}
        for stage in self.stages:
            if isinstance(stage.site, Layer):
                self.layer.setdefault(stage.site.index, []).append(stage)

    def cache_stages(self, layer: int) -> list[Stage]:
        """Stages on the cache of one layer."""
        return [
            stage
            for stage in self.cache
            if isinstance(stage.site, Cache)
            and (stage.site.layers is None or layer in stage.site.layers)
        ]


def make_schedule(adapter: Adapter, recipe: Recipe, positions: str) -> Schedule:
    """The schedule of a recipe.

    Raises:
        RecipeError: The recipe, or `positions`, does not fit the model.
        UnsupportedModelError: The model lacks what a stage reads or prunes.
    """
    if positions not in ("original", "compact"):
        raise RecipeError(f"positions must be 'original' or 'compact', got {positions!r}")
    stages = recipe.stages(adapter.shape)
    kind = adapter.config.model_type
    for stage in stages:
        wanted = set(adapter.modalities) & stage.modalities
        if not wanted:
            raise UnsupportedModelError(
                f"{stage.name} prunes {_join(stage.modalities)} tokens, but {kind} "
                f"has only {_join(adapter.modalities)} tokens"
            )
        if isinstance(stage, EncoderStage) and not any(map(adapter.tower, wanted)):
            raise UnsupportedModelError(
                f"{stage.name} reads the encoder's attention, which {kind} does not offer for "
                f"{_join(wanted)}"
            )
    text = adapter.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if positions == "compact" and "mrope_section" in rope:
        raise RecipeError(
            f"positions='compact' needs one-dimensional positions, but {kind} counts time, "
            "row and column; use positions='original'"
        )
    return Schedule(adapter, stages, compact=positions == "compact")


def _join(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))
