"""Every form of source is read offline, and every bad one says what is wrong and what to do."""

import gzip
import hashlib
import json

import pytest

from jaxcomp.data import CORPORA, load_text


def write_lines(path, *records):
    raw = "\n".join(json.dumps(record) for record in records).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


@pytest.mark.parametrize("name", ["wiki_calib", "wiki_eval"])
def test_a_bundled_text_is_articles_that_each_start_with_their_title(name):
    corpus = load_text(name)
    assert corpus.name == name and corpus.text.startswith("= A")
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()


def test_the_bundled_texts_share_no_article():
    titles = [
        {line for line in load_text(name).text.splitlines() if line.startswith("= ")}
        for name in ("wiki_calib", "wiki_eval")
    ]
    assert titles[0] and titles[1] and not titles[0] & titles[1]


def test_the_text_stays_out_of_what_is_printed():
    assert "Albedo" not in repr(load_text("wiki_eval"))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_text_file_is_read_as_it_is(tmp_path, suffix):
    raw = "Grüße,\n\nzwei Absätze\n".encode()
    path = tmp_path / f"own{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    assert load_text(str(path)).text == raw.decode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_the_documents_of_a_jsonl_file_are_joined_by_an_empty_line(tmp_path, suffix):
    path = write_lines(tmp_path / f"own{suffix}", {"text": "one"}, {"text": "two"})
    assert load_text(path).text == "one\n\ntwo"


def test_another_field_of_a_jsonl_file_is_chosen_after_two_colons(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", {"text": "no", "body": "yes\u2028still one line"})
    assert load_text(f"{path}::body").text == "yes\u2028still one line"


def test_equal_texts_have_equal_hashes_wherever_they_came_from(tmp_path):
    (tmp_path / "own.txt").write_text("one\n\ntwo")
    lines = write_lines(tmp_path / "own.jsonl", {"text": "one"}, {"text": "two"})
    assert load_text(str(tmp_path / "own.txt")).sha256 == load_text(lines).sha256


def test_a_folder_in_the_layout_of_the_hub_is_read_without_a_network(tmp_path):
    write_lines(tmp_path / "train.jsonl", {"text": "for training"})
    write_lines(tmp_path / "test.jsonl", {"text": "one"}, {"text": "two"})
    assert load_text(f"hf:{tmp_path}").text == "for training"
    assert load_text(f"hf:{tmp_path}::test").text == "one\n\ntwo"


def test_a_configuration_is_a_folder_of_parquet_files_as_the_hub_stores_it(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for config in ("small", "large"):
        (tmp_path / config).mkdir()
        table = arrow.table({"sentence": [config, "end"]})
        parquet.write_table(table, tmp_path / config / "test-00000-of-00001.parquet")
    assert load_text(f"hf:{tmp_path}:large:test:sentence").text == "large\n\nend"


def test_a_configuration_is_found_in_the_readme_of_the_folder(tmp_path):
    write_lines(tmp_path / "here.jsonl", {"text": "by the card"})
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n"
        "  - split: test\n    path: here.jsonl\n---\n"
    )
    assert load_text(f"hf:{tmp_path}:small:test").text == "by the card"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("::validation", "split 'validation'.*test"),
        (":huge:test", "configuration 'huge'"),
        ("::test:body", "no field 'body'; its fields are 'text'"),
        ("::test:text:more", "1 to 4 parts"),
    ],
)
def test_what_a_folder_lacks_is_named(tmp_path, rest, message):
    write_lines(tmp_path / "test.jsonl", {"text": "one"})
    with pytest.raises(ValueError, match=message):
        load_text(f"hf:{tmp_path}{rest}")


@pytest.mark.parametrize("source", ["wikitext2", "c4:train", "ptb", "hf:owner/name:config:test"])
def test_a_set_that_cannot_be_reached_says_how_to_use_a_local_folder(source, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(path, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=rf"{source}.*no network.*hf:FOLDER"):
        load_text(source)


def test_named_sets_are_joined_as_in_the_papers(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "one", "sentence": "one"}, {"text": "two", "sentence": "two"}] * 1000
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kwargs: rows)
    assert load_text("wikitext2:train").text.startswith("one\n\ntwo")
    assert load_text("ptb").text.startswith("one two one")
    assert len(load_text("c4").text.split(" ")) == CORPORA["c4"].documents


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "wikitext3",
            "unknown source 'wikitext3'; known names are wiki_calib, wiki_eval, wikitext2",
        ),
        ("notes.md", "must end in .txt"),
        ("hf", "unknown source"),
        ("hf:", "the first not empty"),
        ("hf:./nowhere", "no folder './nowhere'"),
        ("nowhere.txt", "no file 'nowhere.txt'"),
        ("wikitext2:dev", "no split 'dev'; its splits are test, train, validation"),
        ("wiki_eval:test", "no split 'test'; it has no splits"),
    ],
)
def test_an_unknown_source_is_refused_with_what_is_known(source, message):
    with pytest.raises(ValueError, match=message):
        load_text(source)


@pytest.mark.parametrize(
    ("file", "raw", "message"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b"caf\xe9", "not UTF-8: byte 0xe9 at offset 3"),
        ("a.txt.gz", b"plain", "not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"cut off", mtime=0)[:-9], "not a whole gzip file"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": ', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}', "line 2 has no field 'text'.*'body'"),
        ("a.jsonl", b'{"text": 1}', "line 1 has int in field 'text'"),
        ("a.jsonl", b'["one"]', "line 1 is list, not an object"),
    ],
)
def test_a_bad_file_is_refused_at_the_place_that_is_bad(tmp_path, file, raw, message):
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        load_text(str(tmp_path / file))


def test_a_plain_text_file_has_no_fields(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="no field 'body'"):
        load_text(f"{tmp_path / 'a.txt'}::body")
