"""A recipe: which methods in which order, on what calibration text, measured how.

    Recipe(steps=(GPTQ(weight=QuantSpec(bits=4, group_size=64)),), calib=CalibSpec(samples=64))

Written as a short Python file with a function `recipe()`, or as the JSON that every run leaves
beside its result; single settings are overridden from the command line: `calib.samples=16`.
"""

import ast
import dataclasses
import difflib
import hashlib
import json
import pathlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from jaxcomp.core.files import canonical
from jaxcomp.core.plain import Json, from_plain, to_plain
from jaxcomp.core.struct import STATICS

T = typing.TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CalibSpec:
    """Which text a recipe calibrates on.

    Attributes:
      source: a name or file that `jaxcomp.data.load_text` knows.
      samples: windows drawn from it.
      length: tokens a window.
      seed: of the draw; the same seed gives the same windows.
      batch: windows that go through a block at once.
    """

    source: str = "wiki_calib"
    samples: int = 64
    length: int = 1024
    seed: int = 0
    batch: int = 8

    def __post_init__(self):
        for name, least in (("samples", 1), ("length", 2), ("seed", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
      steps: methods (`jaxcomp.methods.METHODS`), applied in order.
      calib: None for recipes that need no data.
      evals: evaluations (`jaxcomp.evals.EVALS`), run before the first step and after the last.
    """

    steps: tuple[Any, ...] = ()
    calib: CalibSpec | None = None
    evals: tuple[Any, ...] = ()

    def __post_init__(self):
        for name in ("steps", "evals"):
            values = getattr(self, name)
            if not isinstance(values, tuple):
                raise ValueError(
                    f"{name}={values!r} is a {type(values).__name__}; write a tuple, with a comma "
                    "even for a single element: (RTN(),)"
                )
            for i, value in enumerate(values):
                if isinstance(value, type):
                    raise ValueError(f"{name}.{i} is the class {value.__name__}; call it")
                if not (dataclasses.is_dataclass(value) and callable(value)):
                    raise ValueError(f"{name}.{i}={value!r} is not a method or an evaluation")
        if self.calib is not None and not isinstance(self.calib, CalibSpec):
            raise ValueError(f"calib={self.calib!r} is not a CalibSpec")


def load_recipe(path: str | pathlib.Path) -> Recipe:
    """Reads a recipe from a Python file with a function `recipe()`, or from JSON.

    Raises:
      ValueError: no such file, another suffix, an error inside the file, no `recipe` function, or
        one that returns something else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"there is no recipe file {path}; give a .py or .json file")
    if path.suffix == ".json":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return recipe_from_json(data)
    if path.suffix != ".py":
        raise ValueError(f"{path} has the suffix {path.suffix!r}; a recipe is a .py or .json file")
    return call_config(path, "recipe", Recipe)


def call_config(path: pathlib.Path, function: str, wanted: type[T]) -> T:
    """What `function()` of the Python file at `path` returns, which must be a `wanted`.

    Raises:
      ValueError: an error inside the file, no such function, or one that returns something else.
    """
    make = _run_config(path).get(function)
    if not callable(make):
        raise ValueError(
            f"{path} defines no function {function}(); write one that returns a {wanted.__name__}"
        )
    made = _within(path, make)
    if not isinstance(made, wanted):
        raise ValueError(
            f"{function}() in {path} returned a {type(made).__name__}; "
            f"return a jaxcomp.{wanted.__name__}"
        )
    return made


def recipe_to_json(recipe: Recipe) -> dict[str, Json]:
    """The recipe as JSON values, every setting spelled out.

    Raises:
      ValueError: a step or an evaluation is in no registry.
    """
    return to_plain(recipe, _known(), "recipe")


def recipe_from_json(data: dict[str, Json]) -> Recipe:
    """The inverse of `recipe_to_json`; absent settings take their default.

    Raises:
      ValueError: an unknown class or setting; the message lists what is known.
    """
    recipe = from_plain(data, _known(), "recipe")
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"this JSON describes {recipe!r:.80}, not a recipe with the class 'Recipe'"
        )
    return recipe


