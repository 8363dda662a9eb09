import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.calibrate.fit import FitSpec, fit_init, fit_step, optimiser, run_fit

RATES = (("slow", 0.01), ("fast", 0.1))


def quadratic(params, scale, target):
    return scale * jnp.mean((params["slow"]["a"] + params["fast"]["b"] - target) ** 2)


def broken(params, setting, target):
    return jnp.log(params["slow"]["a"][0] - 10.0) + jnp.sum(target)


def params():
    return {"slow": {"a": jnp.zeros(3)}, "fast": {"b": jnp.zeros(3)}}


BATCHES = [(np.array([1.0, 2.0, 3.0], np.float32),), (np.array([1.1, 2.1, 2.9], np.float32),)]


def test_the_fit_comes_to_lie_between_the_batches():
    spec = FitSpec(400, RATES, weight_decay=0.0)
    fitted, losses = run_fit(params(), BATCHES, (), loss=quadratic, setting=1.0, spec=spec)
    found = fitted["slow"]["a"] + fitted["fast"]["b"]
    np.testing.assert_allclose(found, np.mean(BATCHES, axis=(0, 1)), atol=0.1)
    assert len(losses) == 400 and max(losses[-2:]) < 0.01 * losses[0]


def test_the_scale_of_the_loss_does_not_matter():
    spec = FitSpec(20, RATES)
    results = [
        run_fit(params(), BATCHES, (), loss=quadratic, setting=s, spec=spec)[0] for s in (1.0, 10.0)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *results)


def test_rates_follow_a_cosine_from_each_groups_own_to_a_common_floor():
    spec = FitSpec(100, RATES, weight_decay=0.0)
    state, previous, moved = fit_init(params(), spec), params(), {}
    for i in range(100):
        state, _ = fit_step(state, BATCHES[0], loss=linear_loss, setting=None, spec=spec)
        step = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, previous)
        moved[i] = step["slow"]["a"], step["fast"]["b"]
        previous = jax.tree.map(jnp.copy, state.params)
    # With a constant gradient, Adam moves by the learning rate.
    np.testing.assert_allclose(moved[0], (0.01, 0.1), rtol=1e-3)
    np.testing.assert_allclose(moved[50], (0.005, 0.05), rtol=0.1)
    assert max(moved[99]) < 4e-5  # a hundredth of a half turn before the floor of 1e-5


def linear_loss(params, setting, target):
    return jnp.sum(params["slow"]["a"]) + jnp.sum(params["fast"]["b"]) + 100.0


def test_warm_up_starts_at_a_hundredth():
    spec = FitSpec(100, (("slow", 1.0),), warmup=10)
    updates, _ = optimiser(spec).update(
        {"slow": jnp.ones(1)},
        optimiser(spec).init({"slow": jnp.zeros(1)}),
        {"slow": jnp.zeros(1)},
    )
    np.testing.assert_allclose(updates["slow"], -0.01, rtol=1e-4)


def test_adamw_decays_by_a_hundredth_of_the_rate_and_a_base_never_moves():
    tree = {"slow": {"s": jnp.ones(2), "base": jnp.ones(2)}}
    spec = FitSpec(10, (("slow", 0.1),))
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = optimiser(spec).update(zeros, optimiser(spec).init(tree), tree)
    moved = optax.apply_updates(tree, updates)
    np.testing.assert_allclose(moved["slow"]["s"], 1 - 0.1 * 0.01, rtol=1e-6)
    assert np.array_equal(moved["slow"]["base"], np.ones(2))


def test_a_loss_that_is_not_finite_names_the_step():
    with pytest.raises(ValueError, match="step 0 of 5: the loss is nan"):
        run_fit(params(), BATCHES, (), loss=broken, setting=None, spec=FitSpec(5, RATES))


def test_the_steps_compile_once_though_parameters_start_as_python_numbers():
    fit_step.clear_cache()
    weak = {"slow": {"a": jnp.full(3, 4.0)}, "fast": {"b": jnp.full(3, 4.0)}}
    run_fit(weak, BATCHES, (), loss=quadratic, setting=1.0, spec=FitSpec(3, RATES))
    assert fit_step._cache_size() == 1
