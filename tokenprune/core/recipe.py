"""Recipes: ordered lists of methods, with a text form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from tokenprune.core.context import ModelShape
from tokenprune.core.group import Group
from tokenprune.core.registry import find_method
from tokenprune.core.stage import Method, Stage
from tokenprune.errors import RecipeError

__all__ = ["Recipe", "Step"]

Scalar = bool | int | float | str | None
Value = Scalar | tuple[Scalar, ...] | Mapping[str, Scalar]

_STRING = r'"(?:[^"\\]|\\.)*"'  # as in JSON; nothing inside it is split
_PLUS = re.compile(r"\+(?![^()]*\))")  # not the sign of an exponent, inside parentheses
_STEP = re.compile(rf'\s*([A-Za-z_][\w.:]*)\s*(?:\(((?:[^()"]|{_STRING})*)\))?\s*')
_SETTING = re.compile(
    rf'([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)\s*=\s*((?:[^\s=,"]|{_STRING})+)(?:\s+|$)'
)
_PART = re.compile(rf'{_STRING}|[^/"]+')
_BARE = re.compile(
    r"[\w.:-]+"
)  # what may stand without quotes, if it reads as no number or constant


class Step(NamedTuple):
    """A stage of a recipe on a model.

    Attributes:
        number: Of its method in the recipe, from 0: stages of one method share state.
        stage: The stage.
    """

    number: int
    stage: Stage


@dataclass(frozen=True, init=False)
class Recipe:
    """What to prune, and where: methods in the order in which they are applied.

    The text form joins methods by `+` and has no commas, because evaluation tools split their
    arguments there: `vflowopt(keep=0.1) + plphp(keep=0.4)`. `none` is the empty recipe, which
    prunes nothing; a bare name takes the method's defaults; `a/b/c` is a list; `keep.audio=0.5` is
    a value for audio alone. Text with spaces or slashes is quoted as in JSON:
    `encoder="owner/name"`.
    """

    methods: tuple[Method, ...]

    def __init__(self, *methods: Method | Recipe | str) -> None:
        object.__setattr__(self, "methods", tuple(_flatten(methods)))

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read the text form.

        Raises:
            RecipeError: The text is malformed, or names an unknown method or setting.
        """
        if text.strip().lower() in ("none", ""):
            return cls()
        return cls(*(_parse_step(step, text) for step in _split_steps(text)))

    def __str__(self) -> str:
        return " + ".join(map(_write_step, self.methods)) or "none"

    def steps(self, shape: ModelShape) -> tuple[Step, ...]:
        """The stages that run on a model of this shape, in the recipe's order."""
        for method in self.methods:
            method.check(shape)
        return tuple(
            Step(number, stage)
            for number, method in enumerate(self.methods)
            for stage in method.stages(shape)
        )

    @property
    def group(self) -> Group | None:
        """How much of a prompt is prefilled at once; None for all of it.

        Raises:
            RecipeError: Methods ask for different groups.
        """
        wanted = {method.group: method.name for method in self.methods if method.group is not None}
        if len(wanted) > 1:
            asked = " and ".join(f"{name} for groups of {group}" for group, name in wanted.items())
            raise RecipeError(f"recipe {str(self)!r} asks by {asked}; give one size to all")
        return next(iter(wanted), None)

    @property
    def text_dependent(self) -> bool:
        """Whether any decision depends on the question."""
        return any(method.text_dependent for method in self.methods)


def _flatten(parts: tuple[Method | Recipe | str, ...]) -> Iterator[Method]:
    for part in parts:
        if isinstance(part, str):
            yield from Recipe.parse(part).methods
        elif isinstance(part, Recipe):
            yield from part.methods
        elif isinstance(part, Method):
            _check_named(type(part))
            yield part
        else:
            raise RecipeError(
                f"a recipe is made of methods, recipes and texts, got {part!r}; "
                "write for example VFlowOpt(keep=0.1)"
            )


def _check_named(method: type[Method]) -> None:
    if not vars(method).get("name"):
        name = method.__name__
        raise RecipeError(
            f'{name} has no name of its own; write @method("{name.lower()}") above its @dataclass'
        )


def _split_steps(text: str) -> Iterator[str]:
    """Split at the `+` between methods."""
    masked = re.sub(_STRING, lambda quoted: "_" * len(quoted[0]), text)
    start = 0
    for plus in _PLUS.finditer(masked):
        yield text[start : plus.start()]
        start = plus.end()
    yield text[start:]


