"""A text by its name: bundled, in a local file, or a data set of the Hugging Face hub.

| source                                | text                                               |
|---------------------------------------|----------------------------------------------------|
| `wiki_calib`, `wiki_eval`             | bundled Wikipedia articles, read without a network |
| `wikitext2`, `c4`, `ptb`, `NAME:SPLIT`| the sets perplexity is usually quoted on           |
| `FILE.txt`, `FILE.txt.gz`             | a whole file                                       |
| `FILE.jsonl`, `FILE.jsonl.gz`         | field `text` of every line; `FILE::FIELD` another  |
| `hf:OWNER/NAME:CONFIG:SPLIT:FIELD`    | any other set; every part after the name may be    |
|                                       | empty or left out (split `train`, field `text`)    |
| `hf:FOLDER:CONFIG:SPLIT:FIELD`        | the same in a local folder with the hub's layout   |

Source: sets, splits and joining of GPTQ's data (Frantar et al., arXiv 2210.17323; the authors'
`datautils.py`, its "new" variants). Departures: C4 for calibration is its first 1,100
documents joined, as for evaluation, where the authors draw windows inside single long documents;
their cap of 256 windows belongs to the evaluation, not to the text.
"""

import dataclasses
import gzip
import hashlib
import importlib.resources
import itertools
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

DOCUMENT_BREAK = "\n\n"
FILE_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text and where it came from.

    `name` is the source as the caller wrote it; `sha256` is over the UTF-8 bytes of `text`, so two
    reports with equal hashes were measured on the same text.
    """

    name: str
    text: str = dataclasses.field(repr=False)
    sha256: str = dataclasses.field(init=False)

    def __post_init__(self):
        if not self.text.strip():
            raise ValueError(
                f"source {self.name!r} holds no text: 0 of its {len(self.text)} characters are not "
                "white space, at least 1 must be; choose another file, split or field"
            )
        digest = hashlib.sha256(self.text.encode("utf-8")).hexdigest()
        object.__setattr__(self, "sha256", digest)


@dataclasses.dataclass(frozen=True)
class Bundled:
    """A text file beside this module, in `texts/`."""

    file: str


@dataclasses.dataclass(frozen=True)
class HubSet:
    """A data set on the hub and how the field's papers make one text of it.

    `files` names a file per split where the set's own table of splits will not do; `documents`
    keeps the first so many.
    """

    path: str
    config: str | None
    splits: tuple[str, ...]  # the first is the default
    field: str = "text"
    joined_by: str = DOCUMENT_BREAK
    documents: int | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None


CORPORA: dict[str, Bundled | HubSet] = {
    "wiki_calib": Bundled("wiki_calib.txt.gz"),
    "wiki_eval": Bundled("wiki_eval.txt.gz"),
    "wikitext2": HubSet(
        path="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        splits=("test", "train", "validation"),
    ),
    "c4": HubSet(
        path="allenai/c4",
        config=None,
        splits=("validation", "train"),
        joined_by=" ",
        documents=1100,
        files={
            "validation": "en/c4-validation.00000-of-00008.json.gz",
            "train": "en/c4-train.00000-of-01024.json.gz",
        },
    ),
    "ptb": HubSet(
        path="ptb-text-only/ptb_text_only",
        config=None,
        splits=("test", "train", "validation"),
        field="sentence",
        joined_by=" ",
        # The set itself is a loading script, which `datasets` no longer runs; the hub converted it.
        revision="refs/convert/parquet",
        files={
            "test": "penn_treebank/test/0000.parquet",
            "train": "penn_treebank/train/0000.parquet",
            "validation": "penn_treebank/validation/0000.parquet",
        },
    ),
}


def load_text(source: str) -> Corpus:
    """Reads the text that `source` names; the table in this module's docstring has the forms.

    Documents are joined by an empty line (C4 and PTB by a space, as in the papers). Sets of the hub
    are kept in the cache of `datasets`, so a second call needs no network.

    Raises:
      ValueError: the name, split, configuration, field or file is not there, a line is not JSON,
        bytes are not UTF-8 or not gzip, or the text is empty.
      ConnectionError: the hub cannot be reached and the set is not in the cache.
    """
    name, _, split = source.partition(":")
    if name in CORPORA:
        return Corpus(source, _read_named(CORPORA[name], split, source))
    if source.startswith("hf:"):
        return Corpus(source, _read_hub_source(source))
    file, _, field = source.partition("::")
    if file.endswith(FILE_SUFFIXES):
        return Corpus(source, _read_file(pathlib.Path(file).expanduser(), field))
    raise ValueError(
        f"unknown source {source!r}; known names are {', '.join(CORPORA)}; a file must end in "
        f"{', '.join(FILE_SUFFIXES)}; any other data set is 'hf:OWNER/NAME:CONFIG:SPLIT:FIELD'"
    )


def _read_named(entry: Bundled | HubSet, split: str, source: str) -> str:
    splits = entry.splits if isinstance(entry, HubSet) else ()
    if split and split not in splits:
        known = f"its splits are {', '.join(splits)}" if splits else "it has no splits"
        raise ValueError(f"source {source!r} has no split {split!r}; {known}")
    if isinstance(entry, Bundled):
        file = importlib.resources.files(__package__) / "texts" / entry.file
        return _decode(file.read_bytes(), entry.file)
    return _read_hub_set(entry, split or splits[0], source)


# Local files


def _read_file(path: pathlib.Path, field: str) -> str:
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}; give the path of an existing file")
    text = _decode(path.read_bytes(), str(path))
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return DOCUMENT_BREAK.join(_parse_lines(text, field or "text", path))
    if field:
        raise ValueError(
            f"{str(path)!r} is plain text and has no field {field!r}; "
            "drop '::FIELD' or give a .jsonl file"
        )
    return text


def _decode(raw: bytes, file: str) -> str:
    """Unpacks gzip by the file's name and decodes UTF-8, dropping a byte order mark."""
    if file.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{file!r} is not a whole gzip file ({error}); "
                "pack it again, or drop '.gz' from the name if it is not packed"
            ) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file!r} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}; "
            "convert it first, for instance with iconv -t UTF-8"
        ) from error


