"""Training a whole model on a teacher's words: gradients, partitions, resuming, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration, Run, StepStore
from jaxcomp.calibrate.descent import (
    Descent,
    Student,
    loss_and_gradients,
    loss_of,
    optimiser,
    update,
)
from jaxcomp.calibrate.distillation import Lesson, distil
from jaxcomp.calibrate.losses import Targets, TopKLoss, distillation_loss
from jaxcomp.calibrate.teacher import teacher_cache
from jaxcomp.calibrate.trainable import ENDS, Trainable, finished, merged, split
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.transforms import Kron
from jaxcomp.core.tree import named_leaves
from jaxcomp.methods import RTN
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward, forward
from jaxcomp.models.head import open_head
from jaxcomp.models.layers import embed_tokens
from jaxcomp.models.patch import Patch
from jaxcomp.parallel import data_mesh
from tests import tiny

K = 8
FIT = Descent(batch=4, lr=3e-3, validation=4, every=2, dtype="float32")
CALIB = Calibration(np.array(tiny.tokens(jax.random.key(1), 16, 16)), batch=4)


@pytest.fixture(scope="module")
def teacher():
    return tiny.model("qwen2", jax.random.key(0))  # tied, with biases


@pytest.fixture(scope="module")
def lesson(teacher, tmp_path_factory):
    cache = teacher_cache(tmp_path_factory.mktemp("cache") / "c", teacher, CALIB.tokens, K)
    return Lesson(CALIB.tokens, np.ones(CALIB.tokens.shape, bool), cache)


def pruned(teacher, patched=False):
    """The teacher's first block alone, or its last behind a patch that is the identity."""
    if not patched:
        return teacher.replace(blocks=teacher.blocks[:1])
    eye = Patch((Kron(right=jnp.eye(teacher.config.d_model)),))
    return teacher.replace(blocks=(teacher.blocks[1].replace(patch=eye),))


def taught(teacher, model, store=None, fit=FIT, train=Trainable("blocks"), progress=None, **how):
    run = Run(store and StepStore(store), progress, original=teacher)
    how = dict(loss=TopKLoss(), k=K) | how
    return distil("Distill", model, CALIB, run, train=train, fit=fit, **how)


