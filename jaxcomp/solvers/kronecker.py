"""How to write n channels as n1·n2 for a Kronecker transform.

The cost of x (P1 ⊗ P2) is 2n(n1 + n2) operations a token, least for the pair nearest to √n. The
largest divisor up to √n gives it for every n. (The search for n = a² − b² of FlatQuant's code sees
only factors of equal parity: it does not end for n = 2 mod 4 and finds 64·214 for 13696 = 107·128.)
"""

import math

MAX_RATIO = 32.0  # n2/n1 beyond which the transform is nearly a full matrix


def factor_pair(n: int, max_ratio: float = MAX_RATIO) -> tuple[int, int]:
    """(n1, n2) with n1·n2 = n, n1 ≤ n2 and n1 + n2 least.

    Raises:
      ValueError: the best pair is more skewed than `max_ratio`, as for a prime.
    """
    small = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    pair = small, n // small
    if pair[1] > max_ratio * pair[0]:
        raise ValueError(
            f"{n} channels have no balanced Kronecker factors: the best pair is {pair[0]}·{pair[1]}"
            f", beyond the ratio {max_ratio:g}; give this site a factor pair of your own "
            f"((1, {n}) is a full matrix) or leave it out"
        )
    return pair


def check_pair(pair: tuple[int, int], n: int) -> tuple[int, int]:
    """The pair itself.

    Raises:
      ValueError: it does not multiply to n.
    """
    if pair[0] < 1 or pair[0] * pair[1] != n:
        raise ValueError(f"factor pair {pair[0]}·{pair[1]} = {pair[0] * pair[1]} is not {n}")
    return pair