def fingerprint(obj: Any) -> str:
    """sha256 of the canonical JSON of a recipe, a step or JSON values; equal for equal settings."""
    data = obj if isinstance(obj, dict | list) else to_plain(obj, _known(), "value")
    return hashlib.sha256(canonical(data)).hexdigest()


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """The recipe with settings replaced, given as `steps.0.weight.bits=3` or `calib.samples=16`.

    Values are read as int, float, bool (true, false), none, tuple `(a, b)` or text, and must fit
    the setting's annotation.

    Raises:
      ValueError: no such setting (the message lists what there is), or a value that does not fit.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ValueError(f"{setting!r} is no setting; write key=value, as in calib.samples=16")
        recipe = _set(recipe, path.split("."), text, path, Recipe)
    return recipe


def _known() -> dict[str, type]:
    from jaxcomp.evals import EVALS
    from jaxcomp.methods import METHODS

    return {"Recipe": Recipe, "CalibSpec": CalibSpec, **STATICS, **METHODS, **EVALS}


def _run_config(path: pathlib.Path) -> dict[str, Any]:
    # No import: that would leave byte code beside the file, and could reuse it when stale.
    module = types.ModuleType(f"jaxcomp_config_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses defined in the file look themselves up
    source = path.read_bytes()
    _within(path, lambda: exec(compile(source, str(path), "exec"), module.__dict__))
    return module.__dict__


def _within(path: pathlib.Path, run: Any) -> Any:
    try:
        return run()
    except Exception as error:
        line, trace = "", error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(path):
                line = f", line {trace.tb_lineno}"
            trace = trace.tb_next
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path}{line}: {kind}{error}") from error


def _set(holder: Any, words: list[str], text: str, path: str, hint: Any) -> Any:
    """`holder` with the setting at `words` replaced; `hint` is the annotation of `holder`."""
    if not words:
        return _parse(text, hint, path)
    word, *rest = words
    if dataclasses.is_dataclass(holder):
        names = [f.name for f in dataclasses.fields(holder) if f.init]
        if word not in names:
            raise ValueError(_no_such(word, path, type(holder).__name__, names))
        hints = typing.get_type_hints(type(holder))
        value = _set(getattr(holder, word), rest, text, path, hints[word])
        try:
            return dataclasses.replace(holder, **{word: value})
        except ValueError as error:
            raise ValueError(f"{path}={text}: {error}") from error
    if isinstance(holder, tuple):
        if not (word.isdigit() and int(word) < len(holder)):
            there = f"0 to {len(holder) - 1}" if holder else "none"
            raise ValueError(f"{path}: there is no element {word!r}; there are: {there}")
        i = int(word)
        value = _set(holder[i], rest, text, path, type(holder[i]))
        return (*holder[:i], value, *holder[i + 1 :])
    if isinstance(holder, Mapping):
        if word not in holder:
            raise ValueError(_no_such(word, path, "the table", list(holder)))
        return {**holder, word: _set(holder[word], rest, text, path, type(holder[word]))}
    raise ValueError(
        f"{path}: what is to hold {word!r} is {holder!r} and has no settings of its own; "
        "set it in the recipe file"
    )


def _no_such(word: str, path: str, holder: str, names: list[str]) -> str:
    near = difflib.get_close_matches(word, names, 1)
    guess = f"; did you mean {near[0]}?" if near else "."
    return f"{path}: {holder} has no setting {word!r}{guess} It has: {', '.join(names)}"


def _parse(text: str, hint: Any, path: str) -> Any:
    for candidate in (_literal(text), text):  # a number may also be the text that a str field wants
        fits, value = _fit(candidate, hint)
        if fits:
            return value
    wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"{path}={text} does not fit {wanted}")


def _literal(text: str) -> Any:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        if text.strip().startswith("(") and text.strip().endswith(")"):  # bare words: (attn_in, b)
            parts = [part for part in text.strip()[1:-1].split(",") if part.strip()]
            return tuple(_literal(part.strip()) for part in parts)
        return text
    return tuple(value) if isinstance(value, list) else value


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether `value` is what `hint` asks for, and the value as that type (an int as a float)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in args), value
    if origin in (typing.Union, types.UnionType):
        results = (_fit(value, arg) for arg in args)
        return next((r for r in results if r[0]), (False, value))
    if hint is None or hint is type(None):
        return value is None, value
    if hint is float and type(value) is int:
        return True, float(value)
    if (origin or hint) is tuple:
        if not isinstance(value, tuple):
            return False, value
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        if not args:
            return True, value
        if len(kinds) != len(value):
            return False, value
        parts = [_fit(x, kind) for x, kind in zip(value, kinds, strict=True)]
        return all(fits for fits, _ in parts), tuple(x for _, x in parts)
    if not isinstance(hint, type):
        return False, value
    return type(value) is hint, value