def _parse_lines(text: str, field: str, path: pathlib.Path) -> Iterator[str]:
    # Not splitlines(): a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{str(path)!r} line {number} is not JSON ({error.msg} at column {error.colno}); "
                "put one object on each line"
            ) from error
        yield _pick_field(record, field, f"{str(path)!r} line {number}", "FILE::FIELD")


def _pick_field(record: Any, field: str, where: str, form: str) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{where} is {type(record).__name__}, not an object with a field {field!r}"
        )
    if field not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise ValueError(
            f"{where} has no field {field!r}; its fields are {known}: choose by {form!r}"
        )
    if not isinstance(record[field], str):
        raise ValueError(
            f"{where} has {type(record[field]).__name__} in field {field!r}, not a string; "
            f"choose another by {form!r}"
        )
    return record[field]


# Data sets of the hub


def _read_hub_source(source: str) -> str:
    """Reads `hf:PATH[:CONFIG][:SPLIT][:FIELD]`; an empty part takes its default."""
    path, *rest = source.removeprefix("hf:").split(":")
    if not path or len(rest) > 3:
        raise ValueError(
            f"cannot read {source!r}: it must have 1 to 4 parts after 'hf:', the first not empty; "
            "write hf:OWNER/NAME[:CONFIG][:SPLIT][:FIELD]"
        )
    config, split, field = (*rest, "", "", "")[:3]
    split = split or "train"
    entry = HubSet(path, config or None, splits=(split,), field=field or "text")
    return _read_hub_set(entry, split, source)


def _read_hub_set(entry: HubSet, split: str, source: str) -> str:
    where = f"data set {source!r}, split {split!r}"
    rows = itertools.islice(_open_rows(entry, split, source), entry.documents)
    form = "hf:OWNER/NAME:CONFIG:SPLIT:FIELD"
    return entry.joined_by.join(_pick_field(row, entry.field, where, form) for row in rows)


def _open_rows(entry: HubSet, split: str, source: str) -> Iterable[Mapping[str, Any]]:
    """Opens the rows of one split; a local folder is streamed, so nothing of it is cached."""
    from datasets import load_dataset

    folder = pathlib.Path(entry.path).expanduser()
    is_local = folder.is_dir()
    if not is_local and entry.path.startswith(("/", ".", "~")):
        raise ValueError(f"no folder {entry.path!r} for source {source!r}; give an existing folder")
    # In a folder without the hub's README a configuration is simply the folder of its name.
    is_folder = is_local and entry.config is not None and (folder / entry.config).is_dir()
    try:
        return load_dataset(
            str(folder) if is_local else entry.path,
            name=None if is_folder else entry.config,
            data_dir=entry.config if is_folder else None,
            data_files=None if entry.files is None else {split: entry.files[split]},
            revision=entry.revision,
            split=split,
            streaming=is_local,
        )
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"cannot read {source!r}, configuration {entry.config!r}, split {split!r}: {error}; "
            "write hf:OWNER/NAME:CONFIG:SPLIT with a configuration and a split that it has"
        ) from error
    except Exception as error:  # the hub's clients raise many kinds when there is no network
        raise ConnectionError(
            f"cannot reach the hub for {source!r} ({entry.path}): {error}; connect and run it once "
            "to fill the cache, or copy the set's folder and give 'hf:FOLDER:CONFIG:SPLIT:FIELD'"
        ) from error
