"""Adapters: how a model family lays out its media tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tokenprune.adapters._support import check_architecture
from tokenprune.adapters._wrapped import unwrapped
from tokenprune.core.context import ModelShape
from tokenprune.core.layout import Modality
from tokenprune.core.registry import Registry
from tokenprune.core.signal import EncoderSignal
from tokenprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Item",
    "MediaCall",
    "Tower",
    "adapter_for",
    "find_adapter",
    "list_models",
]

ADAPTERS: Registry[Adapter] = Registry(
    kind="model",
    what="adapter for model_type",
    package="tokenprune.adapters",
    error=UnsupportedModelError,
    unknown='Add adapters/<family>.py (see README, "Add a model")',
    clash="uninstall or rename one",
)


@dataclass(eq=False)
class MediaCall:
    """One call of an encoder: its arguments, and what it encoded.

    Attributes:
        modality: What was encoded.
        arguments: The bound arguments of `get_image_features` and its kin.
        maps: By encoder signal: what it made of each view, in encoding order;
        view_tokens: and how many tokens each view has.
        items: What it encoded; filled in by `engine.layouts.lay_out`.
    """

    modality: Modality
    arguments: dict[str, Any]
    maps: dict[EncoderSignal, list[Tensor]] = field(default_factory=dict)
    view_tokens: list[int] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


@dataclass(frozen=True)
class Item:
    """The placeholders of one image, clip or audio, in prompt order.

    Attributes:
        real: `[P]` bool: whether a placeholder stands for media (False: a newline or class token).
        canvas: `[N]` int64 for the `N` real ones: which canvas of the item, from 0; of several
            canvases of an image, 0 shows all of it.
        frame: `[N]` int64, -1 for images.
        row: `[N]` int64, -1 for audio.
        column: `[N]` int64.
        seconds: `[N]` float64, nan if unknown.
    """

    real: Tensor
    canvas: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor
    seconds: Tensor

    @classmethod
    def grid(
        cls, frames: int, rows: int, columns: int, *, video: bool, seconds: Tensor | None = None
    ) -> Item:
        """Frames (or tiles) of equal size, one canvas each, no separators.

        Args:
            seconds: `[frames]`, start of each frame.
        """
        frame, row, column = torch.meshgrid(
            torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij"
        )
        frame = frame.flatten()
        times = torch.full((frames,), torch.nan) if seconds is None else seconds
        return cls(
            real=torch.ones(len(frame), dtype=torch.bool),
            canvas=frame,
            frame=frame if video else torch.full_like(frame, -1),
            row=row.flatten(),
            column=column.flatten(),
            seconds=times.to(torch.float64)[frame],
        )

    @classmethod
    def audio(cls, seconds: Tensor, frame: Tensor | None = None) -> Item:
        """Audio: one canvas with a single line of tokens.

        Args:
            seconds: `[N]`, when what each token stands for begins.
            frame: `[N]` int64, where several tokens stand for the same time; None: none do.
        """
        index = torch.arange(len(seconds))
        return cls(
            real=torch.ones(len(seconds), dtype=torch.bool),
            canvas=torch.zeros_like(index),
            frame=index if frame is None else frame,
            row=torch.full_like(index, -1),
            column=index,
            seconds=seconds.to(torch.float64),
        )


@dataclass(frozen=True)
class Tower:
    """The encoder of a modality, as methods that read its attention need it.

    What attends to itself is a view: an image, a tile or a frame, a sound or a window of one.

    Attributes:
        block: The block whose output becomes the features; its attention is read.
        prefix_tokens: Leading tokens of each view that are no patches (a class token).
        biased: Whether its mask adds relative positions to the scores.
    """

    block: nn.Module
    prefix_tokens: int = 0
    biased: bool = False


class Adapter(ABC):
    """The facts of a model family. One subclass, in one file of `adapters/`.

    The engine needs no per-family code: it finds the language model by `get_decoder()`. An
    adapter only says what each placeholder of the prompt stands for.
    """

    model_types: ClassVar[tuple[str, ...]]
    """`config.model_type` of the models served."""
    modalities: ClassVar[tuple[Modality, ...]]

    audio_in_video: ClassVar[bool] = False
    """Whether audio of a clip is interleaved with its frames (`use_audio_in_video`)."""
    seconds_name: ClassVar[str | None] = None
    """The model's argument for the seconds between frames; None if there is none."""
    sees_ahead: ClassVar[bool] = False
    """Whether the tokens of an image attend to those of it that come later."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for model_type in cls.__dict__.get("model_types", ()):
            ADAPTERS.add(model_type, cls)

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config

    @classmethod
    def fix_config(cls, config: Any) -> Any:
        """Correct the config of a checkpoint, where releases of transformers misread it."""
        return config

    @classmethod
    def fix_processor(cls, processor: Any) -> Any:
        """Replace the processor of a checkpoint, where it cannot do all that its model can."""
        return processor

    # -- where things are; the defaults serve most families

    @property
    def language_model(self) -> nn.Module:
        """The decoder stack, with its `layers`."""
        decoder: Any = self.model.get_decoder()
        # In older releases of transformers some families name the outer model.
        return decoder if hasattr(decoder, "layers") else decoder.model  # type: ignore[no-any-return]

    @property
    def base_model(self) -> nn.Module:
        """The module that turns `input_ids` and media into embeddings."""
        inner: nn.Module = getattr(self.model, "model", self.model)
        # In older releases of transformers some families encode above the language model alone.
        encodes = all(hasattr(inner, name.partition(".")[0]) for name in self.encoders())
        return inner if encodes else self.model

    @property
    def shape(self) -> ModelShape:
        """Sizes of the language model."""
        text = self.config.get_text_config(decoder=True)
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return ModelShape(
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            width=text.hidden_size,
            head_width=head_width,
        )

    @property
    def pictures_per_frame(self) -> int:
        """Pictures of a clip that the model makes one frame of."""
        vision = getattr(self.config, "vision_config", None)
        return int(getattr(vision, "temporal_patch_size", 1))

    def token_ids(self) -> dict[Modality, int]:
        """The placeholder token of each modality."""
        return {name: getattr(self.config, f"{name}_token_id") for name in self.modalities}

    def placeholders(
        self, input_ids: Tensor, types: Tensor | None = None
    ) -> dict[Modality, Tensor]:
        """Where the placeholders of each modality stand: `[B, S]` bool, as `input_ids`.

        Args:
            input_ids: `[B, S]`.
            types: `[B, S]`, the prompt's `mm_token_type_ids`, if it has them.
        """
        return {name: input_ids == token for name, token in self.token_ids().items()}

    def encoders(self) -> dict[str, Modality]:
        """Methods that encode media, by name, with what they encode.

        A name is that of a method of `base_model`, or a dotted path to a method of a module inside
        it ("audio_tower.forward") where a family has no method for it.
        """
        return {f"get_{name}_features": name for name in self.modalities}

    def modality(
        self, modality: Modality, arguments: dict[str, Any], prompt: dict[str, Any]
    ) -> Modality:
        """What an encoder call encodes; differs from `encoders` where a method serves two.

        Args:
            modality: According to `encoders`.
            arguments: Of the call.
            prompt: As in `items`; that of the last forward, where media are encoded before it.
        """
        return modality

    def embed(self, prompt: dict[str, Any]) -> Tensor:
        """Embeddings `[B, S, D]` for a language model that is called with `input_ids` itself.

        Args:
            prompt: Its keyword arguments; those that are used up are taken out.
        """
        embed: Any = self.language_model.get_input_embeddings()  # type: ignore[operator]
        embedded: Tensor = embed(prompt.pop("input_ids"))
        return embedded

    # -- what tokens stand for

    @abstractmethod
    def items(self, call: MediaCall, prompt: dict[str, Any]) -> list[Item]:
        """The images, clips or audio that an encoder call encoded, in order.

        Args:
            call: The encoder call.
            prompt: Keyword arguments of the base model's forward (`second_per_grid_ts` and such).
        """

    def frame_times(self, seconds: Tensor) -> Tensor:
        """The times of a layout's frames, from the times of the pictures they are made of.

        Args:
            seconds: `[F]` float64, those of the pictures that the processor was given.

        Returns:
            `[T]`; fewer than `F` where the model joins pictures to one frame.
        """
        return seconds

    def tower(self, modality: Modality) -> Tower | None:
        """The tower whose attention methods may read; None if there is none to read."""
        return None

    def view_lengths(self, call: MediaCall) -> list[int] | None:
        """Patches of each view, where views are concatenated and attention has no boundaries."""
        return None

    def padding(self, call: MediaCall) -> Tensor | None:
        """Padding inside views, patches or states of sound, which attention masks.

        Returns:
            `[W, Nv]` bool for a tower that batches its views; None if there are none.
        """
        return None

    def align(self, call: MediaCall, maps: list[Tensor]) -> list[Tensor]:
        """Pool and pack maps of views into one entry a media token, as the model does features.

        Args:
            call: The encoder call, its `items` filled in.
            maps: One a view, all alike: `[Nv]` numbers, or `[Nv, C]` with channels, each of which
                is aligned as if it were alone.

        Returns:
            For each of `call.items` a map `[N]` or `[N, C]` of its real tokens.
        """
        raise UnsupportedModelError(
            f"{self.config.model_type} does not align encoder maps; use a method without them"
        )

    def grey(self, call: MediaCall) -> list[Tensor] | None:
        """Grey levels of each patch's pixels, `[Nv, pixels]` 0..255 a view; None if unknown."""
        return None


def list_models() -> dict[str, type[Adapter]]:
    """All adapters that can be used, by `config.model_type`: built-in, installed and registered.

    Warns:
        RuntimeWarning: For a model type that several serve, or whose package is broken.
    """
    return ADAPTERS.usable()


def find_adapter(model_type: str) -> type[Adapter]:
    """The adapter class of this `config.model_type`.

    Raises:
        UnsupportedModelError: There is none, several serve it, or its package is broken.
    """
    return ADAPTERS.find(model_type)


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model, of the one inside where it is wrapped.

    Raises:
        UnsupportedModelError: No adapter serves its type, or none could.
    """
    from transformers import PreTrainedConfig  # heavy

    model = unwrapped(model)
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        check_architecture(config)
    model_type: Any = getattr(config, "model_type", None)  # None is told of as such
    return find_adapter(model_type)(cast("PreTrainedModel", model))
