"""`prune`: makes an unmodified model follow a recipe.

Outside the decoder layers everything stays logical: `generate`, positions, rope deltas, 2-D masks
and the cache's length see the unpruned sequence. Inside, hidden states and stored keys are short.
One index tensor per place is the bridge, and masks are functions evaluated at those indices.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)
from transformers.modeling_utils import AttentionInterface

from tokenprune.adapters.base import MediaCall, Tower, adapter_for
from tokenprune.core.indices import take
from tokenprune.core.layout import Modality
from tokenprune.core.recipe import Recipe
from tokenprune.core.selection import Merge
from tokenprune.core.site import Cache, Input, Layer
from tokenprune.core.stage import EncoderStage, Method, Stage
from tokenprune.engine.beams import refuse_torn
from tokenprune.engine.cache import (
    CACHE_NAME,
    CACHE_NAMES,
    Clock,
    adopt,
    cache_among,
    cache_bytes,
    check_cache,
    full_cache_bytes,
    new_cache,
)
from tokenprune.engine.encoders import AttentionTap, StreamedView, split_views
from tokenprune.engine.masks import (
    LazyMask,
    attention_row,
    base_attention,
    last_query_mask,
    mask_for_kernel,
)
from tokenprune.engine.prefill import Flight, Prefill, Sample
from tokenprune.errors import MediaError, RecipeError, UnsupportedModelError
from tokenprune.report.report import Report
from tokenprune.report.timing import Mark

__all__ = ["Patch", "prune"]

_PATCHED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
_ENTERING = threading.Lock()


@contextmanager
def prune(
    model: PreTrainedModel,
    *methods: Method | Recipe | str,
    positions: Literal["original", "compact"] = "original",
    frame_seconds: Sequence[Sequence[float] | Tensor] | None = None,
) -> Iterator[Report]:
    """Make `model` follow a recipe inside the `with` block; afterwards it is as before.

    ```python
    with prune(model, VFlowOpt(keep=0.1)) as report:
        output = model.generate(**inputs, max_new_tokens=64)
    print(report)
    ```

    Args:
        model: A model of a supported family (`tokenprune list`).
        methods: Methods, recipes, or recipes as text, applied in this order.
        positions: "original" leaves every token its position in the unpruned sequence. "compact"
            numbers what is left of the input anew, for models with one-dimensional positions.
        frame_seconds: When the frames of the prompt's clips are shown: for each clip (for each
            image, if the model takes frames as images) the times of the pictures that its
            processor was given. Layouts have them where the model is told no times as numbers,
            as with Qwen3-VL, GLM-4V and VideoLLaMA 3, to which they are words of the prompt;
            without them the seconds of such tokens are nan. They are those of every prompt with
            clips inside the block.

    Yields:
        The report, which fills as the model runs.

    Raises:
        UnsupportedModelError: The model, or its cache, cannot be pruned.
        RecipeError: The recipe does not fit the model.
        MediaError: `frame_seconds` holds no times, or does not fit the prompt.
    """
    patch = Patch(model, Recipe(*methods), positions)
    patch.frame_seconds = None if frame_seconds is None else _times(frame_seconds)
    with patch:
        yield patch.report


class Patch:
    """The hooks of one `prune` and what they share.

    Attributes:
        frame_seconds: For each clip `[F]` float64, as `prune` takes them; None if not known.
    """

    frame_seconds: list[Tensor] | None = None

    def __init__(self, model: PreTrainedModel, recipe: Recipe, positions: str) -> None:
        if positions not in ("original", "compact"):
            raise RecipeError(f"positions must be 'original' or 'compact', got {positions!r}")
        self.adapter = adapter_for(model)
        self.shape = self.adapter.shape
        self.stages = recipe.stages(self.shape)
        self.model = model
        self.report = Report(recipe=str(recipe))
        self._check(positions)
        self._compact = positions == "compact"
        self._lm: Any = self.adapter.language_model
        self._signature = inspect.signature(self._lm.forward)
        self._by_site = _Sites(self.stages)
        self._media: list[MediaCall] = []
        self._lost: list[MediaCall] = []
        self._used: set[Modality] = set()
        self._encoding: MediaCall | None = None
        self._pixels: tuple[MediaCall, list[Tensor]] | None = None
        self._prompt: dict[str, Any] = {}
        self._reset()

    def _check(self, positions: str) -> None:
        has = set(self.adapter.modalities)
        kind = self.adapter.config.model_type
        for stage in self.stages:
            wanted = has & stage.modalities
            if not wanted:
                raise UnsupportedModelError(
                    f"{stage.name} prunes {_join(stage.modalities)} tokens, but {kind} "
                    f"has only {_join(has)} tokens"
                )
            if isinstance(stage, EncoderStage) and not any(map(self.adapter.tower, wanted)):
                raise UnsupportedModelError(
                    f"{stage.name} reads the encoder's attention, which {kind} does not offer for "
                    f"{_join(wanted)}"
                )
        text = self.adapter.config.get_text_config(decoder=True)
        if positions == "compact" and "mrope_section" in (
            getattr(text, "rope_parameters", None) or {}
        ):
            raise RecipeError(
                f"positions='compact' needs one-dimensional positions, but {kind} counts time, "
                "row and column; use positions='original'"
            )

    # -- install and remove

    def __enter__(self) -> Patch:
        with ExitStack() as stack:
            with _ENTERING:  # two threads may ask for one model
                if self.model in _PATCHED:
                    raise UnsupportedModelError(
                        "this model is already inside a `with prune(...)`, or in use by a session; "
                        "put all methods into one recipe, prune(model, first, second), and let "
                        "threads take turns"
                    )
                _PATCHED.add(self.model)
            stack.callback(_PATCHED.discard, self.model)
            self._install(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._reset()
        self._media.clear()
        self._lost.clear()

    def _install(self, stack: ExitStack) -> None:
        config: Any = self._lm.config
        self._base = str(config._attn_implementation)
        # A flash name would send transformers down paths that do not ask for a mask function.
        _switch_attention(stack, config, f"tokenprune_{id(self):x}", self._attention, self._mask)
        if self._by_site.encoder:
            self._install_towers(stack)
        for name, modality in self.adapter.encoders().items():
            _shadow(stack, self.adapter.base_model, name, self._watch_encoder(modality))
        if hasattr(self.model, "prepare_inputs_for_generation"):
            _shadow(stack, self.model, "prepare_inputs_for_generation", self._refuse_early)
            repeat = functools.partial(refuse_torn, self.adapter)
            _shadow(stack, self.model, "_expand_inputs_for_generation", repeat)
        before, after = "register_forward_pre_hook", "register_forward_hook"
        _hook(stack, self.adapter.base_model, before, self._on_prompt, with_kwargs=True)
        _hook(stack, self._lm, before, self._before_lm, with_kwargs=True)
        _hook(stack, self._lm, after, self._after_lm, always_call=True)
        for number, layer in enumerate(self._lm.layers):
            enter = functools.partial(self._before_layer, number)
            _hook(stack, layer, before, enter, with_kwargs=True)
            _hook(stack, layer, after, functools.partial(self._after_layer, number))

    def _install_towers(self, stack: ExitStack) -> None:
        inside: dict[nn.Module, Tower] = {}
        for modality in self.adapter.modalities:
            tower = self.adapter.tower(modality)
            if tower is not None:
                inside |= dict.fromkeys(tower.block.modules(), tower)
        for tower in set(inside.values()):
            if not any(hasattr(module, "config") for module in tower.block.modules()):
                self._tap(stack, tower)
        configs: dict[int, Any] = {  # several towers may share one
            id(module.config): module.config
            for module in inside
            if hasattr(getattr(module, "config", None), "_attn_implementation")
        }
        for config in configs.values():
            base = str(config._attn_implementation)

            def attend(
                module: nn.Module,
                query: Tensor,
                key: Tensor,
                *args: Any,
                _base: str = base,
                **kw: Any,
            ) -> Any:
                if module in inside:
                    self._read_tower(inside[module], query, key, kw)
                return base_attention(_base, module)(module, query, key, *args, **kw)

            # The base's name stays part of the new one: towers look for "flash" in it.
            name = f"tokenprune_{id(config):x}_{base}"
            mask = ALL_MASK_ATTENTION_FUNCTIONS.get(base)
            _switch_attention(stack, config, name, attend, mask)

    def _tap(self, stack: ExitStack, tower: Tower) -> None:
        """Read a block that is not of transformers, but calls torch's attention."""
        open_taps: list[tuple[ExitStack, AttentionTap]] = []

        def show(query: Tensor, key: Tensor, scaling: float | None) -> None:
            self._read_tower(tower, query, key, {"scaling": scaling})

        def enter(*_: Any) -> None:
            opened, tap = ExitStack(), AttentionTap(show)
            opened.enter_context(tap)
            open_taps.append((opened, tap))

        def leave(*_: Any) -> None:
            opened, tap = open_taps.pop()
            opened.close()
            if not tap.calls:
                raise UnsupportedModelError(
                    f"{type(tower.block).__name__} computes its attention by hand, so it cannot be "
                    "read; let it use torch's (timm: TIMM_FUSED_ATTN=1), or a method without maps"
                )

        _hook(stack, tower.block, "register_forward_pre_hook", enter)
        _hook(stack, tower.block, "register_forward_hook", leave, always_call=True)

    def _refuse_early(self, prepare: Any) -> Any:
        """`generate` makes masks for caches of fixed size before it calls the model."""

        @functools.wraps(prepare)
        def checked(*args: Any, **kwargs: Any) -> Any:
            cache = cache_among(kwargs)
            if cache is not None:
                check_cache(cache)
            return prepare(*args, **kwargs)

        return checked

    # -- encoders

    def _watch_encoder(self, modality: Modality) -> Callable[[Any], Any]:
        def decorate(encode: Any) -> Any:
            signature = inspect.signature(encode)

            @functools.wraps(encode)  # generate looks at the signature
            def watched(*args: Any, **kwargs: Any) -> Any:
                if self._encoding is not None:  # a video call that nests the image call
                    return encode(*args, **kwargs)
                bound = signature.bind(*args, **kwargs).arguments
                arguments = {**bound, **bound.pop("kwargs", {})}
                arguments.pop("inputs_embeds", None)  # large, and not of the media
                kind = self.adapter.modality(modality, arguments, self._prompt)
                call = MediaCall(kind, arguments)
                started = Mark(self._lm)
                self._encoding = call
                try:
                    result = encode(*args, **kwargs)
                finally:
                    self._encoding = self._pixels = None
                if kind in self._used:  # a new prompt; others may have been encoded ahead
                    self._media = [old for old in self._media if old.modality != kind]
                    self._used.discard(kind)
                self._media.append(call)
                self.report.encoding(started, Mark(self._lm))
                return result

            return watched

        return decorate

    def _read_tower(self, tower: Tower, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
        call = self._encoding
        if call is None:
            return
        lengths = self.adapter.view_lengths(call)
        if lengths is None and (boundaries := kwargs.get("cu_seq_lens_q")) is not None:
            lengths = boundaries.diff().tolist()
        padding = self.adapter.padding(call)
        for one_query, one_key in split_views(query, key, lengths):
            scaling, prefix = kwargs.get("scaling"), tower.prefix_tokens
            view = StreamedView(one_query, one_key, scaling, prefix, padding)
            for stage in self._by_site.encoder:
                if call.modality in stage.modalities:
                    maps = call.maps.setdefault(stage.name, [])
                    grey = functools.partial(self._grey, call, len(maps), view.views)
                    maps.extend(stage.importance(view, grey).unbind())

    def _grey(self, call: MediaCall, first: int, views: int) -> Tensor:
        if self._pixels is None or self._pixels[0] is not call:  # once a call, not once a view
            patches = self.adapter.grey(call)
            if patches is None:
                kind = self.adapter.config.model_type
                raise RecipeError(
                    f"{kind} does not give the pixels below its tokens; set the weight of the "
                    "entropy to 0"
                )
            self._pixels = call, patches
        return torch.stack(self._pixels[1][first : first + views])

    # -- the language model: logical view in

    def _reset(self) -> None:
        """Forget the forward in progress."""
        self._flight: Flight | None = None
        self._prefill: Prefill | None = None
        self._cache: Any = None
        self._clock: Clock | None = None
        self._deepstack: tuple[list[Tensor], Tensor] | None = None
        self._sliced: dict[int, Any] = {}

    def _on_prompt(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._prompt = {**kwargs, "input_ids": ids}
        # What was encoded ahead counts if the model is given it: older releases of transformers
        # lose it where `generate` prefills in chunks.
        self._lost = [] if kwargs.get("mm_encoder_outputs") else list(self._media)

    def _before_lm(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # (Binding is not for compilers.)
        named = self._signature.bind_partial(*args).arguments if args else {}
        kwargs = {**named, **kwargs}
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._lm.config, "use_cache", True)
        cache = cache_among(kwargs)
        if cache is None and use_cache:
            cache = new_cache(self._lm.config)
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        kwargs[CACHE_NAME] = cache
        self._reset()
        self._cache = cache
        cached = cache is not None
        self._clock = adopt(self._cache, self.shape.layers) if cached else Clock()
        hidden = kwargs.get("inputs_embeds")
        if hidden is None:
            hidden = self.adapter.embed(kwargs)
            kwargs["inputs_embeds"] = hidden
        batch, length = hidden.shape[:2]
        if not cached and (self.stages or self._compact) and kwargs.get("attention_mask") is None:
            # Without cache and mask transformers takes gaps in positions for packed sequences.
            kwargs["attention_mask"] = hidden.new_ones(batch, length, dtype=torch.int64)
        self._flight = Flight(batch, self._clock.end, length, hidden.device)
        self._clock.end += length
        self._set_rows()
        self._started = Mark(self._lm)
        self._start_prefill(kwargs, hidden)
        return (), kwargs

    def _start_prefill(self, kwargs: dict[str, Any], hidden: Tensor) -> None:
        flight = self._flight
        assert flight is not None and self._clock is not None
        if self._by_site.input or self._by_site.layer:
            self._take_deepstack(kwargs)
        if not self._brings_media(flight.length):
            self._renumber(kwargs, None)
            return
        real = _padding(kwargs.get("attention_mask"))
        if real is not None:
            real = real[:, flight.past : self._clock.end]
        media = [call for call in self._media if call not in self._lost]
        self._used = {call.modality for call in media}
        self._prefill = Prefill(
            self.adapter,
            self.shape,
            self._prompt["input_ids"].to(hidden.device),
            media,
            self._prompt,
            real,
            flight.past,
            self.frame_seconds,
        )
        self._prefill.call.length = self._clock.end
        before = [sample.alive for sample in self._prefill.samples]
        for stage in self._by_site.input:
            hidden = self._merge(hidden, self._prefill.prune(stage, hidden, flight), flight)
        kwargs["inputs_embeds"] = hidden
        self._pending = self._changed(before)
        self._renumber(kwargs, self._prefill.tokens() if self._pending else None)

    def _brings_media(self, length: int) -> bool:
        """Whether this forward of the language model holds media tokens."""
        ids = self._prompt.get("input_ids")
        if length == 1:
            return False
        if ids is None:
            raise UnsupportedModelError(
                "pruning needs input_ids to find media tokens, got inputs_embeds only; "
                "pass input_ids and pixels or sound"
            )
        present = torch.zeros((), dtype=torch.bool, device=ids.device)
        for token in self.adapter.token_ids().values():
            present = present | (ids == token).any()
        if not bool(present):
            return False
        if ids.shape[1] != length:
            raise UnsupportedModelError(
                f"the prompt has {ids.shape[1]} tokens, but the language model was given {length}: "
                "the model expands placeholders itself; use the processor that expands them"
            )
        return True

    def _changed(self, before: list[Tensor]) -> bool:
        assert self._prefill is not None
        pairs = zip(before, self._prefill.samples, strict=True)
        return any(len(old) != len(sample.alive) for old, sample in pairs)

    def _merge(self, hidden: Tensor, merges: list[tuple[Sample, Merge]], flight: Flight) -> Tensor:
        """New hidden states in which targets have absorbed their sources, DeepStack included."""
        if not merges:
            return hidden
        hidden = hidden.clone()
        features, row = self._deepstack or ([], None)
        features = [one.clone() for one in features]
        for sample, merge in merges:
            position = sample.layout.position - flight.past
            source, target = position[merge.source], position[merge.target]
            _absorb_(hidden[sample.number], source, target, merge.weight)
            for one in features:
                assert row is not None
                _absorb_(one, row[sample.number, source], row[sample.number, target], merge.weight)
        if row is not None:
            self._deepstack = features, row
        return hidden

    def _take_deepstack(self, kwargs: dict[str, Any]) -> None:
        """Take over the features that early layers add to media tokens: rows will move."""
        features = kwargs.pop("deepstack_visual_embeds", None)
        where = kwargs.pop("visual_pos_masks", None)
        if features is not None:
            row = where.flatten().cumsum(0).view_as(where) - 1
            self._deepstack = list(features), torch.where(where, row, -1)

    def _renumber(self, kwargs: dict[str, Any], tokens: list[Tensor] | None) -> None:
        """Compact positions: what is left counts without gaps."""
        if not self._compact:
            return
        flight, clock = self._flight, self._clock
        assert flight is not None and clock is not None
        batch, length = flight.rows.shape
        device = flight.rows.device
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = flight.rows
        if positions.ndim != 2:
            raise RecipeError(
                "positions='compact' needs one-dimensional positions; use positions='original'"
            )
        if clock.shift is None:
            clock.shift = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        positions = positions.to(device).expand(batch, length) - clock.shift
        if tokens is not None:
            gone = torch.ones(batch, length, dtype=torch.int64, device=device)
            for number, kept in enumerate(tokens):
                gone[number, kept] = 0
            real = _padding(kwargs.get("attention_mask"))
            if real is not None:  # padding never counted
                gone = gone * real[:, flight.past : flight.past + length].to(device)
            positions = positions - (gone.cumsum(1) - gone)
            clock.shift = clock.shift + gone.sum(1, keepdim=True)
        kwargs["position_ids"] = positions

    def _after_lm(self, module: nn.Module, args: Any, output: Any) -> None:
        if output is not None:  # None: the forward failed
            finished = Mark(self._lm)
            if self._prefill is not None:
                self._finish_prefill(finished)
            # Counting steps would compile each of them anew, and a graph knows no time.
            elif self._flight is not None and not torch.compiler.is_compiling():
                self.report.step(self._started, finished)
        if self._clock is not None:
            self._clock.stop()
        self._reset()

    def _finish_prefill(self, finished: Mark) -> None:
        assert self._prefill is not None
        call = self._prefill.call
        if self._cache is not None:
            call.media_entries = self._prefill.entries
            call.kv_bytes_before = full_cache_bytes(self._cache)
            call.kv_bytes_after = cache_bytes(self._cache)
        elif self._by_site.cache:
            call.warnings.append("use_cache=False: there is no cache to prune")
        self.report.prefill(call, self._started, finished)

    def _set_rows(self) -> None:
        assert self._flight is not None and self._clock is not None
        self._clock.rows, self._clock.holes = self._flight.rows, self._flight.holes
        self._sliced = {}

    # -- decoder layers: physical inside

    def _before_layer(
        self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        flight, prefill = self._flight, self._prefill
        if flight is None:
            return None
        if prefill is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            narrowed = self._run_layer_stages(number, hidden)
            prefill.enter_layer(number)
            if narrowed is not None:
                args, kwargs = _replace_hidden(args, kwargs, narrowed)
        if flight.source is None:
            return args, kwargs
        return self._slice(args, kwargs, flight.source, flight.length)

    def _run_layer_stages(self, number: int, hidden: Tensor) -> Tensor | None:
        """The hidden states of what is left, or None if nothing was dropped here."""
        flight, prefill = self._flight, self._prefill
        assert flight is not None and prefill is not None
        before = [sample.alive for sample in prefill.samples]
        for stage in self._by_site.layer.get(number, ()):
            prefill.prune(stage, hidden, flight)
        if not self._changed(before) and not (number == 0 and self._pending):
            return None
        gather = flight.narrow(prefill.tokens())
        self._set_rows()
        return take(hidden, gather, 1)

    def _slice(self, args: Any, kwargs: dict[str, Any], source: Tensor, length: int) -> Any:
        """Cut what the model's loop still passes at full length down to the rows in flight."""

        def cut(value: Any, dim: int) -> Any:
            if id(value) not in self._sliced:  # once a narrowing, not once a layer
                several = value if isinstance(value, tuple) else (value,)
                short = tuple(take(one, source, dim % one.ndim) for one in several)
                self._sliced[id(value)] = (value, short if several is value else short[0])
            return self._sliced[id(value)][1]

        kwargs = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = cut(kwargs["position_ids"], -1)
        if kwargs.get("position_embeddings") is not None:
            # [B, N, d]; older releases keep those of time, row and column apart: [3, B, N, d].
            kwargs["position_embeddings"] = cut(kwargs["position_embeddings"], -2)
        rest = tuple(
            cut(one, 1)
            if isinstance(one, Tensor) and one.ndim > 1 and one.shape[1] == length
            else one
            for one in args[1:]
        )
        return (*args[:1], *rest), kwargs

    def _after_layer(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        if self._deepstack is None or self._flight is None:
            return None
        features, row = self._deepstack
        if number >= len(features):
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        source = self._flight.source
        if source is not None:
            source = source.to(row.device)
            row = torch.where(source >= 0, row.gather(1, source.clamp_min(0)), -1)
        row = row.to(hidden.device)
        extra = features[number].to(hidden)[row.clamp_min(0)]
        hidden = hidden + torch.where((row >= 0)[..., None], extra, 0)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    # -- attention

    def _mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Any = causal_mask_function,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> LazyMask:
        # A window that holds all there is changes nothing, and plain causal masks are fastest.
        # Either flag says that there is more to the function (images that see ahead).
        plain = kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap")
        if local_size is not None and int(kv_length) < local_size and plain:
            mask_function = causal_mask_function
        return LazyMask(mask_function, attention_mask)

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        flight = self._flight
        if flight is None:  # the decoder layer was called on its own
            return base_attention(self._base, module)(
                module, query, key, value, attention_mask, **kwargs
            )
        layer = self._cache.layers[module.layer_idx] if self._cache is not None else None
        keys = flight.rows[:, None] if layer is None else layer.shown
        holes = flight.holes if layer is None else layer.holes
        name, mask = mask_for_kernel(attention_mask, self._base, query, flight.rows, keys, holes)
        self.report.kernel(self._base, name)
        # Positions with gaps look like packed sequences to flash kernels.
        kwargs.pop("position_ids", None)
        output = base_attention(name, module)(module, query, key, value, mask, **kwargs)
        if layer is not None:
            if self._prefill is not None:
                self._run_cache_stages(module.layer_idx, layer, query, attention_mask, kwargs)
            if layer.evict() and self._prefill is not None:
                self._prefill.leave_window(module.layer_idx, layer)
        return output

    def _run_cache_stages(
        self, number: int, layer: Any, query: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        flight, prefill = self._flight, self._prefill
        assert flight is not None and prefill is not None
        stages = self._by_site.cache_stages(number)
        if not stages:
            return
        if layer.window is not None:
            warning = "layers with a sliding window forget by themselves: their caches are kept"
            if warning not in prefill.call.warnings:
                prefill.call.warnings.append(warning)
            return
        row = None
        if any("attention_rows" in stage.needs for stage in stages):
            visible = last_query_mask(mask, flight.rows, layer.index)
            row = attention_row(
                query[:, :, -1:], layer.keys, kwargs.get("scaling"), visible, kwargs.get("softcap")
            )
        kept = prefill.prune_cache(stages, number, layer, flight, row)
        if kept is not None:
            layer.select(kept[0])
            layer.holes = kept[1]


class _Sites:
    """Stages by where they act."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        self.encoder = [stage for stage in stages if isinstance(stage, EncoderStage)]
        self.input = [stage for stage in stages if isinstance(stage.site, Input)]
        self.cache = [stage for stage in stages if isinstance(stage.site, Cache)]
        self.layer: dict[int, list[Stage]] = {}
        for stage in stages:
            if isinstance(stage.site, Layer):
                self.layer.setdefault(stage.site.index, []).append(stage)

    def cache_stages(self, layer: int) -> list[Stage]:
        return [
            stage
            for stage in self.cache
            if isinstance(stage.site, Cache)
            and (stage.site.layers is None or layer in stage.site.layers)
        ]


def _times(clips: Sequence[Sequence[float] | Tensor]) -> list[Tensor]:
    try:
        found = [torch.as_tensor(one, dtype=torch.float64).cpu() for one in clips]
    except (TypeError, ValueError, RuntimeError):
        found = [torch.zeros(0)]
    if any(one.ndim != 1 or not len(one) or not bool(one.isfinite().all()) for one in found):
        raise MediaError(
            "frame_seconds must hold a list of seconds for each clip, such as [[0.0, 0.5, 1.0]], "
            f"got {reprlib.repr(clips)}"
        )
    return found


def _absorb_(features: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> None:
    """Replace the rows `target` of `features [S, D]` by weighted sums of the rows `source`."""
    source, target, weight = (one.to(features.device) for one in (source, target, weight))
    rows, place = torch.unique(target, return_inverse=True)
    sums = torch.zeros(len(rows), features.shape[1], device=features.device)
    sums.index_add_(0, place, features[source].float() * weight[:, None].float())
    features.index_copy_(0, rows, sums.to(features.dtype))


def _padding(mask: Any) -> Tensor | None:
    """`[B, N]` bool, False at padding, from what a model is given as its attention mask."""
    if isinstance(mask, dict):
        mask = next((one for one in mask.values() if isinstance(one, LazyMask)), None)
    if isinstance(mask, LazyMask):
        return mask.padding
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return None if bool(mask.all()) else mask.bool()
    return None


def _replace_hidden(
    args: Any, kwargs: dict[str, Any], hidden: Tensor
) -> tuple[Any, dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _hook(stack: ExitStack, module: nn.Module, register: str, hook: Any, **how: bool) -> None:
    """Register a hook that goes with the stack, whatever fails after it."""
    stack.callback(getattr(module, register)(hook, **how).remove)


def _shadow(stack: ExitStack, module: nn.Module, path: str, decorate: Callable[[Any], Any]) -> None:
    """Put a decorated method on an instance, in front of its class's or of what others put there.

    Args:
        module: Where `path` begins.
        path: Name of the method, below submodules if it has dots.
    """
    below, _, name = path.rpartition(".")
    module = module.get_submodule(below)
    if name in vars(module):
        stack.callback(setattr, module, name, vars(module)[name])
    else:
        stack.callback(delattr, module, name)
    setattr(module, name, decorate(getattr(module, name)))


def _switch_attention(stack: ExitStack, config: Any, name: str, attend: Any, mask: Any) -> None:
    """Let modules with this config call `attend`, under a name of its own in both registries.

    A name that is missing in the registry of masks means no mask, without a word.
    """
    AttentionInterface.register(name, attend)
    stack.callback(AttentionInterface._global_mapping.pop, name)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
        stack.callback(AttentionMaskInterface._global_mapping.pop, name)
    # The public setter would also switch the configs below this one.
    stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation)
    config._attn_implementation_internal = name


def _join(names: Any) -> str:
    return " and ".join(sorted(names))
