"""One option for every item within a budget, against trying all."""

import itertools

import numpy as np
import pytest

from jaxcomp.solvers.budget import choose


def brute_force(costs, losses, budget):
    """The least loss of all choices within the budget."""
    found = np.inf
    for options in itertools.product(*(range(len(c)) for c in costs)):
        if sum(c[o] for c, o in zip(costs, options, strict=True)) <= budget:
            found = min(found, sum(v[o] for v, o in zip(losses, options, strict=True)))
    return found


def problem(rng, whole):
    options = rng.integers(1, 5, size=6)
    costs = [rng.integers(1, 9, n) if whole else rng.random(n) for n in options]
    return costs, [rng.random(n) for n in options]


def totals(costs, losses, chosen):
    pick = lambda table: sum(row[o] for row, o in zip(table, chosen, strict=True))  # noqa: E731
    return pick(costs), pick(losses)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_budget_is_better(seed, whole):
    rng = np.random.default_rng(seed)
    costs, losses = problem(rng, whole)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = least + share * (most - least) + 1e-9
        cost, loss = totals(costs, losses, choose(costs, losses, budget))
        assert cost <= budget
        assert loss == pytest.approx(brute_force(costs, losses, budget))


def test_a_frontier_that_is_too_wide_is_thinned_and_stays_within_the_budget():
    rng = np.random.default_rng(0)
    costs = [rng.random(4) for _ in range(60)]
    losses = [np.sort(rng.random(4))[::-1] / (1 + np.argsort(np.argsort(c))) for c in costs]
    budget = 0.4 * sum(map(max, costs))
    exact = totals(costs, losses, choose(costs, losses, budget, limit=200_000))
    cost, loss = totals(costs, losses, choose(costs, losses, budget, limit=500))
    assert cost <= budget and exact[1] <= loss <= 1.02 * exact[1]


def test_a_budget_below_the_cheapest_choice_is_refused():
    with pytest.raises(ValueError, match="cheapest options together cost 5, above 4"):
        choose([np.array([2, 3]), np.array([3, 9])], [np.zeros(2)] * 2, 4.0)
