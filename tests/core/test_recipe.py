"""Recipes and their text form."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.methods.doubles import SHAPE
from tokenprune.catalog import method_summaries
from tokenprune.core import registry
from tokenprune.core.budget import KeepEach
from tokenprune.core.context import Context, ModelShape
from tokenprune.core.recipe import Recipe, _write_setting
from tokenprune.core.registry import find_method, list_methods, method
from tokenprune.core.selection import Selection
from tokenprune.core.signal import (
    Attention,
    Frames,
    Hidden,
    Keys,
    Question,
    Signal,
    Text,
    Values,
)
from tokenprune.core.site import Cache, Input, Layer, Site
from tokenprune.core.stage import Method, Stage
from tokenprune.errors import RecipeError
from tokenprune.methods.baselines import Random, Uniform
from tokenprune.methods.plphp import PLPHP
from tokenprune.methods.vflowopt import VFlowOpt

RECIPES = [
    Recipe(),
    Recipe(Random(keep=0.25, at="cache", seed=3)),
    Recipe(Random(keep=7, at=2, per="frame")),
    Recipe(Uniform(keep=1.0)),
    Recipe(Uniform(keep=1, per="item")),
    Recipe(VFlowOpt(keep=0.1), PLPHP(keep=0.4)),
    Recipe(VFlowOpt(keep=0.3, r1=0.4, r2=0.7, t=5, alpha=-0.5, cell=3.5, recycled=0.0)),
    Recipe(VFlowOpt(keep=0.25, strategy="llava-onevision-7b")),
    Recipe(VFlowOpt(keep=1e-05, log_base=2.718281828459045, per="prompt")),
    Recipe(PLPHP(layers=(3,)), PLPHP(layers=(0, 2), span="item", least=2)),
    Recipe(PLPHP(keep=0.6, shift=0.1, alpha=0.3, beta=0.1, layers=4)),
    Recipe(Random(keep={"audio": 0.5}), Uniform(keep={"audio": 12, "image": 1.0, "video": 1e-05})),
    Recipe(Uniform(keep={"video": 1}, per="frame", on="video", at="cache")),
    Recipe(Random(keep=0.5, on=("audio", "image")), VFlowOpt(on="video"), PLPHP(on=("image",))),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_text_round_trips(recipe: Recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe
    assert "," not in str(recipe)
    assert hash(Recipe.parse(str(recipe))) == hash(recipe)


@pytest.mark.parametrize("name", list_methods())
def test_recipe_takes_a_bare_name(name: str) -> None:
    recipe = Recipe.parse(name)
    assert recipe.methods == (find_method(name)(),)
    method = find_method(name)()
    if name == "groups":  # prunes nothing
        assert str(recipe) == "groups" and recipe.group is not None
        return
    keep = method.keep  # type: ignore[attr-defined]
    assert str(recipe) == f"{name}({_write_setting('keep', keep)})"
    assert recipe.steps(SHAPE)


@pytest.mark.parametrize("name", list_methods())
def test_every_setting_of_a_method_has_a_text(name: str) -> None:
    method = find_method(name)()
    settings = " ".join(
        _write_setting(f.name, getattr(method, f.name))
        for f in fields(method)  # type: ignore[arg-type]
    )
    assert Recipe.parse(f"{name}({settings})").methods == (method,)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("none", "none"),
        ("  ", "none"),
        ("Random( keep=0.5   at=cache )", "random(keep=0.5 at=cache)"),
        ("random()+uniform(keep=3)", "random(keep=0.5) + uniform(keep=3)"),
        ("random(seed=1e+1)", None),
        ("random(keep.audio=0.5)", "random(keep.audio=0.5)"),
        (
            "random(keep.audio=3 seed=1 keep.image=0.5)",
            "random(keep.image=0.5 keep.audio=3 seed=1)",
        ),
        ("random(on=audio/video)", "random(keep=0.5 on=video/audio)"),
        ("random(on=audio/)", "random(keep=0.5 on=audio)"),
        ("plphp(layers=1/2/)", "plphp(keep=0.4 layers=1/2)"),
        ("VFLOWOPT(keep=.2)", "vflowopt(keep=0.2)"),
    ],
)
def test_recipe_parse(text: str, plain: str | None) -> None:
    if plain is None:
        with pytest.raises(RecipeError, match="seed must be a whole number, got 10.0"):
            Recipe.parse(text)
    else:
        assert str(Recipe.parse(text)) == plain


def test_recipe_joins_methods_recipes_and_texts() -> None:
    recipe = Recipe(Random(), "uniform + plphp", Recipe(Uniform(at=1)))
    assert str(recipe) == (
        "random(keep=0.5) + uniform(keep=0.5) + plphp(keep=0.4) + uniform(keep=0.5 at=1)"
    )


def test_recipe_steps_show_the_parts_in_order() -> None:
    steps = Recipe.parse("random + vflowopt(keep=0.25 r2=0.9) + plphp").steps(SHAPE)
    assert [step.stage.site for step in steps] == [
        Input(), Input(), Layer(9), Layer(18), Cache()
    ]  # fmt: skip


def test_stages_of_one_method_have_one_number() -> None:
    recipe = Recipe.parse("vflowopt(keep=1.0) + vflowopt(keep=0.25 r2=0.9) + plphp + plphp")
    steps = recipe.steps(SHAPE)
    assert [step.number for step in steps] == [1, 1, 1, 2, 3]  # the first has no stages
    assert [step.stage.name for step in steps] == ["vflowopt"] * 3 + ["plphp"] * 2
    assert Recipe().steps(SHAPE) == ()


def test_recipe_tells_a_count_from_a_share() -> None:
    assert str(Recipe(Random(keep=1, per="frame"))) == "random(keep=1 per=frame)"
    assert type(Recipe.parse("random(keep=1 per=frame)").methods[0].keep) is int  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("randm(keep=0.5)", f"no method 'randm'; known: {', '.join(method_summaries())}. A method"),
        ("random(share=0.5)", "random has no setting 'share'; known: keep, on, per, at, seed"),
        ("random(share.audio=0.5)", "random has no setting 'share'; known: keep, on"),
        (
            "mine.stage(keep=0.5)",
            "got 'mine.stage'; import the module in Python or by tokenprune --with MODULE",
        ),
        ("mine:Mine", "imports nothing, got 'mine:Mine'; .* tokenprune --with MODULE"),
        ("random(keep=0.5, at=cache)", "cannot read 'keep=0.5, at=cache' .*separated by spaces"),
        ("random(0.5)", "cannot read '0.5' in recipe .*settings are written name=value"),
        ("random(keep=)", "cannot read 'keep='"),
        ("random + ", "cannot read '' in recipe"),
        ("random uniform", "cannot read 'random uniform'"),
        ("random(keep=0.5", "cannot read"),
        ("random(keep=1.5)", "keep must be a share"),
        ("vflowopt(r1=much)", r"vflowopt takes r1 as float \| None, got 'much'"),
        ("vflowopt(cell=2/3)", r"vflowopt takes cell as float \| None, got '2/3'"),
        ("plphp(layers=all)", "layers must be decoder layers or none for all, got 'all'"),
        ("plphp(layers=/)", "layers must be decoder layers"),
        ("random(keep=1)", "keep=1 keeps a single token .* write keep=1.0"),
        ("random(keep=0.5 keep=0.5)", "sets keep twice; leave one of them out"),
        ("random(keep=0.5 at=1 keep.audio=0.5)", "sets keep twice"),
        ("random(keep.audio=0.5 keep=0.5)", "sets keep twice"),
        ("random(keep.audio=0.5 keep.audio=0.5)", "sets keep twice"),
        ("random(seed=1 seed=2)", "recipe 'random\\(seed=1 seed=2\\)' sets seed twice"),
        ("random(keep.audio=1/2)", "sets keep.audio to a list; give one value"),
        ("random(keep.sound=0.5)", "keep must name some of image, video, audio, got 'sound'"),
        ("random(keep.audio=2.5)", r"keep.audio must be a share in \(0, 1\] or a count .* 2.5"),
        ("random(keep.audio=loud)", "keep.audio must be a share in .* got 'loud'"),
        ("random(keep.audio=none)", "keep.audio must be a share in .* got None"),
        ("random(keep.=0.5)", "cannot read 'keep.=0.5'"),
        ("random(keep.audio.left=0.5)", "cannot read 'keep.audio.left=0.5'"),
        ("random(at.audio=1)", 'at must be "input", "cache" or a decoder layer, got'),
        ("vflowopt(keep.video=0.5)", r"keep must be a share in \(0, 1\], got .*takes no count"),
        ("vflowopt(t.video=0.5)", r"vflowopt takes t as float \| None, got '0.5'"),
        ("random(on=sound)", "on must name some of image, video, audio, got 'sound'"),
        ("random(on=image/sound)", "on must name some of image, video, audio, got 'sound'"),
        ("random(on=/)", "on must name some of image, video, audio, got none"),
        ("random(on=3)", "on must name some of image, video, audio, got 3"),
        ("random(on.audio=1)", "on must name some of image, video, audio, got {'audio': 1}"),
    ],
)
def test_recipe_parse_fails(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)


def test_recipe_fails() -> None:
    with pytest.raises(
        RecipeError, match="a recipe is made of methods, recipes and texts, got 0.5"
    ):
        Recipe(0.5)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Looks(Stage):
    """A stage that is made for a test, without a name for recipes."""

    needs: tuple[Signal[Any], ...] = ()
    site: Site = Input()

    name = "looks"

    def select(self, context: Context) -> Selection:
        raise NotImplementedError


def test_recipe_takes_stages_that_are_no_methods() -> None:
    (step,) = Recipe(Looks(site=Layer(3))).steps(SHAPE)
    assert step == (0, Looks(site=Layer(3)))


def test_recipe_refuses_what_has_no_name_of_its_own() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nameless(Stage):
        site: Site = Input()

        def select(self, context: Context) -> Selection:
            raise NotImplementedError

    @dataclass(frozen=True, kw_only=True)
    class Inherits(Uniform):
        pass

    for cls in (Nameless, Inherits):
        error = f'{cls.__name__} has no name of its own; write @method("{cls.__name__.lower()}")'
        with pytest.raises(RecipeError, match=re.escape(error)):
            Recipe(cls())  # a text of its parent's name would not bring it back


def test_a_method_names_all_that_its_stages_read() -> None:
    @dataclass(frozen=True)
    class Hides(Method):
        needs: tuple[Signal[Any], ...] = ()

        name = "hides"

        def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
            return (Looks(), Looks(needs=(Text(), Question())))

    error = r"a stage of hides reads Question\(\), which the needs of hides do not name; add it"
    with pytest.raises(RecipeError, match=error):
        Recipe(Hides(needs=(Text(),))).steps(SHAPE)
    assert len(Recipe(Hides(needs=(Question(), Text()))).steps(SHAPE)) == 2


def test_recipe_steps_fail_for_signals_that_are_not_there() -> None:
    with pytest.raises(RecipeError, match="cannot be had at input: no layer has run"):
        Recipe(Looks(needs=(Attention(),))).steps(SHAPE)
    Recipe(Looks(needs=(Attention(),), site=Layer(0))).steps(SHAPE)


def test_recipe_steps_fail() -> None:
    with pytest.raises(RecipeError, match="random acts at layer 28, .* layers 0 to 27"):
        Recipe(Random(at=28)).steps(SHAPE)
    with pytest.raises(RecipeError, match="plphp acts at layer 30"):
        Recipe(PLPHP(layers=(2, 30))).steps(SHAPE)


def test_recipe_may_name_a_method_twice() -> None:
    steps = Recipe(VFlowOpt(keep=0.5), VFlowOpt(keep=0.1)).steps(SHAPE)
    assert [(step.number, step.stage.site) for step in steps] == [
        (0, Input()), (0, Layer(18)), (1, Input()), (1, Layer(18))
    ]  # fmt: skip
    assert len({step.stage for step in steps}) == 4


def test_recipe_text_dependence() -> None:
    assert Recipe.parse("vflowopt + plphp").text_dependent
    assert not Recipe.parse("vflowopt + random(at=cache)").text_dependent
    assert not Recipe().text_dependent


@pytest.mark.parametrize(
    ("signals", "depends"),
    [
        ((), False),
        ((Attention(),), True),
        ((Attention(queries="text"),), True),
        ((Attention(queries="own"),), False),
        ((Keys(), Values(), Hidden(), Hidden(layer="input"), Frames()), False),
        ((Keys(of="text"),), True),
        ((Values(of="text"),), True),
        ((Text(),), True),
        ((Frames(), Question()), True),
    ],
)
def test_signals_decide_on_text_dependence(signals: Any, depends: bool) -> None:
    stage = Looks(needs=signals, site=Layer(3))
    assert stage.text_dependent == depends
    assert Recipe(Random(), stage).text_dependent == depends


# -- budgets and choices of modalities


def test_budgets_of_modalities_are_values() -> None:
    one, other = ({"video": 0.2, "audio": 0.5}, {"audio": 0.5, "video": 0.2})
    assert Random(keep=one) == Random(keep=other) != Random(keep={"audio": 0.5})
    assert hash(Random(keep=one)) == hash(Random(keep=other))
    method = Random(keep=one)
    one["audio"] = 1.0
    assert method == Random(keep=other)
    assert replace(method, seed=0) == copy.deepcopy(method) == method


def test_keep_each() -> None:
    keep = KeepEach({"audio": 1, "image": 0.5})
    assert keep == {"audio": 1, "image": 0.5}
    assert keep != {"audio": 1.0, "image": 0.5}  # a count is no share
    assert keep != 0.5
    assert list(keep) == ["image", "audio"] and len(keep) == 2 and keep["audio"] == 1
    assert repr(keep) == "{'image': 0.5, 'audio': 1}"
    assert hash(keep) == hash(KeepEach({"image": 0.5, "audio": 1}))
    with pytest.raises(RecipeError, match="keep must name some of image, video, audio, got none"):
        KeepEach({})
    with pytest.raises(RecipeError, match="keep must name some of image, video, audio, got 'text'"):
        KeepEach({"text": 0.5})  # type: ignore[dict-item]


def test_a_count_of_a_modality_is_told_from_a_share() -> None:
    share, tokens = Recipe.parse("random(keep.audio=1.0) + random(keep.audio=1)").methods
    assert share != tokens
    assert str(Recipe(share, tokens)) == "random(keep.audio=1.0) + random(keep.audio=1)"


def test_one_choice_of_modalities_has_one_form() -> None:
    assert Random(on="audio") == Random(on=("audio",))
    assert Random(on=("audio", "image")) == Random(on=("image", "audio", "image"))
    assert str(Recipe(Random(on=("audio", "image")))) == "random(keep=0.5 on=image/audio)"
    assert Random(on=None).on is None
    for on in ((), "sound", ("image", "sound"), 3, {"audio": 0.5}):
        with pytest.raises(RecipeError, match="on must name some of image, video, audio, got"):
            Random(on=on)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [cls() for cls in list_methods().values()], ids=str)
def test_methods_are_settings_only(method: Method) -> None:
    assert hash(method) == hash(type(method)())
    with pytest.raises(AttributeError):
        method.keep = 0.9  # type: ignore[attr-defined]


# -- text


@pytest.fixture
def labelled() -> Iterator[None]:
    """A method `labelled` with settings that are text."""
    known = dict(registry.METHODS.claims)

    @method("labelled")
    @dataclass(frozen=True, kw_only=True)
    class Labelled(Stage):
        text: str = ""
        texts: tuple[str, ...] = ()

        @property
        def site(self) -> Input:
            return Input()

        def select(self, context: Context) -> Selection:
            raise NotImplementedError

    yield
    registry.METHODS.claims = known


with_text = pytest.mark.usefixtures("labelled")
TEXTS = ["owner/name", "C:\\clips\\a b.mp4", "1.0", "true", "none", "nan", "", "/"]
TEXTS += ["a, b", "a+b", '"', "(", "x=y", "\\"]
any_text = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(TEXTS)


@with_text
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(any_text, st.lists(any_text, max_size=3).map(tuple))
def test_text_round_trips(text: str, texts: tuple[str, ...]) -> None:
    method = find_method("labelled")(text=text, texts=texts)  # type: ignore[call-arg]
    written = str(Recipe(method, "random(keep=0.25)"))
    assert Recipe.parse(written).methods[0] == method
    assert "," not in written and written.endswith(" + random(keep=0.25)")


@with_text
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("word", "word"),
        ('"word"', "word"),
        ('"1"', "1"),
        ('"my clips/a (1).mp4"', "my clips/a (1).mp4"),
        ('"a + b"', "a + b"),
        (r'"say \"no\" \\ \u002c"', r'say "no" \ ,'),
        ("openai:clip-vit.b", "openai:clip-vit.b"),
    ],
)
def test_text_is_read_as_written(text: str, value: str) -> None:
    (method,) = Recipe.parse(f"labelled(text={text} texts=a/)").methods
    assert (method.text, method.texts) == (value, ("a",))  # type: ignore[attr-defined]


@with_text
def test_lists_of_quoted_text_are_split_outside_the_quotes() -> None:
    (method,) = Recipe.parse('labelled(texts="a/b"/c/"d e")').methods
    assert method.texts == ("a/b", "c", "d e")  # type: ignore[attr-defined]
    assert str(Recipe(method)) == 'labelled(texts="a/b"/c/"d e")'


@with_text
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labelled(text=owner/name)", 'a slash makes a list .* text="owner/name"'),
        ('labelled(text="a)', "cannot read"),
        (r'labelled(text="a\x")', "escaped as in JSON"),
        ('labelled(text="a"b)', "escaped as in JSON"),
    ],
)
def test_text_fails(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)
