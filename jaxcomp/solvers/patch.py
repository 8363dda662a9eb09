"""What a patch is made of: ratios of magnitudes, or a least-squares map. On the host, float64."""

import numpy as np
from jaxtyping import Float


def ratios(
    after: Float[np.ndarray, "windows channels"],
    before: Float[np.ndarray, "windows channels"],
    of_means: bool,
    eps: float = 0.0,
) -> Float[np.ndarray, " channels"]:
    """How much larger a channel is after than before, from its mean |x| in every window.

    Args:
      of_means: one ratio of the means over all windows; else the mean of the windows' ratios, which
        is what LinearPatch's code does.
      eps: added to both, for channels that are silent before.

    Raises:
      ValueError: a channel is silent before, or after; the message counts them.
    """
    if of_means:
        after, before = after.mean(0, keepdims=True), before.mean(0, keepdims=True)
    after, before = after + eps, before + eps
    silent = ~((before > np.finfo(np.float32).tiny) & (after > 0)).all(0)
    if silent.any():
        raise ValueError(
            f"{int(silent.sum())} of {silent.size} channels are 0 on one side of the cut, and have "
            "no ratio; give an eps, or more text"
        )
    return (after / before).mean(0)


def least_squares_map(
    gram: Float[np.ndarray, "channels channels"],
    cross: Float[np.ndarray, "channels channels"],
    ridge: float,
    tokens: int,
) -> Float[np.ndarray, "channels channels"]:
    """P = I + M that minimises ‖X M − D‖² + λ‖M‖², with D what is missing after X.

    Args:
      gram: XᵀX.
      cross: XᵀD.
      ridge: λ in units of the median of the diagonal of XᵀX, which one massive token does not move
        as it moves the mean.
      tokens: rows of X.

    Raises:
      ValueError: too few tokens to determine the map without a ridge.
    """
    channels = len(gram)
    if ridge == 0 and tokens < channels:
        raise ValueError(
            f"{tokens} tokens do not determine a map of {channels} channels; give a ridge, or at "
            f"least {channels} tokens"
        )
    damp = ridge * np.median(np.diagonal(gram)) * np.eye(channels)
    return np.eye(channels) + np.linalg.solve(gram + damp, cross)
