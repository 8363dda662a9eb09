"""`kron_matmul`: activations times a Kronecker product of two small matrices."""

from jaxtyping import Array, Float

from pallas_kernels.dispatch import first_supported
from pallas_kernels.kron_matmul import reference

IMPLEMENTATIONS = (reference.kron_matmul,)  # fastest first, the reference last


def kron_matmul(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
) -> Float[Array, "*tokens channels"]:
    """``x @ (left ⊗ right)``, which is ``vec(leftᵀ V right)`` with `V` `[n1, n2]` of a row of `x`.

    Args:
      x: activations, any float dtype; `channels` is n1·n2, row-major.
      left, right: the factors; None is the identity that fills up to `channels`, so that
        ``left=None`` transforms every run of n2 channels alike and ``right=None`` mixes the runs.

    Returns:
      The product in the dtype of `x`; each factor's product is accumulated in float32.

    Raises:
      ValueError: the factors do not multiply to `channels`.
    """
    channels = x.shape[-1]
    n1, n2 = (1 if m is None else m.shape[0] for m in (left, right))
    fits = channels % (n1 * n2) == 0 if left is None or right is None else channels == n1 * n2
    if not fits:
        raise ValueError(f"factors of orders {n1} and {n2} do not make {channels} channels")
    return first_supported(IMPLEMENTATIONS, x, left, right)
