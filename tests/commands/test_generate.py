import json

import jax
import pytest
from typer.testing import CliRunner

import jaxcomp
from jaxcomp import completion, job
from jaxcomp.__main__ import app
from jaxcomp.completion import Chat, Pieces, complete
from jaxcomp.models.sampling import Sampling
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'no' %}"
    "{{ raise_exception('no system here') }}{% endif %}"
    "{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "model"
    return tiny.checkpoint("llama", jax.random.key(0), path, max_position_embeddings=256)


@pytest.fixture(scope="module")
def loaded(place):
    return job.load(place)


@pytest.fixture
def with_template(loaded, place):
    loaded.tokenizer.chat_template = TEMPLATE
    (place / "chat_template.jinja").write_text(TEMPLATE)
    yield loaded
    loaded.tokenizer.chat_template = None
    (place / "chat_template.jinja").unlink()


def run(*arguments, text=None):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=text)


def test_a_prompt_is_continued_in_whole_pieces(place, loaded):
    pieces = []
    text = jaxcomp.generate(loaded, "In 1492", 12, on_text=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 1
    assert run(place, "-p", "In 1492", "--max-tokens", 12).output == f"In 1492{text}\n"


def test_a_character_is_shown_when_all_of_its_bytes_are_there(loaded):
    text, pieces = "aé€😀 b", []
    show = Pieces(loaded.tokenizer, pieces.append)
    for token in loaded.encode(text):
        show([token])
    assert pieces == ["a", "é", "€", "😀", " ", "b"] or pieces == ["a", "é", "€", "😀", " b"]
    show([loaded.encode("é")[0]])  # half of a character, and no more comes
    show.finish(text + "\N{REPLACEMENT CHARACTER}")
    assert "".join(pieces) == text + "\N{REPLACEMENT CHARACTER}"


def test_many_prompts_become_json_lines_in_their_order(place, loaded, tmp_path):
    prompts = ["In 1492", "The Moon", "Each block reads", "two\npeople"]
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": p}) if i % 2 else json.dumps(p) for i, p in enumerate(prompts)]
    file.write_text("\n".join(lines) + "\n")
    options = ["--batch", 2, "--max-tokens", 6, "--temperature", 0.9, "--seed", 3]
    result = run(place, "--prompts", file, "--out", out, *options)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in found] == prompts
    batches = complete(loaded, prompts, 6, sampling=Sampling(0.9, seed=3), batch=4)
    for line, wanted in zip(found, [c for done, _ in batches for c in done], strict=True):
        assert (line["text"], tuple(line["ids"])) == (wanted.text, wanted.ids)
        assert line["stop"] == ("end" if line["ids"][-1] in (1, 2) else "length")
        assert line["prompt_tokens"] == len(loaded.encode(line["prompt"]))


def test_several_prompts_are_shown_one_after_the_other(place, tmp_path):
    (tmp_path / "p.txt").write_text("In 1492\n\nThe Moon\n")
    output = run(place, "--prompts", tmp_path / "p.txt", "-p", "Each", "--max-tokens", 3).output
    places = [output.index(text) for text in ("Each", "In 1492", "The Moon")]
    assert places == sorted(places)


def test_the_numbers_are_shown_when_they_are_asked_for(place):
    output = run(place, "-p", "In 1492", "--max-tokens", 5, "--stats").output
    for name in ("prompt tokens", "first token", "decode tokens/s", "compilations", "peak memory"):
        assert name in output


def test_a_session_keeps_what_was_said_and_forgets_it_when_told(place, with_template):
    talk = Chat(with_template, system="short")
    answers = [talk.say(text, 5)[0].text for text in ("oceans", "and the Moon?")]
    whole = [m["content"] for m in talk.messages]
    assert whole == ["short", "oceans", answers[0], "and the Moon?", answers[1]]
    lines = "oceans\nand the Moon?\n\n/new\noceans\n/exit\nmore\n"
    result = run(place, "--chat", "--system", "short", "--max-tokens", 5, text=lines)
    assert result.exit_code == 0, result.output
    assert result.output == "".join(f"{text}\n" for text in (*answers, answers[0]))
    single = run(place, "--chat", "--system", "short", "-p", "oceans", "--max-tokens", 5)
    assert single.output == f"{answers[0]}\n"


def test_a_message_too_long_for_the_context_leaves_the_session_as_it_was(with_template, place):
    talk = Chat(with_template)
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens, which leave nothing"):
        talk.say("oceans " * 300)
    assert talk.messages == []
    result = run(place, "--chat", "--max-tokens", 3, text="oceans " * 300 + "\noceans\n")
    assert "/new forgets what was said" in result.output and result.exit_code == 0
    assert talk.say("oceans", 3)[0].text in result.output


def test_an_interrupted_answer_is_not_kept(with_template):
    talk = Chat(with_template)
    first = talk.say("oceans", 4)[0].text

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("the Moon", 4, interrupt)
    talk.forget()
    assert talk.say("oceans", 4)[0].text == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt; give --prompt, --prompts FILE or --chat"),
        (["-p", "a", "--top-k", 4], "--top-k is for tokens that are drawn"),
        (["-p", "a", "--system", "b"], "--system is part of a chat; add --chat"),
        (["-p", "a", "--temperature", -1], "temperature=-1.0 is not possible"),
        (["-p", "a", "--max-tokens", 999], "max_tokens=999 is not 1..255"),
        (["-p", "a", "--batch", 0], "batch=0 is below 1"),
        (["-p", "a", "-p", "oceans " * 300], "prompt 1 has"),
        (["--prompts", "absent.txt"], "there is no file of prompts absent.txt"),
        (["--chat", "--out", "o"], "--out is for prompts that are given"),
        (["--chat"], "the model has no chat template"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, place):
    result = run(place, *arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_a_template_that_refuses_the_system_message_is_a_mistake_of_the_caller(with_template):
    with pytest.raises(ValueError, match="no system here; leave the system message out"):
        completion.generate(with_template, "oceans", chat=True, system="no")


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "a"}'])
def test_a_line_that_is_no_prompt_is_named(line, place, tmp_path):
    (tmp_path / "p.jsonl").write_text(f'"a"\n\n{line}\n')
    result = run(place, "--prompts", tmp_path / "p.jsonl")
    assert result.exit_code == 2 and "p.jsonl, line 3" in "".join(result.output.split("\n"))
