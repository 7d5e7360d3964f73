"""What the training has to know of a model family: one small class, a file per family beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from tokenprune.eval.mini.vocabulary import TOKENS

__all__ = ["Architecture"]


class Architecture(ABC):
    """A mini model in training: its parts, and how its prompt is laid out.

    A prompt is `<|user|><|vision_start|>`, the media tokens of all frames, what follows them
    (`ending`), and the question.

    Attributes:
        frame_size: Height and width of a frame in pixels, as the tower sees it.
        grid: Rows and columns of a frame's media tokens.
        source_sizes: Sizes in which frames are drawn before they are brought to `frame_size`.
        text_follows: Whether the text's positions lie after those of all frames.
    """

    frame_size: ClassVar[tuple[int, int]]
    grid: ClassVar[tuple[int, int]]
    source_sizes: ClassVar[tuple[tuple[int, int], ...]]
    text_follows: ClassVar[bool]

    opening = ("<|user|>", "<|vision_start|>")

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokenizer = self.build_processor().tokenizer
        self.use_training_attention()

    @classmethod
    def fresh(cls, seed: int) -> Self:
        """One that has learnt nothing."""
        return cls(cls.build_model(seed))

    @staticmethod
    @abstractmethod
    def build_model(seed: int) -> Any:
        """A freshly initialised model in float32."""

    @staticmethod
    @abstractmethod
    def build_processor() -> ProcessorMixin:
        """Its processor."""

    @abstractmethod
    def use_training_attention(self) -> None:
        """Set "mini_by_question" for the decoder, and what is fast for the tower."""

    @property
    @abstractmethod
    def visual(self) -> nn.Module:
        """All that makes features of frames: what stage 1 trains."""

    @property
    @abstractmethod
    def feature_layer(self) -> nn.Linear:
        """The last layer of `visual`, into which a change of its features can be folded."""

    @property
    @abstractmethod
    def language(self) -> nn.Module:
        """All that stage 2 trains."""

    @property
    def decoder(self) -> Any:
        """What takes embeddings and gives hidden states; a part of `language`, or all of it."""
        return self.model.get_decoder()

    @abstractmethod
    def encode(self, frames: NDArray[np.uint8]) -> Tensor:
        """Features of frames `[n, height, width, 3]`: `[n, frame_tokens, D]`."""

    @abstractmethod
    def ending(self) -> Tensor:
        """Embeddings between the last frame and the question, `[n, D]`."""

    @abstractmethod
    def positions(self, frames: int) -> tuple[Tensor, int]:
        """Positions of all that comes before the question `[1 or 3, P]`, and its first one."""

    @property
    def frame_tokens(self) -> int:
        """Media tokens of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def width(self) -> int:
        """D, of features and hidden states."""
        return int(self.decoder.config.hidden_size)

    def embed(self, *words: str) -> Tensor:
        """Embeddings of tokens, `[n, D]`."""
        found: Tensor = self.decoder.embed_tokens(torch.tensor([TOKENS[word] for word in words]))
        return found

    def save(self, folder: Path) -> None:
        """Write weights in float16, configuration and processor to `folder`."""
        state = {name: value.detach().half() for name, value in self.model.state_dict().items()}
        dtype = self.model.config.dtype
        self.model.save_pretrained(folder, state_dict=state)
        self.model.config.dtype = dtype
        self.build_processor().save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
