import pytest

from jaxcomp.solvers.kronecker import check_pair, factor_pair

# n → pair, from the widths of published models.
PAIRS = {
    896: (28, 32),
    1536: (32, 48),
    2048: (32, 64),
    3584: (56, 64),
    4096: (64, 64),
    4864: (64, 76),
    5120: (64, 80),
    7168: (64, 112),
    8192: (64, 128),
    8960: (80, 112),
    11008: (86, 128),
    12288: (96, 128),
    13696: (107, 128),
    13824: (108, 128),
    14336: (112, 128),
    18432: (128, 144),
    18944: (128, 148),
    27648: (144, 192),
    28672: (128, 224),
    29568: (168, 176),
    53248: (208, 256),
}


@pytest.mark.parametrize(("n", "pair"), PAIRS.items())
def test_widths_of_published_models_have_the_known_pairs(n, pair):
    assert factor_pair(n) == pair


def test_the_pair_is_the_cheapest_of_all_for_every_width():
    for n in range(1, 600):
        best = min(d + n // d for d in range(1, n + 1) if n % d == 0)
        n1, n2 = factor_pair(n, max_ratio=float(n))
        assert n1 * n2 == n and n1 <= n2 and n1 + n2 == best


@pytest.mark.parametrize("n", [37, 1021, 2 * 509])
def test_a_width_without_balanced_factors_is_refused_with_the_ways_out(n):
    with pytest.raises(ValueError, match=rf"{n} channels .* full matrix\) or leave it out"):
        factor_pair(n)


def test_a_pair_of_ones_own_must_multiply_to_the_width():
    assert check_pair((1, 576), 576) == (1, 576)
    with pytest.raises(ValueError, match="24·25 = 600 is not 576"):
        check_pair((24, 25), 576)
