"""The transform at a site as one pair of factors, of the orders that the Ascend runtime fixes.

A token of n channels is viewed as `[L, R]` with L = a − b, R = a + b, for the smallest a ≥ √n with
a² − n a square b². The runtime derives the pair from n, so a transform has a place there only if it
is left ⊗ right of just these orders: a Kronecker pair fitted with them, a mix of heads where their
number divides L, any Hadamard matrix that splits between L and R, or nothing.

Source: `get_decompose_dim` of vllm-ascend; limits of torch_npu's `npu_kronecker_quant`.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.transforms import Kron, Transform, transform

LARGEST = 256  # order of a factor
PACKED = 8  # codes of an int32: channels, and the order of the right factor, are multiples of it
TOLERANCE = 1e-5  # relative error of the product of the factors


def runtime_pair(n: int) -> tuple[int, int]:
    """(L, R) of n channels.

    Raises:
      ValueError: the kernel does not take so many channels.
    """
    if n % PACKED:
        raise ValueError(f"{n} channels are no multiple of {PACKED}, which the kernel packs")
    a = math.isqrt(n - 1) + 1
    while math.isqrt(a * a - n) ** 2 != a * a - n:
        a += 1
    b = math.isqrt(a * a - n)
    left, right = a - b, a + b
    if right > LARGEST or right % PACKED:
        raise ValueError(
            f"{n} channels are viewed as {left}·{right} by the runtime, whose kernel takes factors "
            f"up to {LARGEST}, the right one a multiple of {PACKED}"
        )
    return left, right


def find_factors(transforms: Sequence[Transform], n: int) -> Kron | None:
    """Left and right of the runtime's orders with (left ⊗ right) = T₁T₂…, None if there are none.

    With T = A ⊗ B, T's row (i, k) is A's row i ⊗ B's row k: the rows (·, k) and (i, ·) through one
    large entry give A and B, and tokens at random tell whether T is their product.

    Args:
      transforms: with arrays, or with structs: then for factors as good as any of these shapes.
      n: channels.

    Raises:
      ValueError: see `runtime_pair`.
    """
    pair, first = runtime_pair(n), transforms[0] if len(transforms) == 1 else None
    if isinstance(first, Kron) and pair == tuple(
        None if m is None else m.shape[0] for m in (first.left, first.right)
    ):
        return first  # as it is, unrounded
    return _search(transforms, *pair)


def _search(transforms: Sequence[Transform], left: int, right: int) -> Kron | None:
    rng = np.random.default_rng(0)
    drawn = lambda a: rng.standard_normal(a.shape, np.float32) if _is_struct(a) else a  # noqa: E731
    transforms = [jax.tree.map(drawn, t) for t in transforms]

    def enter(x: np.ndarray) -> np.ndarray:
        y = functools.reduce(lambda x, t: transform(t, x), transforms, jnp.asarray(x))
        return np.asarray(y).reshape(len(x), left, right)

    n = left * right
    eye = lambda rows: np.eye(n, dtype=np.float32)[rows]  # noqa: E731
    over_right = enter(eye(np.arange(right)))  # rows (0, k): A[0, j] B[k, l]
    k, j, column = np.unravel_index(np.argmax(np.abs(over_right)), over_right.shape)
    over_left = enter(eye(np.arange(left) * right + k))  # rows (i, k): A[i, j] B[k, l]
    a = over_left[:, :, column] / over_right[k, j, column]
    b = over_right[:, j, :]
    size = np.sqrt(left) / np.linalg.norm(a)  # rows of A have length 1, as those of a rotation
    found = Kron((a * size).astype(np.float32), (b / size).astype(np.float32))
    x = rng.standard_normal((8, n)).astype(np.float32)
    wanted, got = enter(x), np.asarray(transform(found, jnp.asarray(x))).reshape(8, left, right)
    close = np.linalg.norm(got - wanted) < TOLERANCE * np.linalg.norm(wanted)
    return found if close else None


def _is_struct(leaf: object) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
