"""What a student loses on the top words of a teacher, token by token.

The teacher's next-token distribution is known on a support I of K words, and by the mass outside.

    renorm   both sides renormalised on I             Σ_I p̃ (log p̃ − log q̃)
    full     probabilities over all words, and        Σ_I p (log p − log q)
             the mass outside I as one outcome           + p_rest (log p_rest − log q_rest)

`renorm` needs K logits of the student and says nothing about mass that it puts outside; `full`
needs the sum over the vocabulary. Both are 0 for equal models and not negative otherwise.

A token may weigh more by the teacher's entropy on its support, H = −Σ p̃ log p̃ / log K in [0, 1]:
w = (α + H^β) / mean(α + H^β), the mean over the tokens of the batch that count.

Source: Chen et al., LinearPatch, arXiv 2505.24680 (renorm); Yuan et al., E³-Pruner, arXiv
2511.17205 (entropy weights). The paper's formula for the weights was not available: α, β, the
direction and `mix` are reconstructions.
"""

import typing
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.core.struct import static_value
from jaxcomp.models.head import Head
from jaxcomp.models.layers import rms_norm
from jaxcomp.models.support import log_normaliser, word_logits

Support = Literal["renorm", "full"]
Entropy = Literal["none", "up", "down", "mix"]
LEAST = 1e-6  # of the student's mass outside the support: float32 cannot tell less from none


@static_value
class TopKLoss:
    """How a student is compared with the top words of its teacher.

    Attributes:
      support: "renorm" or "full"; see the module.
      entropy: which tokens weigh more: "up" those with a flat teacher, "down" those with a sharp
        one, "none"; or "mix", H · KL + (1 − H) · cross-entropy of the text, unweighted.
      alpha, beta: of the weights.
      text: factor of the cross-entropy of the text's own next token, added to the divergence.
    """

    support: Support = "full"
    entropy: Entropy = "none"
    alpha: float = 0.5
    beta: float = 1.0
    text: float = 0.0

    def __post_init__(self):
        for name, kind in (("support", Support), ("entropy", Entropy)):
            if getattr(self, name) not in typing.get_args(kind):
                known = ", ".join(typing.get_args(kind))
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")
        for name in ("alpha", "beta", "text"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} is below 0")
        if self.alpha == 0 and self.entropy in ("up", "down"):
            raise ValueError("alpha=0 leaves tokens without any weight; the default is 0.5")

    @property
    def wants_text(self) -> bool:
        """Whether the text's own next token has a part in it."""
        return self.text > 0 or self.entropy == "mix"


class Targets(NamedTuple):
    """What a batch is compared with, one entry a position.

    Attributes:
      words: the teacher's support.
      log_p: its log-probabilities there, over the whole vocabulary, in float32.
      log_rest: log of its mass outside; very negative where nothing is left.
      following: the text's next token; anything at the last position of a window.
      counts: whether the position has a part in the loss.
    """

    words: Int[Array, "batch time k"]
    log_p: Float[Array, "batch time k"]
    log_rest: Float[Array, "batch time"]
    following: Int[Array, "batch time"]
    counts: Bool[Array, "batch time"]


def distillation_loss(
    cfg: TopKLoss,
    head: Head,
    x: Float[Array, "batch time d_model"],
    targets: Targets,
    learn_head: bool = False,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The weighted mean over the positions that count, in nats, and how many they are.

    Args:
      head: of the student, in the compute dtype.
      x: the student's hidden states after its last block.
      learn_head: whether the output layer wants a gradient.
    """
    rows = rms_norm(head.norm, x).reshape(-1, x.shape[-1])
    words, log_p, log_rest, following, counts = (a.reshape(-1, *a.shape[2:]) for a in targets)
    asked = jnp.concatenate([words, following[:, None]], 1) if cfg.wants_text else words
    logits = word_logits(head, rows, asked)
    everything = None
    if cfg.support == "full" or cfg.wants_text:
        everything = log_normaliser(head, rows, learn_head)
    kl = divergence(cfg.support, log_p, log_rest, logits[:, : words.shape[1]], everything)
    loss = token_weights(cfg, log_p, counts) * kl
    if cfg.wants_text:
        time = x.shape[1]
        has_next = jnp.tile(jnp.arange(time) < time - 1, x.shape[0])
        cross = jnp.where(has_next, everything - logits[:, -1], 0.0)
        share = 1 - entropy(log_p) if cfg.entropy == "mix" else 0.0
        loss = loss + (share + cfg.text) * cross
    n = jnp.sum(counts)
    return jnp.sum(jnp.where(counts, loss, 0.0)) / jnp.maximum(n, 1), n


def divergence(
    support: Support,
    log_p: Float[Array, "rows k"],
    log_rest: Float[Array, " rows"],
    logits: Float[Array, "rows k"],
    log_normaliser: Float[Array, " rows"] | None,
) -> Float[Array, " rows"]:
    """KL(teacher ‖ student) of every token on the support, in nats.

    The teacher's outcomes are renormalised first, so that its rounding on disk cannot make the
    divergence negative.
    """
    if support == "renorm":
        p, q = jax.nn.log_softmax(log_p), jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    p = jax.nn.log_softmax(jnp.concatenate([log_p, log_rest[:, None]], -1))
    q = logits - log_normaliser[:, None]
    outside = jnp.log(jnp.maximum(1.0 - jnp.sum(jnp.exp(q), -1, keepdims=True), LEAST))
    q = jnp.concatenate([q, outside], -1)
    # Where the teacher has less outside than float32 resolves, the student is not asked either.
    gap = jnp.concatenate([p[:, :-1], jnp.maximum(p[:, -1:], jnp.log(LEAST))], -1) - q
    return jnp.sum(jnp.exp(p) * gap, axis=-1)


def entropy(log_p: Float[Array, "rows k"]) -> Float[Array, " rows"]:
    """Entropy of the teacher on its support, as a share of the largest possible, log K."""
    p = jax.nn.log_softmax(log_p)
    return -jnp.sum(jnp.exp(p) * p, axis=-1) / jnp.log(p.shape[-1])


def token_weights(
    cfg: TopKLoss, log_p: Float[Array, "rows k"], counts: Bool[Array, " rows"]
) -> Float[Array, " rows"]:
    """The weight of every token's divergence; weights have mean 1 over the tokens that count.

    With `entropy="mix"` it is H itself.
    """
    if cfg.entropy == "none":
        return jnp.ones(len(log_p))
    h = entropy(log_p)
    if cfg.entropy == "mix":
        return h
    # Not below 0 for a derivative's sake: the teacher is constant, and H of one word is exactly 0.
    h = jnp.clip(h if cfg.entropy == "up" else 1 - h, 0.0, 1.0)
    raw = cfg.alpha + h**cfg.beta
    mean = jnp.sum(jnp.where(counts, raw, 0.0)) / jnp.maximum(jnp.sum(counts), 1)
    return raw / mean
