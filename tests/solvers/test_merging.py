import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.solvers.merging import Mix, absorbed, merge, merge_all, merges_of_last, unmerged


def by_hand(values, merges, kind, alpha):
    """The published update, step by step, on one number a block."""
    values = list(values)
    for at, count in merges:
        part = values[at : at + count]
        if kind == "laco":
            new = part[0] + sum(w - part[0] for w in part[1:])
        elif kind == "laco_code":  # subtracts the base as it is by then
            new = part[0]
            for w in part[1:]:
                new = new + (w - new)
        else:
            new = alpha * part[0] + (1 - alpha) * part[1]
        values[at : at + count] = [new]
    return values


@st.composite
def plans(draw):
    kind = draw(st.sampled_from(["laco", "laco_code", "last"]))
    left = n = draw(st.integers(2, 9))
    merges = []
    while left > 1 and draw(st.booleans()):
        count = 2 if kind == "last" else draw(st.integers(2, left))
        merges.append((draw(st.integers(0, left - count)), count))
        left -= count - 1
    return n, merges, kind, draw(st.floats(0, 1))


@given(plans(), st.integers(0, 1000))
@settings(deadline=None, max_examples=200)
def test_weights_of_merges_of_merges_are_those_of_the_update_step_by_step(plan, seed):
    n, merges, kind, alpha = plan
    values = np.random.default_rng(seed).standard_normal(n)
    mixes = merge_all(n, merges, kind, alpha)
    found = [np.dot(values[m.first : m.first + len(m.weights)], m.weights) for m in mixes]
    np.testing.assert_allclose(found, by_hand(values, merges, kind, alpha), atol=1e-9)
    # Every block of the original is in exactly one of what is left, and weights add up to one.
    stays = [m.first for m in mixes]
    assert sorted([*stays, *absorbed(mixes)]) == list(range(n))
    np.testing.assert_allclose([sum(m.weights) for m in mixes], 1.0, atol=1e-9)


def test_two_neighbours_become_the_second_as_in_the_paper_so_in_its_code_and_three_do_not():
    two = [merge(unmerged(4), 1, 2, kind, 0.5)[1] for kind in ("laco", "laco_code")]
    assert two == [Mix(1, (0.0, 1.0))] * 2
    three = [merge(unmerged(4), 1, 3, kind, 0.5)[1] for kind in ("laco", "laco_code")]
    assert three == [Mix(1, (-1.0, 1.0, 1.0)), Mix(1, (0.0, 0.0, 1.0))]


def test_the_last_two_again_and_again_weigh_the_former_more_and_more():
    merges = merges_of_last(6, remove=3, protected=1)
    assert merges == ((3, 2), (2, 2), (1, 2))
    mixes = merge_all(6, merges, "last", 0.6)
    assert [m.first for m in mixes] == [0, 1, 5]
    np.testing.assert_allclose(mixes[1].weights, [0.6, 0.24, 0.096, 0.064])


@pytest.mark.parametrize("at, count", [(-1, 2), (3, 2), (0, 1), (0, 5)])
def test_a_merge_of_blocks_that_are_not_there_is_refused(at, count):
    with pytest.raises(ValueError, match=r"blocks 0 to 3"):
        merge(unmerged(4), at, count, "laco", 0.5)


def test_the_average_is_of_two():
    with pytest.raises(ValueError, match="two blocks at a time, not 3"):
        merge(unmerged(4), 0, 3, "last", 0.5)
