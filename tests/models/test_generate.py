import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.store import save_tree
from jaxcomp.methods import RTN
from jaxcomp.models import generate as generate_module
from jaxcomp.models.decoder import forward, map_blocks
from jaxcomp.models.generate import generate_greedy
from tests import tiny

NEW = 5
logits_of = jax.jit(forward)


@pytest.fixture(scope="module", params=["mistral", "qwen2"])
def model(request):
    return tiny.model(request.param, jax.random.key(0))


def greedy(model, prompt, new=NEW):
    """One whole forward a token, no cache; padded to one length, which causality makes harmless."""
    ids = list(map(int, prompt))
    for _ in range(new):
        padded = jnp.asarray([ids + [0] * (24 - len(ids))], jnp.int32)
        ids.append(int(jnp.argmax(logits_of(model, padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def test_each_token_is_the_most_likely_one_of_the_whole_forward(model):
    prompts = np.asarray(tiny.tokens(jax.random.key(1), 2, 9))
    found = generate_greedy(model, prompts, NEW)
    assert found.dtype == np.int32
    assert found.tolist() == [greedy(model, prompt) for prompt in prompts]


def test_prompts_padded_on_the_left_are_answered_as_if_alone(model):
    prompts = np.asarray(tiny.tokens(jax.random.key(2), 2, 9))
    valid = np.ones((2, 9), bool)
    valid[1, :4] = False
    found = generate_greedy(model, prompts, NEW, valid=valid)
    assert found.tolist() == [greedy(model, prompts[0]), greedy(model, prompts[1, 4:])]


def test_a_sequence_ends_at_any_end_token_and_is_filled_with_the_first(model):
    prompts = np.asarray(tiny.tokens(jax.random.key(1), 2, 9))
    free = generate_greedy(model, prompts, NEW)
    stop = int(free[0, 2])
    first = [list(row).index(stop) if stop in row else NEW for row in free]
    shown = []
    found = generate_greedy(model, prompts, NEW, eos_ids=(1, stop), on_token=shown.append)
    assert found.shape[1] == min(NEW, max(first) + 1)
    for row, end, before in zip(found, first, free, strict=True):
        assert row[: end + 1].tolist() == before[: end + 1].tolist()[: len(row)]
        assert set(row[end + 1 :]) <= {1}
    np.testing.assert_array_equal(np.stack(shown, 1), found)


def test_generation_stops_early_when_all_are_over(model):
    prompt = np.asarray(tiny.tokens(jax.random.key(1), 1, 9))
    first = int(generate_greedy(model, prompt, NEW)[0, 0])
    assert generate_greedy(model, prompt, NEW, eos_ids=(first,)).tolist() == [[first]]


def test_prompts_of_one_bucket_share_their_compilations(model):
    step = generate_module._next_token
    generate_greedy(model, np.asarray(tiny.tokens(jax.random.key(1), 1, 9)), 2)
    before = step._cache_size()
    for time in (3, 20, 40):
        generate_greedy(model, np.asarray(tiny.tokens(jax.random.key(1), 1, time)), 3)
    assert step._cache_size() == before


def test_a_quantized_model_behind_handles_generates_like_its_own_forward(tmp_path):
    model = tiny.model("mistral", jax.random.key(0))
    small = RTN(QuantSpec(bits=4, group_size=16))(model).model
    stored = map_blocks(small, lambda _, b: b, lambda i, b: save_tree(tmp_path / f"{i}", b))
    prompt = np.asarray(tiny.tokens(jax.random.key(3), 1, 9))
    assert generate_greedy(stored, prompt, 3)[0].tolist() == greedy(small, prompt[0], 3)


@pytest.mark.parametrize(
    ("time", "new", "message"),
    [
        (0, 3, "prompt has no tokens; give at least one"),
        (60, 5, r"60 tokens and max_tokens=5 .*context of 64; max_tokens may be 1\.\.4"),
        (9, 0, r"max_tokens=0 .*may be 1\.\.55"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(time, new, message, model):
    with pytest.raises(ValueError, match=message):
        generate_greedy(model, np.zeros((1, time), np.int32), new)
