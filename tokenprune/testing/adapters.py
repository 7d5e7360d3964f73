"""Holds an adapter to what a model does with its media."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenprune.adapters.base import ADAPTERS, Adapter, Tower, adapter_for
from tokenprune.core.context import Context, EncoderView
from tokenprune.core.layout import MODALITIES, TokenLayout
from tokenprune.core.selection import Selection
from tokenprune.core.signal import EncoderSignal
from tokenprune.core.site import Input
from tokenprune.core.stage import Stage
from tokenprune.engine.patch import prune
from tokenprune.errors import TokenPruneError
from tokenprune.testing.harness import Run, assert_matches_oracle, generate, same
from tokenprune.testing.layouts import check_layout
from tokenprune.testing.oracle import positions_logged
from tokenprune.testing.outcomes import Outcomes, failing, hold, some
from tokenprune.testing.snapshot import differences, snapshot
from tokenprune.testing.tiny import Tiny, decoder_of

__all__ = ["check_adapter"]

SAMPLED = 6
"""Patches of each modality whose way into the prompt is followed one by one."""


def check_adapter(
    model: PreTrainedModel, inputs: Mapping[str, Any], adapter: type[Adapter] | None = None
) -> Outcomes:
    """Hold an adapter to a tiny random model of its family, with a prompt of its processor.

    Layouts are consistent: positions increase, each names a placeholder of its modality, and
    items, canvases, frames, rows and columns fit together. Where the adapter names a tower, its
    output is disturbed: the tokens that change must be those in the layout, and none that it takes
    for separators; a single patch must reach those tokens that `align` says; maps that are
    constant stay so, and channels are aligned each by itself. With everything kept the answer is
    bit-identical, and pruned at the input, at a layer and at the cache it is that of the unpruned
    model with the same tokens masked.

    Args:
        model: Small, in evaluation mode and in float32, on the CPU.
        inputs: A prompt, or a batch padded on the left, as `model.generate` takes it. Several
            images, clips or sounds of different sizes show more than one.
        adapter: The class to check; None for the one that is registered for the model's type.

    Returns:
        The outcomes, which print as a table.

    Raises:
        AssertionError: A check failed.
    """
    kind = str(model.config.model_type)
    with _serving(kind, adapter):
        with failing(getattr(adapter, "__name__", "adapter"), kind, "adapter"):
            found = adapter_for(model)
            what = type(found).__name__
            case = _Case(found, inputs)
        outcomes = Outcomes(what)
        checks: dict[str, Callable[[], str | None]] = {
            "layout": case.check_layout,
            "separators": case.check_separators,
            "align": case.check_align,
            "everything kept": case.check_everything,
            "oracle, input": lambda: case.check_oracle("random(keep=0.5)"),
            "oracle, layer": lambda: case.check_oracle(f"random(keep=0.5 at={case.layer})"),
            "oracle, cache": lambda: case.check_oracle("random(keep=0.5 at=cache)"),
            "model as before": case.check_traces,
        }
        for check, function in checks.items():
            outcomes.run(kind, check, function)
    return outcomes


@contextmanager
def _serving(kind: str, adapter: type[Adapter] | None) -> Iterator[None]:
    """Let a class, and no other, serve a model type inside the `with` block."""
    if adapter is None:
        yield
        return
    with suppress(TokenPruneError):  # so that whoever else claims it has done so by now
        ADAPTERS.find(kind)
    before = ADAPTERS.claims.get(kind)
    ADAPTERS.claims[kind] = (adapter,)
    try:
        yield
    finally:
        if before is None:
            del ADAPTERS.claims[kind]
        else:
            ADAPTERS.claims[kind] = before


@dataclass(frozen=True, eq=False)
class _Marks(EncoderSignal):
    """Maps whose way is known: a constant, a ramp, and a channel for each of some patches.

    Args:
        patches: Patches, counted over all views that the encoder calls read.
        seen: How many patches there were so far.
    """

    patches: tuple[int, ...] = ()
    seen: list[int] = field(default_factory=list)

    def of(self, view: EncoderView) -> Tensor:
        count = view.views * view.tokens
        number = torch.arange(count) + sum(self.seen)
        self.seen.append(count)
        ramp = torch.arange(view.tokens).repeat(view.views)
        marks = [
            torch.ones(count),
            ramp.float(),
            *((number == one).float() for one in self.patches),
        ]
        return torch.stack(marks, dim=-1).view(view.views, view.tokens, -1)  # [W, Nv, C]


@dataclass(frozen=True, eq=False)
class _Watch(Stage):
    """Keeps everything, and notes layouts and maps of each sample.

    Args:
        needs: The signals to read.
        seen: What was there.
    """

    needs: tuple[EncoderSignal, ...] = ()
    seen: list[tuple[TokenLayout, list[Tensor]]] = field(default_factory=list)

    name = "watch"
    site = Input()

    def select(self, context: Context) -> Selection:
        self.seen.append((context.layout, [context[one].cpu() for one in self.needs]))
        return Selection(torch.arange(len(context)))


class _Case:
    """A model, its prompt, and what was seen of them.

    Args:
        adapter: Of the model.
        inputs: The prompt.
    """

    def __init__(self, adapter: Adapter, inputs: Mapping[str, Any]) -> None:
        self.adapter, self.model = adapter, adapter.model
        self.inputs = dict(inputs)
        self.inputs.setdefault("attention_mask", torch.ones_like(self.inputs["input_ids"]))
        suppress = sorted(set(adapter.token_ids().values()))
        self.one = Tiny(str(adapter.config.model_type), self.model, suppress, lambda *_: {})
        self.layer = adapter.shape.layers // 2
        self.embeddings()  # in its first forward transformers puts hooks into a model, for good
        self.before = snapshot(self.model)
        with positions_logged(decoder_of(self.model)) as log:
            output = generate(self.one, self.inputs)
        self.plain = Run(self.one, "none", self.inputs, output, [], log.whole())
        self.towers = {name: adapter.tower(name) for name in adapter.modalities}

    def embeddings(self) -> Tensor:
        """What enters the first decoder layer, `[B, S, D]`."""
        seen: list[Tensor] = []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        layers: Any = self.adapter.language_model.layers
        handle = layers[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model(**self.inputs)
        finally:
            handle.remove()
        return seen[0]

    def watch(self, *needs: EncoderSignal) -> list[tuple[TokenLayout, list[Tensor]]]:
        """Layouts and aligned maps of each sample, as stages get them."""
        stage = _Watch(needs)
        with prune(self.model, stage), torch.no_grad():
            self.model(**self.inputs)
        hold(bool(stage.seen), "the engine saw no media: encoders() must name what encodes them")
        return stage.seen

    def run(self, recipe: str) -> Run:
        with prune(self.model, recipe) as report:
            output = generate(self.one, self.inputs)
        plain = self.plain
        return Run(self.one, recipe, self.inputs, output, report.calls, plain.positions)

    # -- checks; each says why it is left out

    def check_layout(self) -> None:
        ids = self.inputs["input_ids"].cpu()
        holds = self.adapter.placeholders(ids, self.inputs.get("mm_token_type_ids"))
        for sample, (layout, _) in enumerate(self.watch()):
            for modality, code in MODALITIES.items():
                mine = layout.position[layout.modality == code]
                known = holds.get(modality, torch.zeros_like(ids, dtype=torch.bool))
                hold(bool(known[sample, mine].all()), f"a token of {modality} is no placeholder")
            check_layout(layout)

    def check_separators(self) -> str | None:
        towers = [one for one in self.towers.values() if one is not None]
        if not towers:
            return "the adapter names no tower"
        first = self.embeddings()
        with ExitStack() as stack:
            for tower in {id(one.block): one for one in towers}.values():
                stack.enter_context(_disturbed(tower))
            changed = (self.embeddings() != first).any(dim=-1)
        codes = torch.tensor([MODALITIES[name] for name, one in self.towers.items() if one])
        for sample, (layout, _) in enumerate(self.watch()):
            expected = torch.zeros_like(changed[sample])
            expected[layout.position[torch.isin(layout.modality, codes)]] = True
            lost = (changed[sample] & ~expected).nonzero()[:, 0].tolist()
            idle = (expected & ~changed[sample]).nonzero()[:, 0].tolist()
            hold(not lost, f"tokens at {some(lost)} show patches and have no row in the layout")
            hold(not idle, f"tokens at {some(idle)} have rows in the layout and show no patch")
        return None

    def check_align(self) -> str | None:
        named = {name: tower for name, tower in self.towers.items() if tower is not None}
        if not named:
            return "the adapter names no tower"
        counting = _Marks()
        rows = self.watch(counting)
        codes = torch.tensor([MODALITIES[name] for name in named])
        for layout, [maps] in rows:
            mine = maps[torch.isin(layout.modality, codes)]
            constant = bool(torch.allclose(mine[:, 0], torch.ones(len(mine)), atol=1e-5))
            hold(constant, "a map of ones is not one at every token")
        patches = _sample(sum(counting.seen))
        marks = _Marks(patches)
        marked = self.watch(marks)
        for (_, [few]), (_, [many]) in zip(rows, marked, strict=True):
            alike = torch.allclose(few, many[:, :2], atol=1e-5, equal_nan=True)
            hold(alike, "channels of a map are not aligned each by itself")
        first = self.embeddings()
        for channel, patch in enumerate(patches):
            with ExitStack() as stack:
                passed = [0]
                for tower in {id(one.block): one for one in named.values()}.values():
                    stack.enter_context(_disturbed(tower, patch, passed))
                changed = (self.embeddings() != first).any(dim=-1)
            if passed[0] != sum(marks.seen):
                return "the tower's attention pads its views, so single patches are not followed"
            for sample, (layout, [maps]) in enumerate(marked):
                reached = changed[sample].nonzero()[:, 0].tolist()
                told = layout.position[maps[:, channel + 2].nan_to_num() != 0].tolist()
                hold(
                    reached == told,
                    f"patch {patch} reaches the tokens at {some(reached)}, but align gives it to "
                    f"those at {some(told)}",
                )
        return None

    def check_everything(self) -> None:
        for recipe in ("none", "random(keep=1.0) + random(keep=1.0 at=cache)"):
            hold(same(self.run(recipe).output, self.plain.output), f"{recipe} changes the answer")

    def check_oracle(self, recipe: str) -> None:
        assert_matches_oracle(self.run(recipe))

    def check_traces(self) -> None:
        left = differences(self.before, snapshot(self.model))
        hold(not left, f"the model has changed: {some(left)}")


@contextmanager
def _disturbed(
    tower: Tower, patch: int | None = None, passed: list[int] | None = None
) -> Iterator[None]:
    """Add to what a tower's block puts out.

    Args:
        tower: Its leading tokens are left alone.
        patch: The only patch that is changed, counted over all calls; None for all.
        passed: Its one entry counts the patches of all calls.
    """
    count = [0] if passed is None else passed

    def add(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        batched = hidden if hidden.ndim == 3 else hidden[None]
        shape = batched[:, tower.prefix_tokens :].shape
        number = torch.arange(shape[0] * shape[1]).view(shape[:2]) + count[0]
        count[0] += shape[0] * shape[1]
        chosen = torch.ones_like(number, dtype=torch.bool) if patch is None else number == patch
        changed = batched.clone()
        # Not the same for all channels: a norm would take it out again.
        noise = torch.linspace(-1, 2, shape[-1]).to(changed)
        changed[:, tower.prefix_tokens :] += chosen[..., None].to(changed) * noise
        changed = changed.view_as(hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    # Before the hooks in which transformers notes what blocks put out.
    handle = tower.block.register_forward_hook(add, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _sample(total: int) -> tuple[int, ...]:
    """Some of so many patches, the first and the last among them."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randperm(total, generator=generator)[:SAMPLED].tolist()
    return tuple(sorted({0, total - 1, *inner}))
