import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import artefact
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.evals import Agreement
from jaxcomp.evals import agreement as module
from jaxcomp.evals.agreement import check_same_tokens
from jaxcomp.methods import RTN
from jaxcomp.models.decoder import forward
from tests import tiny

IDS = np.random.default_rng(0).integers(0, tiny.VOCAB, 100).astype(np.int32)


def encode(_):
    return IDS


@pytest.fixture(scope="module")
def teacher():
    return tiny.model("mistral", jax.random.key(0))


@pytest.fixture(scope="module")
def student(teacher):
    return RTN(QuantSpec(3))(teacher, None).model


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "text.txt").write_text("any")
    return Agreement(str(tmp_path / "text.txt"), context=16, tokens=50, batch=2)


def log_probabilities(model, tokens):
    logits = np.asarray(jax.jit(forward)(model, tokens), np.float64)[:, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_numbers_are_those_of_the_whole_distributions(teacher, student, settings):
    found = settings(teacher, student, encode)
    windows = settings.windows(teacher.config, encode)
    p, q = (log_probabilities(m, windows.tokens) for m in (teacher, student))
    kl = np.sum(np.exp(p) * (p - q), -1)
    scored = kl[windows.score]
    assert found["tokens"] == len(scored) == 50
    wanted = [scored.mean(), np.median(scored), np.quantile(scored, 0.99), scored.max()]
    np.testing.assert_allclose(list(found["kl"].values()), wanted, rtol=1e-3)
    same = (p.argmax(-1) == q.argmax(-1))[windows.score]
    assert found["top1"] == pytest.approx(same.mean()) and 0 < found["top1"] < 1
    gold = windows.tokens[:, 1:, None]
    nll = [-np.take_along_axis(x, gold, -1)[..., 0][windows.score].mean() for x in (p, q)]
    perplexity = found["perplexity"]
    assert perplexity["teacher"] == pytest.approx(math.exp(nll[0]), rel=1e-4)
    assert perplexity["student"] == pytest.approx(math.exp(nll[1]), rel=1e-4)
    assert perplexity["ratio"] == pytest.approx(math.exp(nll[1] - nll[0]), rel=1e-4)
    pieces = {(x["from"], x["to"]): x["mean"] for x in found["kl_by_position"]}
    assert list(pieces) == [(1, 1), (2, 3), (4, 7), (8, 15)]
    inside = np.where(windows.score, kl, np.nan)
    for (low, high), mean in pieces.items():
        assert mean == pytest.approx(np.nanmean(inside[:, low - 1 : high]), rel=1e-3)


def test_a_model_agrees_with_itself(teacher, settings):
    found = settings(teacher, teacher, encode)
    assert found["top1"] == 1 and found["kl"]["max"] < 1e-5
    assert found["perplexity"]["ratio"] == 1


def test_chunks_of_text_and_blocks_on_disk_change_nothing(
    teacher, student, settings, tmp_path, monkeypatch
):
    whole = settings(teacher, student, encode)
    for name, model in (("a", teacher), ("b", student)):
        artefact.save(model, tmp_path / name)
    lazy = [artefact.load(tmp_path / name, lazy=True) for name in ("a", "b")]
    monkeypatch.setattr(module, "CHUNK_TOKENS", 32)
    seen = []
    found = settings(*lazy, encode, lambda blocks: (seen.append(1) or b for b in blocks))
    assert len(seen) > 4 and found["kl"]["mean"] == pytest.approx(whole["kl"]["mean"], rel=1e-4)


def test_a_shorter_student_is_compared_as_well(teacher, settings):
    found = settings(teacher, teacher.replace(blocks=teacher.blocks[:1]), encode)
    assert found["kl"]["mean"] > 0.01 and found["tokens"] == 50


def test_nan_says_whose_it_is(teacher, settings):
    broken = teacher.replace(norm=teacher.norm.replace(weight=teacher.norm.weight * jnp.nan))
    with pytest.raises(ValueError, match=r"the student's loss is nan.*inspect --check"):
        settings(teacher, broken, encode)
    with pytest.raises(ValueError, match="the teacher's loss is nan"):
        settings(broken, teacher, encode)


def test_other_words_are_refused_with_what_differs(teacher, settings):
    tokenizer, other = tiny.tokenizer(), tiny.tokenizer()
    other.add_tokens(["<|more|>"])
    config = teacher.config

    def readable(config=config, tokenizer=tokenizer, encode=encode):
        model = types.SimpleNamespace(config=config)
        return types.SimpleNamespace(model=model, tokenizer=tokenizer, encode=encode)

    def refused(theirs, message):
        with pytest.raises(ValueError, match=message):
            check_same_tokens(readable(), theirs, "any")

    check_same_tokens(readable(), readable(), "any")
    larger = dataclasses.replace(config, vocab_size=400)
    refused(readable(larger), "have 320 and 400 words; only models of one vocabulary")
    refused(readable(tokenizer=other), r"differ in 1 words: '<\|more\|>' is no token and \d+")
    with_bos = dataclasses.replace(config, bos="window")
    refused(readable(with_bos), "windows begin with the tokens None and 0")
    cut = lambda _: np.concatenate([IDS[:7], IDS[9:]])  # noqa: E731
    refused(readable(encode=cut), "100 and 98 tokens, which first differ at token 7")
    refused(readable(encode=lambda _: IDS[:50]), "100 and 50 .* first differ at token 50")
    smaller = tiny.model("mistral", jax.random.key(0), vocab_size=300)
    with pytest.raises(ValueError, match="vocabularies of 320 and 300 words"):
        settings(teacher, smaller, encode)


def test_the_name_tells_text_context_and_tokens():
    assert Agreement().name == "agreement wiki_eval @1024 first 8184"
    assert Agreement("a/b.txt", 64, None).name == "agreement b.txt @64"
