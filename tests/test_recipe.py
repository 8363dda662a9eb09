import dataclasses
import json
from typing import Literal

import pytest

from jaxcomp import evals, methods
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.recipe import (
    CalibSpec,
    Recipe,
    fingerprint,
    load_recipe,
    override,
    recipe_from_json,
    recipe_to_json,
)


@dataclasses.dataclass(frozen=True)
class Round:
    weight: QuantSpec | None = QuantSpec()
    sites: tuple[str, ...] = ("attn_in",)
    order: Literal["none", "act"] = "none"
    damp: float = 0.01
    limit: float | None = None
    on: bool = True
    text: str = "a"

    def __post_init__(self):
        if self.damp <= 0:
            raise ValueError(f"damp={self.damp} is not above 0")

    def __call__(self, model, calib=None):
        return model


@dataclasses.dataclass(frozen=True)
class Count:
    tokens: int | None = None

    def __call__(self, model):
        return {}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "Round", Round)
    monkeypatch.setitem(evals.EVALS, "Count", Count)


@pytest.fixture
def recipe():
    steps = (Round(QuantSpec(bits=3, group_size=64)), Round(weight=None, sites=(), on=False))
    return Recipe(steps, CalibSpec(samples=8), (Count(100),))


def test_a_recipe_survives_json(recipe):
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe


def test_every_registered_class_is_registered_under_its_own_name():
    for table in (methods.METHODS, evals.EVALS):
        assert all(cls.__name__ == name for name, cls in table.items())


