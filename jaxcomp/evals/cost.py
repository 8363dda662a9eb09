"""Cost: what a model takes to hold and to run, on this machine, now.

Speed is the median of repeats after a warm-up that compiles; the prompt is random tokens, whose
values do not matter. Peak memory is VmHWM of the whole process, imports and evaluation included.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxcomp.models.decoder import Decoder, iter_blocks
from jaxcomp.models.generate import generate_greedy
from jaxcomp.models.sizes import peak_rss, sizes
from jaxcomp.models.stream import embed_batches, run_blocks


@dataclasses.dataclass(frozen=True)
class Cost:
    """Settings of a cost measurement.

    Attributes:
      prompt: tokens of the prefill that is timed.
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
        model = jax.device_put(model.replace(blocks=tuple(iter_blocks(model))))

        def prefill() -> None:
            run_blocks(model, embed_batches(model, tokens, 1))

        marks: list[float] = []

        def decode() -> None:
            marks.clear()
            generate_greedy(
                model, tokens, self.new, on_token=lambda _: marks.append(time.perf_counter())
            )

        prefill_seconds = _median(prefill, self.repeats)
        decode()
        spans = []
        for _ in range(self.repeats):
            decode()
            spans.append(marks[-1] - marks[0])  # the first token belongs to the prefill
        return {
            "bytes": size["total_bytes"],
            "bits_per_weight": size["bits_per_weight"],
            "prefill_tokens_per_s": self.prompt / prefill_seconds,
            "decode_tokens_per_s": (self.new - 1) / statistics.median(spans),
            "peak_rss_bytes": peak_rss(),
        }


def _median(run: Callable[[], None], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
