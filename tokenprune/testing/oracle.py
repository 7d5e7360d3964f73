"""The dense oracle: what a pruned model must compute, written as plainly as possible.

It is the unpatched model, run over the whole sequence at once and without a cache. A token that
was pruned is masked: each decoder layer gets an explicit 4-D mask, `[B, heads, S, S]`, that hides
it from the layer on at which it went (or in one layer and head only, for a cache entry). Merged
embeddings are written into the hidden states of the layer where the merge took place.

Nothing here is imported from the engine, and nothing is asked of it but the decisions it wrote
down (see `tokenprune.report.report`): a decision that was recorded but not carried out, or carried
out differently, shows as a difference of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.testing.tiny import decoder_of

__all__ = [
    "TOLERANCE",
    "PositionLog",
    "Replay",
    "assert_close",
    "dense_logits",
    "dense_run",
    "extend",
    "positions_logged",
    "read_decisions",
]

TOLERANCE = 1e-5
"""Of a logit, relative to the largest one (or to 1)."""


@dataclass
class Replay:
    """Decisions, translated to what is masked where in a sequence of `S` tokens.

    Attributes:
        gone: By layer: `[B, S]`, tokens that no query sees in this layer or in a later one.
        dropped: (layer, first query, `[B, H, S]`): cache entries that queries from there on do
            not see, in this layer and key-value head only.
        merges: By layer: (sample, source, target, weight) at its input, in order.
        absorbed: (layer, first query, sample, merge): cache entries that others absorbed, in order,
            as queries from there on see them. Masks cannot tell of these: see `cache_oracle`.
        steps: Each decision, with the positions it could choose from: `[N]`, or `[H, N]`.
    """

    gone: dict[int, Tensor] = field(default_factory=dict)
    dropped: list[tuple[int, int, Tensor]] = field(default_factory=list)
    merges: dict[int, list[tuple[int, Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    absorbed: list[tuple[int, int, int, Any]] = field(default_factory=list)
    steps: list[tuple[Any, Tensor]] = field(default_factory=list)

    def gone_at(self, layer: int, sample: int, length: int) -> Tensor:
        """`[S]`: tokens that are no longer there in a layer."""
        out = torch.zeros(length, dtype=torch.bool)
        for at, mask in self.gone.items():
            if at <= layer:
                out |= mask[sample]
        return out


def read_decisions(
    calls: Iterable[Any],
    samples: int,
    length: int,
    kv_heads: int,
    modalities: Mapping[int, frozenset[int]] | None = None,
) -> Replay:
    """Translate recorded calls.

    Args:
        calls: `report.calls` of the generations whose tokens make up the sequence.
        samples: Rows of the batch.
        length: `S`.
        kv_heads: `H`.
        modalities: By step of the recipe: codes of the modalities it acts on, if not all.
    """
    replay = Replay()
    everything = torch.zeros(samples, length, dtype=torch.int64)  # 0 text, else the modality
    # Entries that the cache of a layer has lost, by head, of whatever prompt.
    lost: dict[tuple[int, int], Tensor] = {}
    for call in calls:
        media = torch.zeros(samples, length, dtype=torch.int64)
        group = torch.full((samples, length), -1)
        for sample, layout in enumerate(call.layouts):
            media[sample, layout.position] = layout.modality
            everything[sample, layout.position] = layout.modality
            if getattr(call, "groups", None) is not None:
                group[sample, layout.position] = call.groups[sample]
        for decision in call.decisions:
            sample, layer = decision.sample, decision.layer
            codes = (modalities or {}).get(getattr(decision, "step", 0), frozenset({1, 2, 3}))
            pool = everything if getattr(decision, "of_sequence", False) else media
            allowed = torch.isin(pool[sample], torch.tensor(sorted(codes)))
            if getattr(decision, "group", None) is not None:
                allowed &= group[sample] == decision.group
            there = (pool[sample] > 0) & ~replay.gone_at(layer, sample, length)
            at_cache = decision.kept.ndim == 2
            if at_cache:
                gone = torch.zeros(kv_heads, length, dtype=torch.bool)
                there = there & ~lost.get((layer, sample), gone)
            candidates = there & allowed
            counts = candidates.sum(-1)
            assert (counts == decision.candidates).all(), f"{decision}: had {counts} candidates"
            steps = candidates.nonzero()[:, -1].view(*candidates.shape[:-1], -1)
            replay.steps.append((decision, steps))
            dropped = candidates & ~_kept(decision, candidates)
            if at_cache:
                lost[layer, sample] = lost.get((layer, sample), gone) | dropped
                mask = torch.zeros(samples, kv_heads, length, dtype=torch.bool)
                mask[sample] = dropped
                when = getattr(decision, "length", None)
                replay.dropped.append((layer, call.length if when is None else when, mask))
            else:
                mask = replay.gone.setdefault(layer, torch.zeros(samples, length, dtype=torch.bool))
                mask[sample] |= dropped
            merge = decision.merge
            if merge is not None and at_cache:
                assert merge.source.shape == merge.target.shape == merge.weight.shape
                assert candidates.gather(1, merge.source).all(), "a merge takes what is gone"
                real = merge.weight != 0
                if merge.value_weight is not None:
                    real |= merge.value_weight != 0
                to_none = real & dropped.gather(1, merge.target)
                assert not to_none.any(), "a merge gives to an entry that is dropped"
                when = getattr(decision, "length", None)
                since = call.length if when is None else when
                replay.absorbed.append((layer, since, sample, merge))
            elif merge is not None:
                assert candidates[merge.source].all(), "a merge takes from a token that is gone"
                assert not dropped[merge.target].any(), "a merge gives to a token that is dropped"
                part = (sample, merge.source, merge.target, merge.weight)
                replay.merges.setdefault(layer, []).append(part)
    return replay


def _kept(decision: Any, candidates: Tensor) -> Tensor:
    """The kept tokens as a mask like `candidates`, `[S]` or `[H, S]`."""
    kept = decision.kept.long().cpu()
    assert candidates.gather(-1, kept).all(), f"{decision}: kept what was no candidate"
    assert (kept.diff(dim=-1) > 0).all(), f"{decision}: kept positions do not increase"
    return torch.zeros_like(candidates).scatter(-1, kept, True)


@dataclass
class PositionLog:
    """The position ids of the forwards of an unpruned run, `[B, S]` or `[3, B, S]`."""

    seen: list[Tensor | None] = field(default_factory=list)

    def whole(self) -> Tensor | None:
        """Those of a run with a cache, joined; None if the model was not given any."""
        known = [one for one in self.seen if one is not None]
        if not known:
            return None
        assert len(known) == len(self.seen)
        return torch.cat(known, dim=-1)

    def last(self) -> Tensor | None:
        """Those of the last forward: the whole sequence in a run without a cache."""
        return self.seen[-1]


@contextmanager
def positions_logged(language_model: nn.Module) -> Iterator[PositionLog]:
    """Write down the positions that transformers itself gives to the language model.

    In the families with M-RoPE the positions of decoding are not those of one long forward
    (rope_deltas and the text after a long video disagree), so the oracle is told which were used.
    """
    log = PositionLog()

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        position = kwargs.get("position_ids")
        if position is not None and position.ndim == 3:
            position = position[-3:].expand(3, -1, -1)  # four rows: the first is for the mask
        log.seen.append(None if position is None else position.clone())

    handle = language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield log
    finally:
        handle.remove()


@torch.no_grad()
def dense_logits(
    model: Any,
    inputs: Mapping[str, Any],
    sequence: Tensor,
    replay: Replay,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits `[B, S, V]` of the whole sequence, with what was pruned masked.

    Args:
        model: The unpatched model.
        inputs: What the prompt was made of (media included).
        sequence: `[B, S]`: the prompt and what follows it.
        replay: What to mask and to merge.
        positions: Of the sequence; None: those that the model makes.
    """
    logits: Tensor = dense_run(model, inputs, sequence, replay, positions).logits
    return logits


