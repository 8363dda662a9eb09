"""Gold answers: how many bits a byte of the right answer costs the model.

This tells small models apart on problems that they cannot solve: a solution that is read, not
written, still has a likelihood.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jaxcomp.data.tasks import load_task, sample_name
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.likelihood import pair_requests, score
from jaxcomp.models.text import split_pair


@dataclasses.dataclass(frozen=True)
class Gold:
    """Settings of a measurement on gold answers.

    Attributes:
      task: a name, folder or file that `jaxcomp.data.tasks` knows; of choices the right one counts.
      limit: items to score, the first of a shuffle; None for all.
      seed: of the shuffle.
      batch: so many of the longest answers are as much as a compiled call works on.
    """

    task: str
    limit: int | None = None
    seed: int = 0
    batch: int = 4

    def __post_init__(self):
        sample_name(self.task, self.limit, self.seed)  # refuses what makes no sense

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"gold {sample_name(self.task, self.limit, self.seed)}"

    def __call__(
        self,
        model: Decoder,
        encode: Callable[[str], np.ndarray],
        progress: Callable = lambda x, **_: x,
    ) -> dict[str, int | float]:
        """Bits a byte over all answers together, with its standard error, and perplexity a token.

        The standard error is that of the ratio of the two sums over items, to first order; it is
        left out for a single item. `truncated` counts answers whose context was cut at the left.

        Raises:
          ValueError: the task cannot be read, or a likelihood is not finite.
        """
        items = load_task(self.task).sample(self.limit, self.seed)
        pairs = [item.choices[item.gold] for item in items]
        requests = pair_requests(model.config, encode, pairs)
        nats = -score(model, requests, self.batch, progress).log_likelihood
        sizes = np.array([len(split_pair(*pair)[1].encode()) for pair in pairs])
        bits, tokens = nats / math.log(2), sum(len(r.targets) for r in requests)
        ratio = float(bits.sum() / sizes.sum())
        numbers = {"bits_per_byte": ratio}
        if (n := len(items)) > 1:
            spread = math.sqrt(np.sum((bits - ratio * sizes) ** 2) / (n * (n - 1)))
            numbers["bits_per_byte_stderr"] = spread / float(sizes.mean())
        return numbers | {
            "perplexity": math.exp(min(nats.sum() / tokens, 700.0)),
            "items": n,
            "tokens": tokens,
            "bytes": int(sizes.sum()),
            "truncated": sum(request.cut > 0 for request in requests),
        }