def moved(student, scale=0.02):
    """Masters away from their first values, so that additions are not zero."""
    wave = lambda a: a + scale * jnp.sin(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)  # noqa: E731
    return student._replace(masters=jax.tree.map(wave, student.masters))


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(Trainable("all"), id="all"),
        pytest.param(Trainable("lora", (1,), rank=3), id="lora of the last block"),
        pytest.param(Trainable("norms"), id="norms", marks=pytest.mark.slow),
    ],
)
def test_gradients_block_by_block_are_those_of_the_model_at_once(train, teacher, lesson):
    student = moved(Student(*split(train, teacher, "float32")))
    tokens, targets = CALIB.tokens[:4], lesson.targets(np.arange(4))
    loss = TopKLoss("full", entropy="up", text=0.3)
    ctx, learns = plain_context(*tokens.shape), student.learns_embedding
    x = embed_tokens(teacher.embed, tokens, "float32")
    for block in teacher.blocks[: student.first]:
        x = block_forward(block, x, ctx)

    def whole(masters):
        model = merged(student.frozen.replace(blocks=()), masters.get(ENDS, {}))
        y = embed_tokens(model.embed, tokens, "float32") if learns else x
        for i in range(student.first, 2):
            y = block_forward(merged(*student._replace(masters=masters).block(i)), y, ctx)
        head, wanted = open_head(model), Targets(*map(jnp.asarray, targets))
        return distillation_loss(loss, head, y, wanted, learn_head=True)[0]

    expected = jax.value_and_grad(whole)(student.masters)
    for remat in (True, False):
        inputs = tokens if learns else x
        found = loss_and_gradients(student, student.end(), inputs, targets, loss, remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert len(jax.tree.leaves(expected[1])) == len(jax.tree.leaves(student.masters)) > 3


def test_equal_models_have_no_loss_and_no_gradient(teacher, lesson):
    student = Student(*split(Trainable("blocks"), teacher, "float32"))
    x = np.asarray(embed_tokens(teacher.embed, CALIB.tokens[:4], "float32"))
    targets = lesson.targets(np.arange(4))
    value, grads = loss_and_gradients(student, student.end(), x, targets, TopKLoss(), True)
    assert 0 <= float(value) < 1e-5  # the teacher's numbers were rounded to float16
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-2
    assert float(loss_of(student, student.end(), x, targets, TopKLoss())[0]) == pytest.approx(
        float(value), abs=1e-6
    )


@pytest.mark.parametrize("kind", ["all", "lora", "norms", "patches"])
def test_fifty_steps_lower_the_loss_and_move_nothing_else(kind, teacher):
    model = pruned(teacher, patched=kind == "patches")
    fit = dataclasses.replace(FIT, epochs=50, steps=50, every=25)
    result = taught(teacher, model, fit=fit, train=Trainable(kind, rank=4))
    about = result.rows[0].metrics
    assert np.mean(about["loss_curve"][-5:]) < 0.98 * np.mean(about["loss_curve"][:5])
    assert about["steps"] == 50 and len(about["held_out_curve"]) == 3
    before, after = named_leaves(model), named_leaves(result.model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    expected = {
        "all": set(before),
        "lora": {n for n in before if n.endswith(".w")},
        "norms": {n for n in before if "norm" in n},
        "patches": {"blocks.0.patch.transforms.0.right"},
    }
    assert changed == expected[kind]
    assert about["trained"] >= sum(before[n].size for n in changed) or kind == "lora"


def test_a_folded_addition_computes_what_was_trained(teacher):
    student = moved(Student(*split(Trainable("lora", rank=3), teacher, "float32")))
    tokens = tiny.tokens(jax.random.key(3))
    blocks = [merged(*student.block(i)) for i in range(2)]
    parts = [finished(teacher.blocks[i], student.masters[f"blocks.{i}"]) for i in range(2)]
    expected = forward(teacher.replace(blocks=tuple(blocks)), tokens)
    found = forward(teacher.replace(blocks=tuple(parts)), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert jax.tree.structure(parts[0]) == jax.tree.structure(teacher.blocks[0])
    assert float(jnp.abs(expected - forward(teacher, tokens)).max()) > 1e-2


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_a_killed_run_gives_the_very_bits_of_an_uninterrupted_one(kind, teacher, tmp_path):
    train, fit = Trainable(kind, rank=2), dataclasses.replace(FIT, epochs=2, decay_to_init=True)
    expected = taught(teacher, pruned(teacher), tmp_path / "a", fit, train)

    def kill(name, done, total, rows):
        if done == 3 and rows:  # a step past the last saved state
            raise Killed

    with pytest.raises(Killed):
        taught(teacher, pruned(teacher), tmp_path / "b", fit, train, kill)
    told = []
    watch = lambda name, done, total, rows: told.append((done, total))  # noqa: E731
    found = taught(teacher, pruned(teacher), tmp_path / "b", fit, train, watch)
    assert (2, 6) in told and (1, 6) not in told
    pairs = (
        named_leaves(r.model.replace(blocks=(r.model.blocks[0].load(),))) for r in (expected, found)
    )
    jax.tree.map(np.testing.assert_array_equal, *pairs)
    assert [r.metrics for r in found.rows] == [r.metrics for r in expected.rows]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_number(teacher):
    with pytest.raises(
        ValueError, match=r"Distill, step \d+ of 6: the loss is (nan|inf), the last"
    ):
        fit = dataclasses.replace(FIT, epochs=2, lr=1e30, clip=None)
        taught(teacher, pruned(teacher), fit=fit)


def test_decay_draws_matrices_to_zero_or_to_where_they_began():
    start = {"ends": {"w": jnp.full((2, 2), 3.0), "b": jnp.full(2, 3.0)}}
    zero = jax.tree.map(jnp.zeros_like, start)
    fit = Descent(lr=0.1, weight_decay=0.5, warmup=0, clip=None)
    for origin, expected in ((None, 3 - 0.1 * 0.5 * 3), (start, 3.0)):
        masters = jax.tree.map(jnp.array, start)
        inner = optimiser(fit, 10).init(masters)
        new, _ = update(masters, inner, zero, origin, fit=fit, steps=10)
        np.testing.assert_allclose(new["ends"]["w"], expected, rtol=1e-6)
        np.testing.assert_array_equal(new["ends"]["b"], 3.0)  # a vector


def test_the_rate_grows_then_falls_along_a_cosine_to_its_floor():
    fit, steps = Descent(lr=1e-2, warmup=0.2, floor=0.1, clip=None), 20
    rates, masters = [], {"ends": {"b": jnp.zeros(1)}}
    inner = optimiser(fit, steps).init(masters)
    for _ in range(steps):
        before, grads = float(masters["ends"]["b"][0]), {"ends": {"b": jnp.ones(1)}}
        masters, inner = update(masters, inner, grads, None, fit=fit, steps=steps)
        rates.append(before - float(masters["ends"]["b"][0]))  # Adam of a constant: the rate
    assert np.argmax(rates) == 4 and rates[4] == pytest.approx(1e-2, rel=1e-3)
    assert (np.diff(rates[:5]) > 0).all() and (np.diff(rates[4:]) < 0).all()
    assert 1e-3 < rates[-1] < 1.2e-3


def test_every_epoch_takes_every_window_once_in_an_order_of_its_own():
    order = Descent(epochs=3, batch=4).order(12)
    epochs = order.reshape(3, 12)
    assert order.shape == (9, 4) and (np.sort(epochs) == np.arange(12)).all()
    assert (epochs[0] != epochs[1]).any()
    assert len(Descent(epochs=3, steps=5).order(12)) == 5
    np.testing.assert_array_equal(order, Descent(epochs=3, batch=4).order(12))
    assert Descent(batch=5).order(12).shape == (2, 5)


def test_positions_that_do_not_count_change_nothing(teacher, monkeypatch):
    counts = np.ones(CALIB.tokens.shape, bool)
    counts[:, 12:] = False
    other = CALIB.tokens.copy()
    other[:, 12:] = 0  # padding, to the right
    losses = []
    for tokens in (CALIB.tokens, other):
        monkeypatch.setattr("tests.calibrate.test_distillation.CALIB", Calibration(tokens, 4))
        result = taught(teacher, pruned(teacher), counts=counts)
        losses.append(result.rows[0].metrics["loss_curve"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": 1}, "outside 2 to 320"),
        ({"k": 321}, "outside 2 to 320"),
        ({"fit": dataclasses.replace(FIT, validation=14)}, "2 windows to train on"),
        ({"train": Trainable("patches")}, "none of these blocks has any"),
        ({"train": Trainable("blocks", (1,))}, "no block 1 to train among 1"),
        ({"train": Trainable("lora", linears=("attn.x",))}, r"no linear 'attn.x'.*attn.q"),
        ({"counts": np.zeros((16, 16), bool)}, "step 0: none of the positions"),
        ({"counts": np.ones((16, 5), bool)}, "counts of shape"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_a_reason(settings, said, teacher):
    with pytest.raises(ValueError, match=said):
        taught(teacher, pruned(teacher), **settings)


def test_a_teacher_that_is_absent_or_speaks_other_words_is_refused(teacher):
    with pytest.raises(ValueError, match="the run has none"):
        taught(None, teacher)
    with pytest.raises(ValueError, match="320 words and the teacher's 400"):
        taught(tiny.model("qwen2", jax.random.key(0), vocab_size=400), teacher)
    with pytest.raises(ValueError, match="one device"):
        how = dict(train=Trainable("norms"), loss=TopKLoss(), fit=FIT, k=K)
        distil("Distill", teacher, CALIB, Run(mesh=data_mesh(), original=teacher), **how)


def test_quantized_weights_do_not_move_but_their_norms_may(teacher):
    rounded, _ = RTN(QuantSpec(4))(teacher, None)
    for kind in ("all", "blocks", "lora"):
        with pytest.raises(ValueError, match=r"block 0, attn\.q is quantized already.*norms"):
            taught(teacher, rounded, train=Trainable(kind))
    result = taught(teacher, rounded, train=Trainable("norms"))
    assert result.rows[0].metrics["trained"] == 5 * teacher.config.d_model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Trainable("most"), "all, blocks, lora, norms, patches"),
        (lambda: Trainable(rank=0), "below 1"),
        (lambda: Trainable(blocks=()), "None means all"),
        (lambda: Trainable(blocks=(1, 1)), "each once"),
        (lambda: Descent(dtype="float16"), "neither float32 nor bfloat16"),
        (lambda: Descent(epochs=0), "below 1"),
        (lambda: Descent(lr=0.0), "above 0"),
        (lambda: Descent(betas=(0.9, 1.0)), "outside"),
        (lambda: Descent(warmup=1.0), "does not hold"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
