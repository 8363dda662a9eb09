import numpy as np
import pytest

from jaxcomp.core.hadamard import hadamard_base, hadamard_matrix, no_hadamard

# Widths of published models and the order whose matrix is doubled.
WIDTHS = {
    12: (1536, 12288),
    28: (896, 3584, 7168, 14336, 28672),
    20: (5120,),
    36: (18432, 576),
    52: (53248, 6656),
    344: (11008, 5504),
    108: (13824, 27648, 3456, 6912),
    140: (8960, 17920, 2240),
    148: (18944, 4736),
    76: (4864,),
    684: (10944,),
    924: (29568,),
    1: (1, 2, 64, 128, 4096),
}


@pytest.mark.parametrize("base", WIDTHS)
def test_every_width_has_its_base(base):
    assert {hadamard_base(n) for n in WIDTHS[base]} == {base}


@pytest.mark.parametrize("order", [*WIDTHS, 2, 4, 8, 24, 56, 128, 172 * 2])
def test_rows_are_orthogonal_and_entries_are_signs(order):
    h = hadamard_matrix(order)
    assert h.shape == (order, order) and h.dtype == np.int8
    assert set(np.unique(h)) <= {-1, 1}
    np.testing.assert_array_equal(h.astype(int) @ h.T.astype(int), order * np.eye(order, dtype=int))


def test_every_order_up_to_a_hundred_but_two_is_reached():
    reached = [n for n in range(4, 101, 4) if hadamard_base(n)]
    assert sorted(set(range(4, 101, 4)) - set(reached)) == [92]
    for n in reached:
        h = hadamard_matrix(n).astype(int)
        np.testing.assert_array_equal(h @ h.T, n * np.eye(n, dtype=int))


def test_a_matrix_is_shared_and_nobody_can_change_it():
    assert hadamard_matrix(12) is hadamard_matrix(12)
    with pytest.raises(ValueError, match="read-only"):
        hadamard_matrix(12)[0, 0] = 0


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (9, "order 9 .*above 2 is a multiple of 4.*use a random orthogonal matrix$"),
        (18, r"order 18 .*multiple of 4.*matrix, or blocks of order 2$"),
        (92, r"odd part 23; tried Paley I and II at 23·2\^k up to 2048\); .*blocks of order 4$"),
        (13696, "odd part 107; .*or blocks of order 128$"),
    ],
)
def test_an_order_without_a_matrix_says_why_and_what_to_use(order, why):
    assert hadamard_base(order) is None
    with pytest.raises(ValueError, match=why):
        hadamard_matrix(order)


def test_a_caller_may_name_its_own_ways_out():
    assert no_hadamard(92, "ffn=False").endswith("use ffn=False")
    assert hadamard_base(0) is None and hadamard_base(-4) is None
