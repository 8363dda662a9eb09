"""Hadamard matrices of every order that Sylvester's and Paley's constructions reach, no tables.

A Hadamard matrix has entries ±1 and orthogonal rows, H Hᵀ = n·I. With χ the quadratic character of
the field of q elements and Q[a, b] = χ(a − b):
    Paley I    order q + 1,     q ≡ 3 (mod 4):  I + [[0, 1], [−1, Q]]
    Paley II   order 2(q + 1),  q ≡ 1 (mod 4):  each entry of [[0, 1], [1, Q]] becomes a 2 × 2 block
    Sylvester  order 2n from n:                 H ⊗ [[1, 1], [1, −1]]
Fields of p^m elements are polynomials modulo an irreducible one, found by search.

Source: Paley, J. Math. Phys. 12 (1933). Orders that need other constructions (Williamson: 92, 116;
428 = 4·107) are refused.
"""

import functools
import itertools
import math

import numpy as np
from jaxtyping import Int8

MAX_BASE = 2048  # largest order that is not doubled; the dense factor costs base² numbers


@functools.cache
def hadamard_base(order: int) -> int | None:
    """The smallest K with order = K·2^k that has a construction of its own; None if there is none.

    1 is the base of the powers of two.
    """
    if order < 1:
        return None
    odd, doublings = order, 0
    while odd % 2 == 0:
        odd, doublings = odd // 2, doublings + 1
    if odd == 1:
        return 1
    for k in range(2, doublings + 1):  # an order above 2 is a multiple of 4
        base = odd << k
        if base > MAX_BASE:
            return None
        if _paley_field(base) is not None:
            return base
    return None


@functools.cache
def hadamard_matrix(order: int) -> Int8[np.ndarray, "order order"]:
    """A Hadamard matrix with entries ±1: the base's matrix, doubled as often as needed.

    Raises:
      ValueError: these constructions reach no matrix of this order; the message says what to use.
    """
    base = hadamard_base(order)
    if base is None:
        raise ValueError(no_hadamard(order))
    matrix = np.ones((1, 1), np.int8) if base == 1 else _paley(base)
    while len(matrix) < order:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.int8))
    matrix.setflags(write=False)
    return matrix


def no_hadamard(order: int, instead: str | None = None) -> str:
    """Why there is no matrix of this order, and what to do; `instead` are the caller's ways out."""
    if order > 2 and order % 4:
        why = "an order above 2 is a multiple of 4"
    else:
        odd = order // (order & -order)
        why = f"odd part {odd}; tried Paley I and II at {odd}·2^k up to {MAX_BASE}"
    if instead is None:
        known = [n for n in range(order - 1, 1, -1) if order % n == 0 and hadamard_base(n)]
        instead = "a random orthogonal matrix" + (
            f", or blocks of order {known[0]}" if known else ""
        )
    return f"no Hadamard matrix of order {order} ({why}); use {instead}"


def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, m) of the field behind Paley's matrix of this order; None if there is none."""
    for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if q > 2 and q % 4 == residue and (field := _prime_power(q)):
            return field
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    m = 0
    while q % p == 0:
        q, m = q // p, m + 1
    return (p, m) if q == 1 else None


def _paley(order: int) -> np.ndarray:
    p, m = _paley_field(order)
    character = _jacobsthal(p, m)
    q = len(character)
    core = np.ones((q + 1, q + 1), np.int8)
    core[0, 0], core[1:, 1:] = 0, character
    if q % 4 == 3:
        core[1:, 0] = -1
        return core + np.eye(q + 1, dtype=np.int8)
    off_diagonal, diagonal = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    blocks = np.kron(core, off_diagonal) + np.kron(np.eye(q + 1, dtype=np.int8), diagonal)
    return blocks.astype(np.int8)


def _jacobsthal(p: int, m: int) -> np.ndarray:
    """χ(a − b) for all elements a, b of the field of p^m elements, `[q, q]` in {−1, 0, 1}."""
    places = p ** np.arange(m)
    elements = np.arange(p**m)[:, None] // places % p  # [q, m]: coefficients, lowest first
    modulus = _irreducible(p, m, elements)
    squares = _multiply(elements, elements, modulus, p) @ places
    character = np.full(p**m, -1, np.int8)
    character[squares] = 1
    character[0] = 0
    difference = (elements[:, None] - elements[None]) % p @ places
    return character[difference]


def _irreducible(p: int, m: int, elements: np.ndarray) -> np.ndarray:
    """Low coefficients of a monic irreducible polynomial of degree m over the integers mod p."""
    one = np.eye(1, m, dtype=int)
    for low in itertools.product(range(p), repeat=m):
        modulus = np.array(low)
        # In a field, and only there, x^(q−1) = 1 for every x but 0.
        power, x, exponent = np.broadcast_to(one, elements.shape), elements, p**m - 1
        while exponent:
            power = _multiply(power, x, modulus, p) if exponent & 1 else power
            x, exponent = _multiply(x, x, modulus, p), exponent >> 1
        if (power[1:] == one).all():
            return modulus
    raise AssertionError(f"no irreducible polynomial of degree {m} modulo {p}")


def _multiply(a: np.ndarray, b: np.ndarray, modulus: np.ndarray, p: int) -> np.ndarray:
    """Products of polynomials `[q, m]` modulo x^m + Σ modulus_i x^i and p."""
    m = a.shape[-1]
    product = np.zeros((len(a), 2 * m - 1), int)
    for i in range(m):
        product[:, i : i + m] += a[:, i : i + 1] * b
    for top in range(2 * m - 2, m - 1, -1):
        product[:, top - m : top] -= product[:, top : top + 1] * modulus
    return product[:, :m] % p
