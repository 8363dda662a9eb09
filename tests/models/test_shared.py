import numpy as np
import pytest

from jaxcomp.models.shared import padded, share

WORDS = dict(the=1, cat=2, sat=3, ran=4, a=5, dog=6)


def texts(*lines):
    return [np.array([WORDS[word] for word in line.split()], np.int32) for line in lines]


def many(seed):
    """Texts over an alphabet of two, so that they begin alike in many ways; each once."""
    rng = np.random.default_rng(seed)
    drawn = {tuple(rng.integers(0, 2, rng.integers(1, 12))) for _ in range(60)}
    return [np.array(text, np.int32) for text in sorted(drawn, key=lambda _: rng.random())]


def seen(positions, ends):
    """Which slots each slot sees, by the rule that attention applies."""
    slots = np.arange(len(ends))
    return (slots[None, :] <= slots[:, None]) & (slots[:, None] < ends[None, :])


def test_the_example_of_the_module():
    [s] = share(texts("a dog ran", "the cat sat", "the cat ran"), 100)
    assert s.tokens.tolist() == [*texts("the cat sat ran a dog ran")[0]]
    assert s.positions.tolist() == [0, 1, 2, 2, 0, 1, 2]
    assert s.ends.tolist() == [4, 4, 3, 4, 7, 7, 7]
    assert {i: a.tolist() for i, a in s.slots.items()} == {1: [0, 1, 2], 2: [0, 1, 3], 0: [4, 5, 6]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [1, 12, 40, 1000])
def test_a_token_sees_what_stands_before_it_in_its_text_and_nothing_else(seed, capacity):
    given = many(seed)
    found = share(given, capacity)
    assert sorted(i for s in found for i in s.slots) == list(range(len(given)))
    for s in found:
        visible = seen(s.positions, s.ends)
        for i, slots in s.slots.items():
            np.testing.assert_array_equal(s.tokens[slots], given[i])
            np.testing.assert_array_equal(s.positions[slots], np.arange(len(slots)))
            for n, slot in enumerate(slots):
                np.testing.assert_array_equal(np.flatnonzero(visible[slot]), slots[: n + 1])
        assert len(s.tokens) <= capacity or len(s.slots) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_sequence_holds_every_prefix_once(seed):
    given = many(seed)
    [s] = share(given, 1000)
    prefixes = {tuple(text[:n]) for text in given for n in range(1, len(text) + 1)}
    assert len(s.tokens) == len(prefixes)


def test_padding_sees_itself_and_is_not_seen():
    [s] = share(texts("the cat", "a dog"), 100)
    tokens, context = padded([s], 2, 6)
    assert tokens.shape == context.positions.shape == (2, 6)
    visible = seen(context.positions[0], np.asarray(context.ends[0]))
    np.testing.assert_array_equal(visible[4:], np.eye(6, dtype=bool)[4:])
    np.testing.assert_array_equal(
        seen(context.positions[1], np.asarray(context.ends[1])), np.eye(6, dtype=bool)
    )
