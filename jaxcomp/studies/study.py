"""What a study is: one model, rows of recipes, the same evaluations for all.

    def study():
        gptq = Recipe((GPTQ(),), CalibSpec())
        return Study("demo:smollm2", {"RTN": Recipe((RTN(),)), "GPTQ": gptq}, (Perplexity(),))

Written as a short Python file with a function `study()`. How it is run is in `studies/run.py`.
"""

import dataclasses
import difflib
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxcomp.recipe import Recipe, call_config, override


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """A row of the table.

    Attributes:
      name: unlike that of any other row.
      recipe: the evaluations are the study's, whatever the recipe says.
      labels: further cells of the row, column → text.
      group: neighbouring rows of one group stand together.
      repeats: settings such as "steps.0.seed=1", each of which is a run of its own; the row shows
        their mean, standard deviation and every value. () is one run of the recipe as it is.
    """

    name: str
    recipe: Recipe
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    group: str = ""
    repeats: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.recipe, Recipe):
            raise ValueError(
                f"row {self.name!r} holds a {type(self.recipe).__name__}, not a Recipe"
            )
        if not isinstance(self.repeats, tuple):
            raise ValueError(f"row {self.name!r}: repeats={self.repeats!r} is not a tuple")
        if len(set(self.repeats)) < len(self.repeats):
            raise ValueError(f"row {self.name!r} repeats a setting: {', '.join(self.repeats)}")
        if moved := [s for s in self.repeats if s.startswith("evals.")]:
            raise ValueError(
                f"row {self.name!r} repeats {moved[0]}, an evaluation of its own; all rows are "
                "measured alike, so vary a step or the calibration"
            )
        try:
            self.runs()
        except ValueError as error:
            raise ValueError(f"row {self.name!r}: {error}") from None

    def runs(self) -> list[tuple[str | None, Recipe]]:
        """The setting that a run is made with (None for none), and its recipe."""
        if not self.repeats:
            return [(None, self.recipe)]
        return [(setting, override(self.recipe, [setting])) for setting in self.repeats]


@dataclasses.dataclass(frozen=True)
class Study:
    """One model, a grid of recipes, and how they are measured.

    Attributes:
      model: what `jaxcomp.load` takes.
      rows: the recipes, as rows or as a dict of name → Recipe.
      evals: run on the model itself, once, and on every row.
      title: over the table and the picture.
      show: numbers that are columns and panels, as "perplexity" or, to pick one evaluation's,
        "perplexity wiki_eval @1024: nll"; () is the first number of every evaluation.
      compute_dtype: of activations and products.
      keep_artefacts: keep the compressed models too, not only their reports.
      along: a label of the rows whose values are numbers, such as how many blocks were removed; a
        second picture shows what was found along it, a curve for each group.
    """

    model: str
    rows: tuple[StudyRow, ...] | Mapping[str, Recipe]
    evals: tuple[Any, ...]
    title: str = ""
    show: tuple[str, ...] = ()
    compute_dtype: str = "float32"
    keep_artefacts: bool = False
    along: str = ""

    def __post_init__(self):
        if isinstance(self.rows, Mapping):
            rows = tuple(StudyRow(name, recipe) for name, recipe in self.rows.items())
            object.__setattr__(self, "rows", rows)
        rows = self.rows
        if not (isinstance(rows, tuple) and rows and all(isinstance(r, StudyRow) for r in rows)):
            raise ValueError(
                f"rows={rows!r:.80} must be a tuple of at least one StudyRow, or a dict of name → "
                "Recipe"
            )
        names = [row.name for row in rows]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two rows are called {twice[0]!r}; give each a name of its own")
        if self.along and not any(self.along in row.labels for row in rows):
            raise ValueError(f"along={self.along!r} is a label of no row")
        for row in rows:
            if self.along in row.labels and not _is_number(row.labels[self.along]):
                raise ValueError(
                    f"row {row.name!r} has {row.labels[self.along]!r} for {self.along!r}, and what "
                    "a study goes along are numbers"
                )
        if not self.evals:
            raise ValueError("evals=() measures nothing; give at least one, as (Perplexity(),)")
        alike = [
            dataclasses.replace(r, recipe=dataclasses.replace(r.recipe, evals=self.evals))
            for r in rows
        ]
        object.__setattr__(self, "rows", tuple(alike))


def load_study(path: str | pathlib.Path) -> Study:
    """Reads a study from a Python file with a function `study()`.

    Raises:
      ValueError: no such file, an error inside it, no `study` function, or one that returns
        something else.
    """
    path = pathlib.Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"there is no study file {path}; give a .py file with a function study()")
    return call_config(path, "study", Study)


def with_settings(study: Study, settings: Iterable[str]) -> tuple[Study, list[str]]:
    """The study with a setting replaced in every recipe that has it, as `calib.samples=8`.

    `evals.0.tokens=…` is a setting of the evaluations that all rows share.

    Returns:
      the new study, and a line for each setting that some of the rows do not have.

    Raises:
      ValueError: no row has the setting, or the value does not fit.
    """
    notes = []
    for setting in settings:
        words = setting.partition("=")[0].split(".")
        if words[0] == "evals":
            new = override(Recipe(evals=study.evals), [setting]).evals
            study = dataclasses.replace(study, evals=new)
            continue
        reach = {row.name: _reach(row.recipe, words) for row in study.rows}
        if max(reach.values()) < len(words):  # let the row that comes closest say what is wrong
            override(max(study.rows, key=lambda row: reach[row.name]).recipe, [setting])
        rows = [
            dataclasses.replace(row, recipe=override(row.recipe, [setting]))
            if reach[row.name] == len(words)
            else row
            for row in study.rows
        ]
        if without := [name for name, depth in reach.items() if depth < len(words)]:
            notes.append(f"{setting} is no setting of {', '.join(without)}")
        study = dataclasses.replace(study, rows=tuple(rows))
    return study, notes


def chosen(study: Study, only: Iterable[str]) -> tuple[StudyRow, ...]:
    """The rows called `only`, or all of them.

    Raises:
      ValueError: a name that no row has; the message lists the names.
    """
    only, names = list(only), [row.name for row in study.rows]
    for name in only:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            guess = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"there is no row {name!r}{guess} The rows are: {', '.join(names)}")
    return tuple(row for row in study.rows if not only or row.name in only)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _reach(holder: Any, words: list[str]) -> int:
    """How many of the words of a setting's path lead to something that is there."""
    for depth, word in enumerate(words):
        if dataclasses.is_dataclass(holder) and word in {
            f.name for f in dataclasses.fields(holder)
        }:
            holder = getattr(holder, word)
        elif isinstance(holder, tuple) and word.isdigit() and int(word) < len(holder):
            holder = holder[int(word)]
        elif isinstance(holder, Mapping) and word in holder:
            holder = holder[word]
        else:
            return depth
        if holder is None and depth + 1 < len(words):
            return depth
    return len(words)