def dense_run(
    model: Any,
    inputs: Mapping[str, Any],
    sequence: Tensor,
    replay: Replay,
    positions: Tensor | None = None,
    **settings: Any,
) -> Any:
    """What the model returns for the whole sequence, as in `dense_logits`.

    Args:
        settings: Of the model's forward, such as `output_attentions`.
    """
    assert not replay.absorbed, "masks cannot replay merges in caches"
    language_model = decoder_of(model)
    with ExitStack() as hooks:

        def hook(module: nn.Module, function: Callable[..., Any]) -> None:
            handle = module.register_forward_pre_hook(function, with_kwargs=True)
            hooks.callback(handle.remove)

        hook(language_model, lambda m, args, kwargs: (args, _enter(kwargs, replay, positions)))
        for layer, module in enumerate(language_model.layers):
            hook(module, _layer_hook(language_model.config, layer, replay))
        return model(**extend(inputs, sequence), use_cache=False, **settings)


def extend(inputs: Mapping[str, Any], sequence: Tensor) -> dict[str, Any]:
    """Model inputs for the prompt and the tokens that follow it."""
    out = dict(inputs)
    extra = sequence.shape[1] - inputs["input_ids"].shape[1]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    out["input_ids"] = sequence
    out["attention_mask"] = nn.functional.pad(mask, (0, extra), value=1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            out[name] = nn.functional.pad(inputs[name], (0, extra), value=0)
    return out


def _enter(kwargs: dict[str, Any], replay: Replay, positions: Tensor | None) -> dict[str, Any]:
    """What the language model is called with."""
    kwargs = dict(kwargs)
    if positions is not None:
        kwargs["position_ids"] = positions
    features = kwargs.get("deepstack_visual_embeds")
    if features is not None and replay.merges:
        # Features that are added after the first layers: merged as the hidden states were by then.
        where = kwargs["visual_pos_masks"]
        merged = []
        for number, one in enumerate(features):
            spread = one.new_zeros(*where.shape, one.shape[-1])
            spread[where] = one
            for layer in sorted(replay.merges):
                if layer <= number:
                    spread = _merge(spread, replay.merges[layer])
            merged.append(spread.flatten(0, 1))
        # Tokens without features (of sound) may have absorbed some.
        kwargs["visual_pos_masks"] = torch.ones_like(where)
        kwargs["deepstack_visual_embeds"] = merged
    return kwargs


def _merge(hidden: Tensor, merges: list[tuple[int, Tensor, Tensor, Tensor]]) -> Tensor:
    """Write weighted sums of old rows of `[B, S, D]` into the targets."""
    for sample, source, target, weight in merges:
        old = hidden[sample]
        new = old.clone()
        for one in sorted(set(target.tolist())):
            mine = target == one
            new[one] = (old[source[mine]] * weight[mine, None].to(old)).sum(0)
        hidden = hidden.clone()
        hidden[sample] = new
    return hidden


def _layer_hook(config: Any, layer: int, replay: Replay) -> Callable[..., Any]:
    def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden = _merge(hidden, replay.merges.get(layer, []))
        visible = _visible(config, hidden, kwargs.get("attention_mask"), layer, replay)
        kwargs["attention_mask"] = visible
        if config._attn_implementation == "eager":
            floor = torch.finfo(hidden.dtype).min
            kwargs["attention_mask"] = torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(
                ~visible, floor
            )
        return (hidden, *args[1:]), kwargs

    return prepare


def _visible(
    config: Any, hidden: Tensor, given: Tensor | None, layer: int, replay: Replay
) -> Tensor:
    """`[B, heads, S, S]`: which key each query sees in this layer."""
    samples, length = hidden.shape[:2]
    heads = config.num_attention_heads
    if given is None:  # SDPA is told "causal" by no mask at all
        given = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    elif given.is_floating_point():
        given = given == 0
    visible = given.expand(samples, heads, length, length).clone()
    for at, gone in replay.gone.items():
        if at <= layer:
            visible &= ~gone[:, None, None, :]
    for at, start, dropped in replay.dropped:
        if at == layer:
            queries = torch.arange(length) >= start
            per_head = dropped.repeat_interleave(heads // dropped.shape[1], dim=1)
            visible &= ~(per_head[:, :, None, :] & queries[None, None, :, None])
    # A row without any key would be nan. Nobody sees such a token (it is pruned, or padding).
    nothing = ~visible.any(-1, keepdim=True)
    return visible | (nothing & torch.eye(length, dtype=torch.bool))


def assert_close(got: Tensor, expected: Tensor, what: str = "logits") -> None:
    """Compare logits in float32, as the contract words it."""
    assert got.shape == expected.shape, (what, got.shape, expected.shape)
    scale = max(1.0, float(expected.abs().max()))
    difference = float((got - expected).abs().max())
    assert difference <= TOLERANCE * scale, f"{what} differ by {difference:.2e} of {scale:.1f}"
