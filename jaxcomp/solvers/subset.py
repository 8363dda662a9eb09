"""Random subsets of exactly K of n, and the gradient of a loss of them in the scores.

    z = s + γ g,   g = −log(−log u)                    one draw; γ = 1 is the Gumbel-TopK sampler
    m = the K largest z as ones                        forwards, exactly binary
    m̂ = m + ρ(z) − stop_gradient(ρ(z))                 backwards the gradient of a soft mask ρ

With γ = 1 the drawn sets have the Plackett–Luce law: K draws without replacement with weights e^s.
The soft masks, all with Σρ = K, so that a constant added to s changes nothing:

    sigmoid   ρ = σ((z − ν)/τ), ν by bisection; 0 < ρ < 1; ∂ρ_i/∂z_j = (w_i δ_ij − w_i w_j/Σw)/τ
              with w = ρ(1 − ρ)
    subset    1 − Σ_j a^j over n − K rounds a^j = softmax(r^j/τ) that choose the rest softly, one
              after another, from r¹ = −z and with r^{j+1} = r^j + log(1 − a^j); may leave [0, 1]
    softmax   K · softmax(z/τ); exceeds 1

K is data: one compiled program serves a number of ones that changes.

Sources: Kool et al., arXiv 1903.06059 (the sampler); Xie and Ermon, 1901.10517, after Plötz and
Roth, 2018 (subset; theirs chooses the ones, ours the zeros, which are fewer and where entries stay
nearer to [0, 1]); cf. Amos et al., 1906.08707 (sigmoid, as a projection onto a polytope).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Surrogate = Literal["sigmoid", "subset", "softmax"]
BISECTIONS = 60
CLIP = 2.0**-24  # of u, so that the noise is finite
SMALLEST = 1e-20  # of 1 − a; its logarithm has finite gradients in float32
NEAREST = 2.0**-24  # of ρ to 0 and 1

Scores = Float[Array, " n"]
Count = Int[Array, ""] | int
Number = Float[Array, ""] | float


def gumbel(key: Array, n: int) -> Scores:
    """Standard Gumbel noise, float32 and finite."""
    u = jnp.clip(jax.random.uniform(key, (n,), jnp.float32), CLIP, 1 - CLIP)
    return -jnp.log(-jnp.log(u))


def hard_mask(z: Scores, keep: Count) -> Scores:
    """Ones at the `keep` largest, float32; exactly so many, of equals the earlier."""
    rank = jnp.argsort(jnp.argsort(-z, stable=True), stable=True)
    return (rank < keep).astype(jnp.float32)


def straight_through(
    z: Scores, keep: Count, tau: Number, *, surrogate: Surrogate, most: int
) -> Scores:
    """`hard_mask`, exactly, with the gradient of the soft mask.

    Args:
      z: perturbed scores.
      keep: how many ones, from 1 to n − 1; may be traced.
      tau: temperature of the soft mask, above 0; may be traced.
      most: no less than n − `keep`: rounds that "subset" takes.
    """
    rho = soft_mask(z, keep, tau, surrogate=surrogate, most=most)
    # In this order: m + ρ − ρ would be m up to rounding.
    return hard_mask(z, keep) + (rho - jax.lax.stop_gradient(rho))


def soft_mask(z: Scores, keep: Count, tau: Number, *, surrogate: Surrogate, most: int) -> Scores:
    """The soft mask of `keep` ones; see `straight_through` and the top of the file."""
    if surrogate == "sigmoid":
        return sigmoid_mask(z, keep, tau)
    if surrogate == "subset":
        return 1.0 - _soft_choice(-z, len(z) - keep, tau, most)
    return keep * jax.nn.softmax(z / tau)


@jax.custom_jvp
def sigmoid_mask(z: Scores, keep: Count, tau: Number) -> Scores:
    """σ((z − ν)/τ) with the ν that makes the sum `keep`; within (0, 1)."""
    u = _centred(z, keep, tau)
    return jnp.clip(jax.nn.sigmoid(u), NEAREST, 1 - NEAREST)


@sigmoid_mask.defjvp
def _sigmoid_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    z, keep, tau = primals
    dz, _, dtau = tangents
    u = _centred(z, keep, tau)
    log_w = jax.nn.log_sigmoid(u) + jax.nn.log_sigmoid(-u)
    du = (dz - u * dtau) / tau
    # Shares of w by a softmax: Σw itself is zero in float32 where all of u is far from zero.
    mean = jnp.sum(jax.nn.softmax(log_w) * du)
    rho = jnp.clip(jax.nn.sigmoid(u), NEAREST, 1 - NEAREST)
    return rho, jnp.exp(log_w) * (du - mean)


def _centred(z: Scores, keep: Count, tau: Number) -> Scores:
    """u = (z − ν)/τ. Bisected around the middle between the last one and the first zero, where
    float32 is finest; ν is bracketed by the values that make all of ρ at least, or at most, K/n."""
    n = len(z)
    order = jnp.sort(z, descending=True)
    middle = (order[jnp.maximum(keep - 1, 0)] + order[jnp.minimum(keep, n - 1)]) / 2
    u = (z - middle) / tau
    even = jnp.log(keep / (n - keep))

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        at = (low + high) / 2
        above = jnp.sum(jax.nn.sigmoid(u - at)) > keep
        return jnp.where(above, at, low), jnp.where(above, high, at)

    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.min(u) - even, jnp.max(u) - even))
    return u - (low + high) / 2


def _soft_choice(r: Scores, choose: Count, tau: Number, most: int) -> Scores:
    """Σ_j a^j over `choose` rounds, of `most` that are computed."""

    def one(r: Array, j: Array) -> tuple[Array, Array]:
        a = jax.nn.softmax(r / tau)
        return r + jnp.log(jnp.maximum(1.0 - a, SMALLEST)), jnp.where(j < choose, a, 0.0)

    return jnp.sum(jax.lax.scan(one, r, jnp.arange(most))[1], axis=0)


@functools.partial(jax.jit, static_argnames=("surrogate", "most"))
def draw(
    scores: Scores,
    key: Array,
    keep: Count,
    tau: Number,
    gamma: Number,
    *,
    surrogate: Surrogate,
    most: int,
) -> Scores:
    """One mask with the noise `gamma` · g; its gradient in the scores is that of the soft mask."""
    z = scores + gamma * gumbel(key, len(scores))
    return straight_through(z, keep, tau, surrogate=surrogate, most=most)


def temperature(step: int, steps: int, first: float, last: float) -> float:
    """Falls geometrically from `first` to `last`."""
    return max(last, first * (last / first) ** (step / steps))


def noise(step: int, steps: int, until: float) -> float:
    """1 for the share `until` of the steps, then linearly to 0."""
    return min(1.0, (1 - step / steps) / (1 - until)) if until < 1 else 1.0


def zeros_of(step: int, steps: int, final: int, ramp: float, shape: str) -> int:
    """How many zeros the mask has: from 1 to `final` in the share `ramp` of the steps.

    Args:
      shape: "linear", or "cubic", which takes most of them early.
    """
    part = min(1.0, step / (ramp * steps)) if ramp > 0 else 1.0
    part = part if shape == "linear" else 1 - (1 - part) ** 3
    return max(1, round(final * part))
