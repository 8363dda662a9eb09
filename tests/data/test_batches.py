"""Windows are pieces of the text, each token counts once, and a bad cut is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.data import evaluation_windows, sample_hash, sample_windows

TEXT = np.arange(100, 1100)  # token i of the text is 100 + i, so a window shows where it was cut


def test_samples_are_different_pieces_of_the_text():
    windows = sample_windows(TEXT, samples=50, length=16, seed=0)
    assert windows.shape == (50, 16) and windows.dtype == np.int32
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    assert len(np.unique(windows[:, 0])) == 50


def test_samples_follow_the_seed_and_nothing_else():
    first, again, other = (sample_windows(TEXT, 8, 16, seed) for seed in (3, 3, 4))
    assert sample_hash(first) == sample_hash(again) != sample_hash(other)


def test_every_start_is_drawn_when_as_many_samples_are_asked_for():
    windows = sample_windows(TEXT[:13], samples=10, length=4, seed=0)
    assert sorted(windows[:, 0]) == list(TEXT[:10])


@pytest.mark.parametrize(
    ("samples", "length", "message"),
    [
        (1, 1001, "has 1000 tokens and 1 .* length=1001 need at least 1001"),
        (2, 1000, "need at least 1001"),
        (300, 16, "has 1000 tokens, fewer than a quarter of .*, 1200; .* at most 250 samples"),
        (0, 16, "samples=0 is below 1"),
        (4, 0, "length=0 is below 1"),
    ],
)
def test_a_sample_that_the_text_cannot_give_is_refused(samples, length, message):
    with pytest.raises(ValueError, match=message):
        sample_windows(TEXT, samples, length, seed=0)


def test_a_sample_hash_reads_tokens_and_shape_but_not_the_dtype():
    windows = np.arange(12).reshape(3, 4)
    assert sample_hash(windows) == sample_hash(windows.astype(">i4"))
    assert sample_hash(windows) != sample_hash(windows.reshape(4, 3))
    assert sample_hash(windows) != sample_hash(windows + 1)


def test_a_budget_of_8184_tokens_is_eight_windows_of_context_1024():
    tokens, score = evaluation_windows(np.arange(20_000), context=1024, tokens=8184)
    assert tokens.shape == (8, 1024) and score.shape == (8, 1023)
    assert tokens.dtype == np.int32 and score.dtype == bool and score.all()
    np.testing.assert_array_equal(tokens.ravel(), np.arange(8192))


def test_the_last_window_is_filled_up_and_its_filling_does_not_count():
    tokens, score = evaluation_windows(TEXT[:10], context=4)
    np.testing.assert_array_equal(tokens[-1], [TEXT[8], TEXT[9], 0, 0])
    np.testing.assert_array_equal(score[-1], [True, False, False])


def test_a_last_window_with_nothing_to_predict_is_left_out():
    tokens, _ = evaluation_windows(TEXT[:9], context=4)
    assert len(tokens) == 2


def test_a_window_that_overlaps_counts_only_what_is_new():
    tokens, score = evaluation_windows(TEXT[:8], context=4, stride=2)
    np.testing.assert_array_equal(tokens[:, 0], TEXT[[0, 2, 4]])
    np.testing.assert_array_equal(score, [[1, 1, 1], [0, 1, 1], [0, 1, 1]])


def test_a_start_token_makes_the_first_token_of_every_window_count():
    tokens, score = evaluation_windows(TEXT[:6], context=4, bos_id=7)
    np.testing.assert_array_equal(tokens, [[7, *TEXT[:3]], [7, *TEXT[3:6]]])
    assert score.all()


def test_a_budget_above_the_text_means_the_whole_text():
    whole, capped = evaluation_windows(TEXT, 64), evaluation_windows(TEXT, 64, tokens=10**6)
    np.testing.assert_array_equal(whole.score, capped.score)


@given(st.data())
def test_the_tokens_that_count_are_the_text_once_and_in_order(data):
    n = data.draw(st.integers(2, 60))
    bos_id = data.draw(st.sampled_from([None, 7]))
    body = data.draw(st.integers(2 if bos_id is None else 1, n))
    stride = data.draw(st.integers(1, body))
    budget = data.draw(st.one_of(st.none(), st.integers(1, 80)))
    context = body + (bos_id is not None)
    tokens, score = evaluation_windows(TEXT[:n], context, stride, budget, bos_id)

    # Only a window's first token can go uncounted, and only where no earlier window predicts it.
    uncounted = {0} if bos_id is None else set()
    if bos_id is None and stride == body:
        uncounted = set(range(0, n, stride))
    expected = [TEXT[i] for i in range(n) if i not in uncounted]
    np.testing.assert_array_equal(tokens[:, 1:][score], expected[:budget])
    assert score.any(axis=1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1001}, "has 1000 tokens and one window of context=1001 needs 1001"),
        ({"context": 1}, "context=1 is below 2"),
        ({"context": 64, "stride": 0}, "stride=0 is outside 1 to 64"),
        ({"context": 64, "stride": 65}, "stride=65 is outside 1 to 64"),
        ({"context": 64, "stride": 64, "bos_id": 0}, "stride=64 is outside 1 to 63"),
        ({"context": 64, "tokens": 0}, "tokens=0 is below 1"),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluation_windows(TEXT, **arguments)