def test_absent_settings_take_their_default():
    data = {"class": "Recipe", "steps": [{"class": "Round", "damp": 0.5}]}
    assert recipe_from_json(data) == Recipe((Round(damp=0.5),))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"class": "Sqare"}, r"steps.0 is a 'Sqare'.*known: .*Round"),
        ({"class": "Round", "bitz": 4}, r"Round at .*has no field 'bitz'; its fields are: weight"),
        ({"class": "Round", "weight": {"class": "QuantSpec", "bits": 99}}, "bits=99 is outside"),
    ],
)
def test_json_is_read_strictly(step, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_json({"class": "Recipe", "steps": [step]})


def test_json_of_something_else_is_refused():
    with pytest.raises(ValueError, match="not a recipe"):
        recipe_from_json({"steps": []})


def test_a_method_outside_the_registry_has_no_json(recipe, monkeypatch):
    monkeypatch.delitem(methods.METHODS, "Round")
    with pytest.raises(ValueError, match=r"recipe.steps.0 is a Round, which is not one of: .*GPTQ"):
        recipe_to_json(recipe)


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("calib.samples=16", lambda r: r.calib.samples == 16),
        ("calib=none", lambda r: r.calib is None),
        ("steps.0.weight.bits=4", lambda r: r.steps[0].weight == QuantSpec(4, group_size=64)),
        ("steps.0.weight.group_size=none", lambda r: r.steps[0].weight.group_size is None),
        ("steps.0.weight=none", lambda r: r.steps[0].weight is None),
        ("steps.1.on=true", lambda r: r.steps[1].on is True),
        ("steps.0.damp=1", lambda r: type(r.steps[0].damp) is float and r.steps[0].damp == 1),
        ("steps.0.damp=1e-3", lambda r: r.steps[0].damp == 1e-3),
        ("steps.0.limit=2", lambda r: r.steps[0].limit == 2.0),
        ("steps.0.text=4", lambda r: r.steps[0].text == "4"),
        ("steps.0.text=a=b", lambda r: r.steps[0].text == "a=b"),
        ("steps.0.order=act", lambda r: r.steps[0].order == "act"),
        ("steps.0.order=none", lambda r: r.steps[0].order == "none"),
        ("steps.0.sites=(ffn_in, attn_in)", lambda r: r.steps[0].sites == ("ffn_in", "attn_in")),
        ("steps.0.sites=('ffn_in',)", lambda r: r.steps[0].sites == ("ffn_in",)),
        ("steps.0.sites.0=query", lambda r: r.steps[0].sites == ("query",)),
        ("evals.0.tokens=none", lambda r: r.evals == (Count(None),)),
        ("evals=()", lambda r: r.evals == ()),
    ],
)
def test_a_setting_is_overridden_and_the_rest_stays(setting, read, recipe):
    new = override(recipe, [setting])
    assert read(new)
    assert recipe_from_json(recipe_to_json(new)) == new
    assert new.steps[1].sites == ()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("calib.sample=16", r"no setting 'sample'; did you mean samples\? It has: source, samples"),
        ("calib.zzz=16", r"no setting 'zzz'. It has: source"),
        ("calib.samples=many", r"calib.samples=many does not fit int"),
        ("calib.samples=1.5", r"does not fit int"),
        ("calib.samples=true", r"does not fit int"),
        ("calib.samples=0", r"calib.samples=0: samples=0 is below 1"),
        ("steps.0.damp=-1", r"damp=-1.0 is not above 0"),
        ("steps.0.weight.bits=12", r"bits=12 is outside 2..8"),
        ("steps.0.order=desc", r"does not fit Literal\['none', 'act'\]"),
        ("steps.1.weight.bits=4", r"to hold 'bits' is None.*set it in the recipe file"),
        ("steps.7.damp=1", r"no element '7'; there are: 0 to 1"),
        ("steps.0.sites=attn_in", r"does not fit tuple\[str, ...\]"),
        ("calib.samples", r"is no setting; write key=value"),
        ("steps=(1,)", r"steps.0=1 is not a method"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_with_what_would(setting, message, recipe):
    with pytest.raises(ValueError, match=message):
        override(recipe, [setting])


CONFIG = """
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.recipe import CalibSpec, Recipe
from jaxcomp.methods import METHODS

def recipe():
    spec = QuantSpec(bits={bits})
    return Recipe(steps=(METHODS["Round"](weight=spec),), calib=CalibSpec(samples=4))
"""


def test_a_config_file_is_run_anew_and_leaves_no_byte_code(tmp_path):
    path = tmp_path / "config.py"
    for bits in (3, 4):
        path.write_text(CONFIG.format(bits=bits))
        assert load_recipe(path).steps == (Round(QuantSpec(bits=bits)),)
    assert [p.name for p in tmp_path.iterdir()] == ["config.py"]


def test_the_json_a_run_leaves_is_a_config_too(recipe, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_to_json(recipe)))
    assert load_recipe(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.py", None, "there is no recipe file"),
        ("c.yaml", "", r"has the suffix '.yaml'; a recipe is a .py or .json"),
        ("c.py", "x = 1", r"defines no function recipe\(\)"),
        ("c.py", "def recipe():\n    return 3", r"returned a int; return a jaxcomp.Recipe"),
        ("c.py", "x = 1\ny = z", r"c.py, line 2: NameError: name 'z'"),
        ("c.py", "def recipe(:", r"c.py: SyntaxError"),
        ("c.py", CONFIG.format(bits=9), r"c.py, line 7: bits=9 is outside 2..8"),
        ("c.json", "{", "is not JSON"),
    ],
)
def test_a_bad_config_file_says_what_is_wrong_and_where(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": [Round()]}, "write a tuple"),
        ({"steps": (Round,)}, "steps.0 is the class Round; call it"),
        ({"steps": (QuantSpec(),)}, "is not a method or an evaluation"),
        ({"calib": 64}, "calib=64 is not a CalibSpec"),
    ],
)
def test_a_recipe_of_the_wrong_things_fails_when_it_is_built(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**kwargs)


def test_fingerprints_are_equal_for_equal_settings_only(recipe):
    same = override(recipe, ["calib.samples=8"])
    assert fingerprint(recipe) == fingerprint(same) == fingerprint(recipe_to_json(recipe))
    assert fingerprint(recipe) != fingerprint(override(recipe, ["calib.samples=9"]))
    assert len(fingerprint(recipe.steps[0])) == 64
