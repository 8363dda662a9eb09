"""Choose one option for every item: the least total loss within a budget of total cost.

The multiple-choice knapsack problem, solved on its frontier: after each item, the pairs
(cost, loss) that no other choice so far beats in both, less those that leave too little for the
items to come. The answer is optimal while the frontier has at most `limit` points, which it has
when costs are multiples of a common unit, as the sizes of a model's linears are. A wider one is
thinned to the best point of each of `limit` intervals of cost.

Source: Dudzinski and Walukiewicz, "Exact methods for the knapsack problem and its generalizations",
EJOR 28 (1987), dominance and feasibility.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Real

LIMIT = 100_000


def choose(
    costs: Sequence[Real[np.ndarray, " _"]],
    losses: Sequence[Real[np.ndarray, " _"]],
    budget: float,
    limit: int = LIMIT,
) -> list[int]:
    """The chosen option of each item.

    Args:
      costs, losses: of every option of every item; losses may be negative.
      budget: what the chosen costs may come to.

    Raises:
      ValueError: no choice is within the budget; names the least cost.
    """
    least = [min(options) for options in costs]
    if sum(least) > budget:
        raise ValueError(f"the cheapest options together cost {sum(least):g}, above {budget:g}")
    cost, loss, path = np.zeros(1), np.zeros(1), []
    for i, (more, worse) in enumerate(zip(costs, losses, strict=True)):
        total = np.add.outer(cost, np.asarray(more, float)).ravel()
        value = np.add.outer(loss, np.asarray(worse, float)).ravel()
        fits = np.flatnonzero(total + sum(least[i + 1 :]) <= budget)
        kept = fits[_frontier(total[fits], value[fits])]
        if len(kept) > limit:
            kept = _thin(kept, total, value, limit)
        cost, loss = total[kept], value[kept]
        path.append((kept // len(more), kept % len(more)))
    at, chosen = int(np.argmin(loss)), []
    for parents, options in reversed(path):
        chosen.append(int(options[at]))
        at = parents[at]
    return chosen[::-1]


def _frontier(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the points that none beats, in order of cost."""
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    return order[np.concatenate([[True], best[1:] < best[:-1]])]


def _thin(kept: np.ndarray, cost: np.ndarray, loss: np.ndarray, limit: int) -> np.ndarray:
    """Of each of `limit` equal intervals of cost the last point, which has the least loss."""
    low, high = cost[kept[0]], cost[kept[-1]]
    cell = np.minimum((cost[kept] - low) / (high - low) * limit, limit - 1).astype(int)
    last = np.concatenate([cell[1:] != cell[:-1], [True]])
    return kept[last]
