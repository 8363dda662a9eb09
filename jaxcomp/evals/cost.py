"""Cost: what a model takes to hold and to run, on this machine, now.

Speed is the median of repeats after a warm-up that compiles; the prompt is random tokens, whose
values do not matter. Peak memory is VmHWM of the whole process, imports and evaluation included.
"""

import dataclasses
import statistics
from collections.abc import Callable

import numpy as np

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.generate import generate_tokens
from jaxcomp.models.prepare import prepare
from jaxcomp.models.sizes import peak_rss, sizes


@dataclasses.dataclass(frozen=True)
class Cost:
    """Settings of a cost measurement.

    Attributes:
      prompt: tokens of the prefill that is timed, up to the first new token.
      new: tokens of the greedy decoding that is timed, after the same prompt.
      repeats: timed runs of each; the median is reported.
    """

    prompt: int = 512
    new: int = 32
    repeats: int = 3
    name = "cost"  # what reports call it

    def __call__(
        self,
        model: Decoder,
        encode: Callable[[str], np.ndarray] | None = None,
        progress: Callable = lambda x, **_: x,
    ) -> dict[str, int | float]:
        """Bytes, bits a weight, prefill and decode tokens a second, peak bytes."""
        size = sizes(model)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, model.config.vocab_size, (1, self.prompt), dtype=np.int32)
        model = prepare(model)
        runs = [generate_tokens(model, tokens, self.new).speed for _ in range(self.repeats + 1)]
        prefill = statistics.median(run.first_token_seconds for run in runs[1:])
        decode = statistics.median(run.decode_seconds for run in runs[1:])
        return {
            "bytes": size["total_bytes"],
            "bits_per_weight": size["bits_per_weight"],
            "prefill_tokens_per_s": self.prompt / prefill,
            "decode_tokens_per_s": (self.new - 1) / decode,
            "peak_rss_bytes": peak_rss(),
        }
