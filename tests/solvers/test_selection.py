import numpy as np
import pytest

from jaxcomp.solvers import selection
from jaxcomp.solvers.selection import Choice, candidates

SCORES = np.array([0.0, 5.0, 1.0, 4.0, 1.0, 2.0, 0.0])


def test_the_smallest_of_those_that_may_go_are_chosen_and_the_margin_is_to_the_next():
    found = selection.smallest(SCORES, 2, candidates(7))
    assert found == Choice((2, 4), pytest.approx(0.5))
    assert selection.smallest(SCORES, 3, candidates(7, (0, 0))).removed == (0, 2, 6)
    assert selection.smallest(SCORES, 1, candidates(7, avoid=(2,))).removed == (4,)
    assert selection.smallest(SCORES, 5, candidates(7)).margin is None


def test_the_best_span_lies_between_the_protected_ends():
    sums = selection.span_sums(SCORES, 2)
    np.testing.assert_array_equal(sums, [5, 6, 5, 5, 3, 2])
    assert selection.smallest_span(sums, 2, candidates(7)) == Choice((4, 5), pytest.approx(0.4))
    assert selection.smallest_span(sums, 2, candidates(7, (1, 0))).removed == (5, 6)
    assert selection.smallest_span(sums, 2, candidates(7, avoid=(4,))).removed == (2, 3)


def test_the_controls_choose_what_they_say():
    allowed = candidates(10)
    assert selection.deepest(3, allowed, 10).removed == (6, 7, 8)
    assert selection.every_other(3, candidates(9), 9).removed == (2, 4, 6)
    picks = [selection.at_random(3, allowed, 10, seed).removed for seed in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert set(picks[0]) | set(picks[2]) <= set(allowed)


@pytest.mark.parametrize("remove", range(1, 9))
def test_every_other_block_is_as_many_as_asked_and_spread(remove):
    found = selection.every_other(remove, candidates(10), 10).removed
    assert len(set(found)) == remove and list(found) == sorted(found)
    gaps = np.diff(found)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("remove", "protect", "message"),
    [
        (0, (1, 1), "remove=0 is below 1"),
        (4, (2, 2), "remove=4, and of the 7 blocks 3 may go"),
        (7, (0, 0), "remove=7, and of the 7 blocks 7 may go"),
    ],
)
def test_numbers_that_cannot_go_are_refused(remove, protect, message):
    allowed = candidates(7, protect)
    with pytest.raises(ValueError, match=message):
        selection.smallest(SCORES, remove, allowed)
    with pytest.raises(ValueError, match=message):
        selection.deepest(remove, allowed, 7)


def test_a_span_that_fits_nowhere_is_refused():
    with pytest.raises(
        ValueError, match="nowhere may 3 neighbouring blocks go; allowed are 1, 2, 4"
    ):
        selection.smallest_span(np.zeros(5), 3, candidates(7, avoid=(3,)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_refused_by_name_unless_it_does_not_count(bad):
    scores = SCORES.copy()
    scores[0] = bad
    assert selection.smallest(scores, 1, candidates(7)).removed == (2,)
    scores[3] = bad
    with pytest.raises(ValueError, match="the score of block 3 is"):
        selection.smallest(scores, 1, candidates(7))
    with pytest.raises(ValueError, match="the span that starts at block 3 is"):
        selection.smallest_span(scores, 1, candidates(7))


def test_what_is_protected_is_two_numbers():
    for bad in ((1,), (-1, 0), (1, 1, 1)):
        with pytest.raises(ValueError, match="protect="):
            candidates(5, bad)
