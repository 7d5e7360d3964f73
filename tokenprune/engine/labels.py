"""Losses under pruning: each logit row is paired with the label of the token that follows it.

A model given `labels` shifts them by one against its logits. Under pruning logits are short, and
the next row is not always that of the next token. So rows keep their logical index up to the loss:
the target of row p is `labels[p + 1]` of the unpruned sequence, whether token p + 1 was dropped or
not, and rows that were dropped predict nothing. That is the loss of the unpruned model with the
dropped tokens masked, taken over the rows that are left.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenprune.adapters.base import Adapter
from tokenprune.engine.flight import Flight
from tokenprune.engine.hooks import add_hook
from tokenprune.errors import UnsupportedModelError
from tokenprune.report.report import Call

__all__ = ["LogitRows"]

Loss = Callable[..., Tensor]

_IGNORED: Final = -100


class LogitRows:
    """Which logical row each row of the model's logits is, and the labels that go with them.

    Args:
        adapter: Of the model.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._model, self._decoder = adapter.model, adapter.language_model
        self._signature = inspect.signature(adapter.model.forward)
        self._heads = _heads(self._model, self._decoder)
        # Some pass on what they do not name.
        self._cuts_logits = any("logits_to_keep" in _parameters(one) for one in self._heads)
        self._flight: Flight | None = None
        self._wanted: int | Tensor = 0
        self._routers = False
        self._taken: tuple[Tensor, Tensor | None] | None = None

    @property
    def wanted(self) -> int:
        """Rows at the end of the prompt whose logits the caller wants; 0 for all."""
        return self._wanted if isinstance(self._wanted, int) else 0

    def watch(self, stack: ExitStack) -> None:
        """Pair logits and labels until the stack closes."""
        inline = _has_loss_inline(self._model)
        before = functools.partial(self._before_forward, take_labels=inline)
        add_hook(stack, self._model, "register_forward_pre_hook", before, with_kwargs=True)
        if inline:
            add_hook(stack, self._model, "register_forward_hook", self._add_loss)
        for head in self._heads:
            if not inline and "loss_function" in _names(head):
                self._shadow_loss(stack, head)

    def prefilled(self, flight: Flight, call: Call) -> None:
        """The language model returned from a prompt with media; these rows are left.

        Raises:
            UnsupportedModelError: What the caller asks for is told by rows that are gone.
        """
        self._flight = flight
        wanted, routers = self._wanted, self._routers
        self._wanted, self._routers = 0, False
        if flight.source is not None and not isinstance(wanted, int):
            raise UnsupportedModelError(
                "logits_to_keep as a tensor names rows of the unpruned sequence, and some of them "
                "were dropped; give a number of rows, and look up report.last.logit_rows"
            )
        if flight.source is not None and routers:
            raise UnsupportedModelError(
                "output_router_logits=True balances experts over rows of the unpruned sequence, "
                "and some of them were dropped; leave it out"
            )
        call.logit_rows = _cut(flight.rows, wanted)

    # -- hooks

    def _before_forward(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], *, take_labels: bool
    ) -> Any:
        """The model is called. Labels are taken out if its forward computes the loss itself."""
        if self._decoder.training:
            _check_layers(self._decoder)
        if args:
            kwargs = {**self._signature.bind_partial(*args).arguments, **kwargs}
        self._flight = self._taken = None
        self._wanted = kwargs.get("logits_to_keep", 0) if self._cuts_logits else 0
        self._routers = bool(kwargs.get("output_router_logits"))
        if not take_labels or kwargs.get("labels") is None:
            return None
        self._taken = kwargs["labels"], kwargs.get("attention_mask")
        return (), {**kwargs, "labels": None}

    def _add_loss(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Add the loss to what the model returns, by the rule of families that have it inline."""
        if self._taken is None:
            return None
        (labels, mask), self._taken = self._taken, None
        if isinstance(output, tuple):
            return (self._inline_loss(output[0], labels, mask), *output)
        loss = self._inline_loss(output.logits, labels, mask)
        return type(output)(**{**dict(output.items()), "loss": loss})

    def _inline_loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over all rows that a real token follows."""
        rows = self._rows(logits.shape[1])
        if rows is None or self._flight is None:
            length = labels.shape[1]
            first = length - logits.shape[1]
            rows = torch.arange(first, length).expand(len(logits), -1)
        else:
            length = self._flight.length
        rows, labels = rows.to(logits.device), labels.to(logits.device)
        followed = (rows >= 0) & (rows + 1 < length)  # [B, Q]
        if mask is not None and mask.ndim == 2:
            real = mask[:, -length:].to(rows.device) != 0
            followed &= real.gather(1, (rows + 1).clamp(0, length - 1))
        targets = _targets(rows, labels, length, ahead=1)
        return nn.functional.cross_entropy(logits[followed], targets[followed])

    def _shadow_loss(self, stack: ExitStack, head: PreTrainedModel) -> None:
        """Put a loss that knows its rows in front of the one that a model calls."""
        loss: Loss = head.loss_function  # a property: what is set by its setter comes first
        if "_loss_function" in vars(head):
            stack.callback(setattr, head, "_loss_function", loss)
        else:
            stack.callback(delattr, head, "_loss_function")

        @functools.wraps(loss)
        def of_rows(logits: Tensor, labels: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
            rows = self._rows(logits.shape[1]) if logits.ndim == 3 else None
            shifted = kwargs.get("shift_labels")
            given, ahead = (labels, 1) if shifted is None else (shifted, 0)
            flight = self._flight
            if rows is None or flight is None or given is None:
                return loss(logits, labels, *args, **kwargs)
            ignored = kwargs.get("ignore_index", _IGNORED)
            targets = _targets(rows, given, flight.length, ahead, ignored)
            # A loss that does not know `shift_labels` shifts by one itself.
            labels = nn.functional.pad(targets[:, :-1], (1, 0), value=ignored)
            return loss(logits, labels, *args, **{**kwargs, "shift_labels": targets})

        head._loss_function = of_rows

    def _rows(self, count: int) -> Tensor | None:
        """`[B, Q]` index into the input of the last rows; None if none was dropped."""
        flight = self._flight
        return None if flight is None or flight.source is None else flight.source[:, -count:]


def _heads(model: PreTrainedModel, decoder: nn.Module) -> list[PreTrainedModel]:
    """The model, and those inside it that take labels around the decoder layers."""
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and "labels" in _parameters(module)
        and any(inner is decoder for inner in module.modules())
    ]


def _check_layers(decoder: nn.Module) -> None:
    """Layers that are computed anew in the backward pass would not be given their rows again."""
    if any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
        raise UnsupportedModelError(
            "cannot prune a language model whose layers are checkpointed to save memory in "
            "training; call model.gradient_checkpointing_disable()"
        )


def _parameters(model: PreTrainedModel) -> Iterable[str]:
    return inspect.signature(type(model).forward).parameters


def _names(model: PreTrainedModel) -> tuple[str, ...]:
    """What the code of a model's forward calls."""
    names: tuple[str, ...] = inspect.unwrap(type(model).forward).__code__.co_names
    return names


def _has_loss_inline(model: PreTrainedModel) -> bool:
    return "labels" in _parameters(model) and "CrossEntropyLoss" in _names(model)


def _cut(rows: Tensor, wanted: int | Tensor) -> Tensor:
    """Rows `[B, Q]` of logits, cut as `logits_to_keep` tells the model to."""
    if isinstance(wanted, int):
        return rows[:, -wanted:]
    wanted = wanted.to(rows.device)
    if wanted.ndim == 1:
        return rows[:, wanted]
    return rows[wanted] if wanted.dtype == torch.bool else rows.gather(1, wanted)


def _targets(
    rows: Tensor, labels: Tensor, length: int, ahead: int, ignored: int = _IGNORED
) -> Tensor:
    """What each row is to predict, `[B, Q]`.

    Args:
        rows: `[B, Q]` index into the input, -1 for holes.
        labels: `[B, S]`, or those of the last tokens of the input only.
        length: `S`.
        ahead: How much later a label stands than the row that predicts it: 1, or 0 if shifted.
        ignored: The target of rows that predict nothing.
    """
    count = labels.shape[1]
    if count > length:
        raise UnsupportedModelError(
            f"labels must be of the {length} tokens of the input, got {count}"
        )
    rows = rows.to(labels.device)
    place = rows - (length - count)
    known = (rows >= 0) & (place >= 0) & (place + ahead < count)
    return torch.where(known, labels.gather(1, (place + ahead).clamp(0, count - 1)), ignored)