def _parse_step(step: str, text: str) -> Method:
    match = _STEP.fullmatch(step)
    if match is None:
        raise RecipeError(
            f"cannot read {step.strip()!r} in recipe {text!r}; "
            "write name(setting=value setting=value) + name(...), without commas"
        )
    name, inside = match[1], (match[2] or "").strip()
    method = find_method(name)
    return _build(method, _gather(_settings(inside, text), text))


def _gather(
    settings: Iterable[tuple[str, Scalar | tuple[Scalar, ...]]], text: str
) -> dict[str, Value]:
    """Settings by name; those of one name and several modalities are one mapping."""
    found: dict[str, Value] = {}
    for name, value in settings:
        whole, _, part = name.partition(".")
        if not part and name not in found:
            found[name] = value
            continue
        parts = found.setdefault(whole, {})
        if not part or not isinstance(parts, dict) or part in parts:
            raise RecipeError(f"recipe {text!r} sets {whole} twice; leave one of them out")
        if isinstance(value, tuple):
            raise RecipeError(f"recipe {text!r} sets {name} to a list; give one value")
        parts[part] = value
    return found


def _settings(inside: str, text: str) -> Iterator[tuple[str, Scalar | tuple[Scalar, ...]]]:
    at = 0
    while match := _SETTING.match(inside, at):
        try:
            yield match[1], _read(match[2])
        except ValueError:
            raise RecipeError(
                f"cannot read {match[2]} in recipe {text!r}; text in double quotes is escaped as "
                'in JSON, such as "a \\\\ b"'
            ) from None
        at = match.end()
    if at != len(inside):
        raise RecipeError(
            f"cannot read {inside[at:]!r} in recipe {text!r}; "
            "settings are written name=value, separated by spaces"
        )


def _build(method: type[Method], settings: dict[str, Value]) -> Method:
    known = [field.name for field in _settings_of(method)]
    for name in settings:
        if name not in known:
            raise RecipeError(f"{method.name} has no setting {name!r}; known: {', '.join(known)}")
    hints = get_type_hints(method)
    for name, value in settings.items():
        if isinstance(value, tuple) and not _fits(value, hints[name]) and _fits("", hints[name]):
            raise RecipeError(
                f"{method.name} takes {name} as one text, but a slash makes a list of "
                f'{_write(value)}; put it into double quotes: {name}="{_write(value)}"'
            )
    try:
        return method(**settings)
    except TypeError:
        for field in fields(method):  # type: ignore[arg-type]
            if field.name in settings and not _fits(settings[field.name], hints[field.name]):
                _, _, value = _write_setting(field.name, settings[field.name]).partition("=")
                raise RecipeError(
                    f"{method.name} takes {field.name} as {field.type}, got {value!r}"
                ) from None
        raise


def _fits(value: object, hint: object) -> bool:
    """Whether a value read from a text is what a setting is declared to be."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(part, parts[0]) for part in value)
    if get_origin(hint) is Literal:
        return value in parts
    if isinstance(value, Mapping):
        return get_origin(hint) is Mapping and all(_fits(one, parts[1]) for one in value.values())
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _read(word: str) -> Scalar | tuple[Scalar, ...]:
    parts: list[str] = _PART.findall(word)
    if "/" in re.sub(_STRING, "", word):
        return tuple(map(_read_scalar, parts))
    return _read_scalar(word)


def _read_scalar(word: str) -> Scalar:
    if '"' in word:
        text: str = json.loads(word)
        return text
    constants: dict[str, bool | None] = {"true": True, "false": False, "none": None}
    if word.lower() in constants:
        return constants[word.lower()]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word


def _write(value: Scalar | tuple[Scalar, ...]) -> str:
    if isinstance(value, tuple):
        # A list of less than two still needs its mark.
        return "/".join(map(_write, value)) + ("/" if len(value) < 2 else "")
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) and _read_scalar(value) == value
        # No commas: evaluation tools split at them.
        return value if bare else json.dumps(value).replace(",", "\\u002c")
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _write_setting(name: str, value: Value) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}.{part}={_write(one)}" for part, one in value.items())
    return f"{name}={_write(value)}"


def _differs(value: Value, default: object) -> bool:
    # 1 equals 1.0, but as a budget one is a count and the other a share.
    return default is MISSING or value != default or type(value) is not type(default)


def _settings_of(method: type[Method]) -> list[Field[Any]]:
    """The settings of a method, its budget first."""
    return sorted(fields(method), key=lambda one: one.name != "keep")  # type: ignore[arg-type]


def _write_step(method: Method) -> str:
    changed = {
        field.name: getattr(method, field.name)
        for field in _settings_of(type(method))
        if field.name == "keep" or _differs(getattr(method, field.name), field.default)
    }
    inside = " ".join(_write_setting(name, value) for name, value in changed.items())
    return f"{method.name}({inside})" if inside else method.name
