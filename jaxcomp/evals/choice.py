"""Multiple choice: the answer is the continuation to which the model gives the highest likelihood.

Likelihoods are compared as they are, or per character or byte of the choice, which does not favour
short ones.

Source: EleutherAI's evaluation harness, output type `multiple_choice` (its acc and acc_norm).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxcomp.data.tasks import load_task, sample_name
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.likelihood import pair_requests, score

RULES = {  # name of the number → what the likelihood of a choice is divided by
    "accuracy": lambda text: 1,
    "accuracy_per_char": len,
    "accuracy_per_byte": lambda text: len(text.encode()),
}


class Answers(NamedTuple):
    """What a model answered, item by item.

    Attributes:
      ids: of the items.
      gold: the index of the right choice.
      chosen: rule of `RULES` → the index of the choice with the highest likelihood.
      truncated: choices whose context was cut to fit the model.
    """

    ids: tuple[str, ...]
    gold: Int[np.ndarray, " items"]
    chosen: dict[str, Int[np.ndarray, " items"]]
    truncated: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings of a multiple-choice measurement.

    Attributes:
      task: a name, folder or file that `jaxcomp.data.tasks` knows.
      limit: items to ask, the first of a shuffle; None for all.
      seed: of the shuffle.
      batch: so many of the longest choices are as much as a compiled call works on.
    """

    task: str
    limit: int | None = None
    seed: int = 0
    batch: int = 16

    def __post_init__(self):
        sample_name(self.task, self.limit, self.seed)  # refuses what makes no sense

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"choice {sample_name(self.task, self.limit, self.seed)}"

    def __call__(
        self,
        model: Decoder,
        encode: Callable[[str], np.ndarray],
        progress: Callable = lambda x, **_: x,
    ) -> dict[str, int | float]:
        """Accuracy by each rule of `RULES` with its standard error, and the number of items.

        `truncated` counts choices whose context was cut at the left. The standard error is that of
        the mean over items, and left out for a single item.
        """
        return summary(self.answers(model, encode, progress))

    def answers(
        self,
        model: Decoder,
        encode: Callable[[str], np.ndarray],
        progress: Callable = lambda x, **_: x,
    ) -> Answers:
        """The answer to every item, for comparing models item by item.

        Raises:
          ValueError: the task cannot be read or has no choices, or a likelihood is not finite.
        """
        items = load_task(self.task).sample(self.limit, self.seed)
        if single := [item.id for item in items if len(item.choices) < 2]:
            raise ValueError(
                f"task {self.task!r} has nothing to choose from: {len(single)} of {len(items)} "
                "items have one continuation; use the evaluation Gold for it"
            )
        choices = [choice for item in items for choice in item.choices]
        requests = pair_requests(model.config, encode, choices)
        found = score(model, requests, self.batch, progress).log_likelihood
        ends = np.cumsum([len(item.choices) for item in items])[:-1]

        def best(size: Callable[[str], int]) -> np.ndarray:
            sizes = [max(size(text.removeprefix(" ")), 1) for _, text in choices]
            return np.array([np.argmax(x) for x in np.split(found / sizes, ends)])

        chosen = {rule: best(size) for rule, size in RULES.items()}
        gold = np.array([item.gold for item in items])
        cut = sum(request.cut > 0 for request in requests)
        return Answers(tuple(item.id for item in items), gold, chosen, cut)


def summary(answers: Answers) -> dict[str, int | float]:
    """The numbers of a report."""
    n, numbers = len(answers.gold), {}
    for rule, chosen in answers.chosen.items():
        mean = float(np.mean(chosen == answers.gold))
        numbers[rule] = mean
        if n > 1:
            numbers[f"{rule}_stderr"] = math.sqrt(mean * (1 - mean) / (n - 1))
    return numbers | {"items": n, "truncated": answers.truncated}


def flips(teacher: Answers, student: Answers, rule: str = "accuracy") -> dict[str, Any]:
    """Which answers changed from one model to another that was asked the same items.

    Returns:
      `items`, the two accuracies, the share of answers that are the same, and the ids of the items
      that went from right to wrong and from wrong to right.
    """
    was, now = (a.chosen[rule] == a.gold for a in (teacher, student))
    ids = np.array(teacher.ids)
    return {
        "items": len(ids),
        "teacher": float(np.mean(was)),
        "student": float(np.mean(now)),
        "same_answer": float(np.mean(teacher.chosen[rule] == student.chosen[rule])),
        "right_to_wrong": ids[was & ~now].tolist(),
        "wrong_to_right": ids[~was & now].tolist(),
    }
