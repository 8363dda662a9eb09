"""Bad input through the main job: an error with the value, the limit and the way out, and no OUT.

What the readers refuse by themselves is tested beside them (tests/hub, tests/test_artefact.py).
"""

import errno
import json
import random

import jax
import numpy as np
import pytest

import jaxcomp
from jaxcomp import artefact
from jaxcomp.core import store
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.evals import Perplexity
from jaxcomp.methods import GPTQ, RTN
from jaxcomp.models.families import FAMILIES
from jaxcomp.recipe import CalibSpec, Recipe
from tests import tiny

ROUND = Recipe(steps=(RTN(),))


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny checkpoint of three blocks and a text of some 400 tokens."""
    tiny.checkpoint("llama", jax.random.key(0), tmp_path / "model", num_hidden_layers=3)
    words = random.Random(0).choices(" ".join(tiny.SENTENCES).split(), k=300)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return tmp_path


def solving(place, **calib):
    return Recipe(
        steps=(GPTQ(act_order=False),),
        calib=CalibSpec(str(place / "text.txt"), **{"samples": 2, "length": 16, **calib}),
    )


def refuse(place, recipe, *words, error=ValueError, **options):
    """The message of the error that compressing must raise; `words` are in it in this order."""
    with pytest.raises(error) as caught:
        jaxcomp.compress(place / "model", recipe, place / "out", **options)
    message, at = str(caught.value), 0
    for word in words:
        assert word in message[at:], f"{word!r} is not in {message[at:]!r}"
        at = message.index(word, at) + len(word)
    assert not (place / "out").exists()
    return message


def test_a_text_shorter_than_a_window_to_calibrate_on(place):
    message = refuse(
        place, solving(place, length=5000), "tokens", "length=5000", "use a longer text"
    )
    assert "5001" in message  # what the two windows need


def test_a_text_shorter_than_a_window_to_evaluate_on(place):
    evals = (Perplexity(str(place / "text.txt"), context=3000),)
    refuse(place, Recipe(evals=evals), "tokens", "context=3000", "smaller context")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("method", ["RTN", "GPTQ"])
def test_a_weight_that_is_no_number_names_block_and_leaf(method, value, place):
    tensors = tiny.hf_tensors("llama", jax.random.key(0), num_hidden_layers=3)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][2, 3] = value
    tiny.write_weights(place / "model", tensors)
    recipe = ROUND if method == "RTN" else solving(place)
    refuse(
        place,
        recipe,
        "block 1",
        "attn.o.w",
        "1 of 1024 values",
        "NaN or infinity",
        "fetch it again",
    )


def test_a_group_size_that_does_not_divide(place):
    recipe = Recipe(steps=(RTN(QuantSpec(4, group_size=24)),))
    refuse(
        place, recipe, "in_ch=32", "group_size=24", "group_size=None", "a divisor of 32", "16, 32"
    )


@pytest.mark.parametrize("bits", [1, 9, 4.0])
def test_bits_out_of_range(bits):
    with pytest.raises(
        ValueError, match=rf"bits={bits} is outside 2\.\.8; .*leave the tensor alone"
    ):
        QuantSpec(bits=bits)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(place):
    tiny.checkpoint("llama", jax.random.key(0), place / "model", vocab_size=100)
    refuse(place, solving(place), "gives id", "100 rows", "tokenizer is of another model")


def test_rows_that_no_token_uses_are_normal(place):
    tiny.checkpoint("llama", jax.random.key(0), place / "model", vocab_size=400)
    jaxcomp.compress(place / "model", solving(place), place / "out")
    assert artefact.load(place / "out").embed.weight.shape[0] == 400


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_that_holds_something_else_is_not_touched(overwrite, place):
    out = place / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"out holds thesis\.tex .*nothing there is touched"):
        jaxcomp.compress(place / "model", ROUND, out, overwrite=overwrite)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    assert sorted(p.name for p in place.iterdir()) == ["model", "out", "text.txt"]


def test_an_output_that_is_a_file_is_not_touched(place):
    (place / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file; name a directory"):
        jaxcomp.compress(place / "model", ROUND, place / "out", overwrite=True)
    assert (place / "out").read_text() == "mine"


def test_an_architecture_that_is_not_supported_lists_those_that_are(place):
    config = json.loads((place / "model" / "config.json").read_text())
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (place / "model" / "config.json").write_text(json.dumps(config))
    message = refuse(place, ROUND, "GPT2LMHeadModel")
    assert all(module.ARCHITECTURE in message for module in FAMILIES.values())


def test_a_method_that_needs_text_says_how_to_give_it(place):
    refuse(place, Recipe(steps=(GPTQ(),)), "GPTQ needs calibration text", "CalibSpec")


def test_a_second_quantization_of_the_same_weights_is_refused(place):
    recipe = solving(place)
    recipe = Recipe(steps=(RTN(), *recipe.steps), calib=recipe.calib)
    refuse(place, recipe, "block 0, attn.q is already quantized to 4 bits", "as it was")


def full_at(monkeypatch, what):
    """A disk that is full as soon as `what` is written for the second block, or at the end."""
    calls = []

    def fail(real, when):
        def write(*args, **kwargs):
            calls.append(args)
            if len(calls) == when:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return write

    if what == "a block":
        monkeypatch.setattr(store, "write_arrays", fail(store.write_arrays, 2))
    elif what == "hidden states":
        monkeypatch.setattr(np, "savez", fail(np.savez, 2))
    elif what == "the root":  # embedding and head, after the blocks
        monkeypatch.setattr(store, "write_arrays", fail(store.write_arrays, 4))
    else:
        monkeypatch.setattr(artefact, "write_sealed", fail(artefact.write_sealed, 1))


@pytest.mark.parametrize("what", ["a block", "hidden states", "the root", "the manifest"])
def test_a_full_disk_leaves_nothing_half_written_and_the_run_continues(what, place, monkeypatch):
    with monkeypatch.context() as patch:
        full_at(patch, what)
        refuse(place, solving(place), str(place), "free some", error=OSError)
    assert not [p for p in place.rglob("*") if p.name.endswith(".tmp")]
    done = json.loads((place / "out.partial" / "step.0" / "state.json").read_text())["done"]
    assert done == (1 if what in ("a block", "hidden states") else 3)
    jaxcomp.compress(place / "model", solving(place), place / "out")
    jaxcomp.compress(place / "model", solving(place), place / "plain")
    assert artefact.leaf_hashes(place / "out") == artefact.leaf_hashes(place / "plain")
