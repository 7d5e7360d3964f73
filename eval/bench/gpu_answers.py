"""Time and memory of answers by large random models, pruned and not, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers.utils
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenprune.core.site import Cache
from tokenprune.engine.patch import prune
from tokenprune.eval.bench.gpu_models import Case, Models
from tokenprune.eval.bench.random_models import Model
from tokenprune.eval.bench.stopwatch import PeakMemory, Stopwatch
from tokenprune.report.report import Report
from tokenprune.report.timing import Mark

__all__ = ["Backends", "Group", "Line", "Run", "answer", "kernels", "recipes", "why"]

NONE = "none"
BASELINES = ("random", "uniform")
METHODS = ("plphp", "vflowopt")
"""What is timed beside baselines of its size: as much as there is time for on a lent machine."""

PAPERS = {("vflowopt", "llava-onevision-7b"): 'vflowopt(keep=0.1 strategy="llava-onevision-7b")'}
"""Settings that a paper has for one model; the defaults of methods are those for all others."""


def kernels() -> dict[str, str]:
    """Which attention implementations of transformers can be used here, and why others cannot."""
    found = {"sdpa": "available"}
    for number in (2, 3):
        available = getattr(transformers.utils, f"is_flash_attn_{number}_available", lambda: False)
        found[f"flash_attention_{number}"] = "available" if available() else "not installed"
    return found


def recipes(model: str, layers: int) -> list[str]:
    """No pruning, everything kept at all sites, and each method as its paper has it."""
    early = max(1, min(8, layers // 3))
    keep_all = f"random(keep=1.0) + random(keep=1.0 at={early}) + plphp(keep=1.0)"
    return [NONE, keep_all, *(PAPERS.get((name, model), name) for name in METHODS)]


# -- one answer


@dataclass(frozen=True)
class Run:
    """What one answer took.

    Attributes:
        first_token_seconds: From the prompt with its pixels to the first token.
        encode_seconds: Within, from the tower's beginning to the language model's.
        prefill_seconds: Within, the language model.
        per_token_seconds: The median of the further tokens.
        peak_bytes: Memory at its peak beyond weights and inputs.
        kv_bytes: Of the key-value cache after prefill, measured on its tensors.
    """

    first_token_seconds: float
    encode_seconds: float
    prefill_seconds: float
    per_token_seconds: float
    peak_bytes: int
    kv_bytes: int


def answer(
    model: Model, inputs: dict[str, Tensor], recipe: str, tokens: int
) -> tuple[Run, Report | None]:
    """Measure one answer of so many tokens, at least two; "none" leaves the model alone."""
    watch = Stopwatch()
    patched = nullcontext() if recipe == NONE else prune(model, recipe)
    peak = PeakMemory(model.device)
    with torch.inference_mode(), patched as report, _phases(model) as (marks, sizes):
        started = time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=watch
        )
    times = watch.times
    steps = [b - a for a, b in zip(times[1:], times[2:], strict=False)]
    run = Run(
        first_token_seconds=times[1] - started,
        encode_seconds=marks["prefill"].seconds_since(marks["encode"]),
        prefill_seconds=marks["end"].seconds_since(marks["prefill"]),
        per_token_seconds=statistics.median(steps),
        peak_bytes=peak.extra_bytes(),
        kv_bytes=sizes[0] if report is None else report.kv_bytes.after,
    )
    return run, report


@contextmanager
def _phases(model: Model) -> Iterator[tuple[dict[str, Mark], list[int]]]:
    """Within, note when the first forward came to the tower, to the language model, to its end.

    Yields:
        These moments, and the bytes of the cache at the end.
    """
    marks: dict[str, Mark] = {}
    sizes: list[int] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if name not in marks:
                marks[name] = Mark(module)

        return hook

    def measure(module: nn.Module, _: Any, output: Any) -> None:
        if not sizes:
            layers = output.past_key_values.layers
            sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    base: Any = model.model
    tower, decoder = getattr(base, "visual", None) or base.vision_tower, model.get_decoder()
    handles = [
        tower.register_forward_pre_hook(note("encode"), prepend=True),
        decoder.register_forward_pre_hook(note("prefill"), prepend=True),
        decoder.register_forward_hook(note("end")),
        decoder.register_forward_hook(measure),
    ]
    try:
        yield marks, sizes
    finally:
        for handle in handles:
            handle.remove()


class Backends(TorchFunctionMode):
    """Within, count which of torch's kernels serves the language model's attention.

    Args:
        heads: Of its queries; towers have others.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {"prefill": Counter(), "decode": Counter()}
        self._heads = heads

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]  # [B, heads, Q, d]
            if query.shape[1] == self._heads:
                phase = "decode" if query.shape[2] == 1 else "prefill"
                self.counts[phase][_backend(*args, **kwargs)] += 1
        return function(*args, **kwargs)

    def __str__(self) -> str:
        """Such as "flash 28 / flash 28": in prefill and in decoding."""
        phases = [
            " ".join(f"{name} {count}" for name, count in counter.most_common())
            for counter in self.counts.values()
        ]
        return " / ".join(phase or "-" for phase in phases)


