"""Distill: train a changed model on what the original says, from its top words on disk.

The original model runs once over the calibration text, and of its next-token distribution the K
most likely words are kept. The model as the steps before left it then learns them by descent on
the whole of it:

    min over what is trained   mean over tokens  w · KL(original ‖ model)      on the K words

What is trained is all weights, those of the blocks, low-rank additions that are folded in at the
end (LoRA), the norms, or the patches at cuts; the rest stays as it is, bit for bit. Blocks keep
their structure and their stored dtypes. Losses are `calibrate.losses`, what is trained
`calibrate.trainable`, the descent `calibrate.descent`, the teacher on disk `calibrate.teacher`.

Source: the offline distillation of Chen et al., LinearPatch, arXiv 2505.24680, and of Yuan et al.,
E³-Pruner, arXiv 2511.17205. Departures: the mass outside the K words is one more outcome (without
it, `TopKLoss("renorm")`, nothing keeps the model from words that the teacher would not say), and
windows are set aside to watch the loss on text that is not trained on. They come from the same text
as the others and may overlap them.
"""

import dataclasses
from typing import Any, ClassVar

from jaxcomp.calibrate.descent import Descent
from jaxcomp.calibrate.distillation import distil, plan_distillation
from jaxcomp.calibrate.losses import TopKLoss
from jaxcomp.calibrate.plan import ModelPlan
from jaxcomp.calibrate.stream import Calibration, Result, Run
from jaxcomp.calibrate.trainable import Trainable
from jaxcomp.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Distill:
    """Settings of the distillation.

    Attributes:
      train: what is trained: "all", "blocks", "lora", "norms" or "patches"; in which blocks; the
        rank and the linears of a LoRA.
      loss: how the model is compared with the teacher's words.
      fit: epochs, rates, batch, dtype, and how often the state is saved.
      k: words of the teacher that are kept at every position; with a vocabulary of at most 65,536
        they take 4 k + 2 bytes a token, else 6 k + 2.
      cache: a directory for them that several runs may share; None keeps them with the run's
        unfinished work and removes them with it.
    """

    train: Trainable = Trainable()
    loss: TopKLoss = TopKLoss()
    fit: Descent = Descent()
    k: int = 20
    cache: str | None = None
    needs_text: ClassVar[bool] = True

    def __post_init__(self):
        if self.k < 2:
            raise ValueError(f"k={self.k} is below 2; one word has no distribution")

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        if self.k > model.config.vocab_size:
            raise ValueError(
                f"k={self.k} exceeds the vocabulary of {model.config.vocab_size} words; use less"
            )
        self.train.check(model)

    def __call__(self, model: Decoder, calib: Calibration | None, run: Run = Run()) -> Result:
        self.check(model)
        how: dict[str, Any] = dict(train=self.train, loss=self.loss, fit=self.fit)
        return distil("Distill", model, calib, run, k=self.k, cache=self.cache, **how)

    def plan_model(self, model: Decoder, hidden: Any, batches: int) -> ModelPlan:
        """The programs of the whole model, for a dry run; blocks keep their structure."""
        return plan_distillation(model, hidden, batches, self.train, self.loss, self.fit, self.k)
