"""Recipes and their text form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.methods.doubles import SHAPE
from tokenprune.core import registry
from tokenprune.core.context import Context
from tokenprune.core.recipe import Recipe
from tokenprune.core.registry import find_method, list_methods
from tokenprune.core.selection import Selection
from tokenprune.core.site import (
    Cache,
    Encoder,
    Input,
    Layer,
)
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
    assert str(recipe) == f"{name}(keep={method.keep})"  # type: ignore[attr-defined]
    assert recipe.stages(SHAPE)


@pytest.mark.parametrize("name", list_methods())
def test_every_setting_of_a_method_has_a_text(name: str) -> None:
    method = find_method(name)()
    settings = " ".join(
        f"{f.name}={getattr(method, f.name)}"
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


def test_recipe_stages_show_the_parts_in_order() -> None:
    stages = Recipe.parse("random + vflowopt(keep=0.25 r2=0.9) + plphp").stages(SHAPE)
    assert [stage.site for stage in stages] == [
        Input(), Encoder(), Input(), Layer(9), Layer(18), Cache()
    ]  # fmt: skip


def test_recipe_tells_a_count_from_a_share() -> None:
    assert str(Recipe(Random(keep=1, per="frame"))) == "random(keep=1 per=frame)"
    assert type(Recipe.parse("random(keep=1 per=frame)").methods[0].keep) is int  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("randm(keep=0.5)", "no method 'randm'; known: plphp, random, uniform, vflowopt"),
        ("random(share=0.5)", "random has no setting 'share'; known: keep, at, per, seed"),
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


def test_recipe_stages_fails() -> None:
    with pytest.raises(RecipeError, match="random acts at layer 28, .* layers 0 to 27"):
        Recipe(Random(at=28)).stages(SHAPE)
    with pytest.raises(RecipeError, match="plphp acts at layer 30"):
        Recipe(PLPHP(layers=(2, 30))).stages(SHAPE)
    with pytest.raises(RecipeError, match="makes the encoder map vflowopt twice"):
        Recipe(VFlowOpt(keep=0.5), VFlowOpt(keep=0.1)).stages(SHAPE)


def test_recipe_text_dependence() -> None:
    assert Recipe.parse("vflowopt + plphp").text_dependent
    assert not Recipe.parse("vflowopt + random(at=cache)").text_dependent


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