def _backend(*args: Any, **kwargs: Any) -> str:
    # Torch publishes which kernels it could take, but not which one it takes.
    number = torch._fused_sdp_choice(*args, **kwargs)
    known = torch.nn.attention.SDPBackend.__members__.items()
    names = [name for name, backend in known if int(backend.value) == number]
    return names[0].removesuffix("_ATTENTION").lower() if names else str(number)


# -- answers in turns


@dataclass
class Line:
    """A recipe within a group, and what was measured of it.

    Attributes:
        recipe: As text.
        runs: One of each round.
        media_tokens: How many the prompt has, and how many the cache holds on average.
        backends: Torch's kernels that served the attention.
        error: Why there is no more.
    """

    recipe: str
    runs: list[Run] = field(default_factory=list)
    media_tokens: tuple[int, int] | None = None
    backends: str = ""
    error: str = ""


class Group:
    """Recipes that run in turns on one model, one prompt and one attention implementation.

    Args:
        case: The model and its prompt.
        models: Where to get it from.
        kernel: The attention implementation.
        tokens: Length of the answers.
        chosen: Recipes to measure beside "none"; None for all.
    """

    def __init__(
        self, case: Case, models: Models, kernel: str, tokens: int, chosen: list[str] | None = None
    ) -> None:
        self._case, self._models, self.kernel, self._tokens = case, models, kernel, tokens
        self._model = models.get(case.model, case.build)
        self._model.set_attn_implementation(kernel)
        self._inputs = case.inputs(self._model)
        self._text: Any = self._model.config.get_text_config()
        known = recipes(case.model, self._text.num_hidden_layers)
        self._pending = known if chosen is None else [NONE, *chosen]
        self._same_count = chosen is None
        self.lines: list[Line] = []

    def warm_up(self, end: float) -> None:
        """Run every recipe once, which also tells how many tokens the baselines are to keep."""
        while self._pending and time.monotonic() < end:
            line = Line(self._pending.pop(0))
            self.lines.append(line)
            backends = Backends(self._text.num_attention_heads)
            with backends:
                report = self._run(line, 2, count=False)
            line.backends = str(backends)
            if report is None:
                continue
            tokens = report.media_tokens
            line.media_tokens = tokens.before, tokens.after
            known = [one.recipe for one in self.lines] + self._pending
            controls = self._controls(line, report)
            self._pending[:0] = [one for one in controls if one not in known]

    def _controls(self, line: Line, report: Report) -> list[str]:
        """Baselines that keep as many tokens as a method, of the cache if it prunes only there."""
        assert line.media_tokens is not None
        before, after = line.media_tokens
        baseline = any(line.recipe.startswith(name) for name in BASELINES)
        if not self._same_count or baseline or after >= before:
            return []
        place = " at=cache" if set(report.media_tokens.per_site) == {Cache()} else ""
        return [f"{name}(keep={after / before:.4g}{place})" for name in BASELINES]

    def round(self, end: float) -> bool:
        """Run every recipe once more; returns whether there was time for all."""
        for line in self.lines:
            if time.monotonic() >= end:
                return False
            if not line.error:
                self._run(line, self._tokens)
        return True

    def _run(self, line: Line, tokens: int, count: bool = True) -> Report | None:
        report = None
        try:
            run, report = answer(self._model, self._inputs, line.recipe, tokens)
            if count:
                line.runs.append(run)
        except Exception as error:  # one recipe shall not end the others
            line.error = why(error)
        if line.error:  # now that the exception no longer holds tensors
            self._models.tidy()
        return report

    def cells(self) -> list[dict[str, Any]]:
        """What is known by now of each recipe: medians, and medians of ratios within rounds."""
        return [self._cell(line) for line in self.lines]

    def _cell(self, line: Line) -> dict[str, Any]:
        unpruned = self.lines[0].runs
        cell: dict[str, Any] = {
            "model": self._case.model,
            "prompt_tokens": self._inputs["input_ids"].shape[1],
            "kernel": self.kernel,
            "recipe": line.recipe,
            "rounds": len(line.runs),
        }
        if line.media_tokens is not None:
            cell["media_tokens"], cell["media_tokens_kept"] = line.media_tokens
        if line.backends:
            cell["sdpa_backends"] = line.backends
        if line.error:
            cell["error"] = line.error
        if not line.runs:
            return cell
        for name in asdict(line.runs[0]):
            values = [getattr(run, name) for run in line.runs]
            bases = [getattr(run, name) for run in unpruned[: len(values)]]
            cell[name] = statistics.median(values)
            ratios = [a / b for a, b in zip(values, bases, strict=False) if b > 0]
            if ratios:
                cell[f"{name.rpartition('_')[0]}_ratio"] = statistics.median(ratios)
        cell["kv_bytes_unpruned"] = unpruned[0].kv_bytes if unpruned else math.nan
        cell["runs"] = [asdict(run) for run in line.runs]
        return cell


def why(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {lines[0]}"
    return f"{type(error).__name__}: {lines[0]}"
