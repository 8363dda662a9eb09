"""Reading a `config.json`: every field is used, known to be harmless, or refused by name.

A field that nobody here knows could change the function the model computes. It is refused unless
its value says "off" (null, false, empty) or the caller vouches for it by name.
"""

from collections.abc import Collection, Mapping
from typing import Any

REQUIRED: Any = object()

# Fields that do not change what the forward pass computes, in any family.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version _name_or_path name_or_path torch_dtype dtype
    use_cache initializer_range attention_dropout pretraining_tp pad_token_id bos_token_id
    eos_token_id tokenizer_class return_dict output_attentions output_hidden_states
    chunk_size_feed_forward id2label label2id num_labels problem_type task_specific_params
    _attn_implementation attn_implementation _attn_implementation_autoset _commit_hash
    _flash_attn_2_enabled use_flash_attention_2 unsloth_fixed unsloth_version is_llama_config
    transformers.js_config max_length min_length temperature top_k top_p do_sample num_beams
    num_beam_groups num_return_sequences length_penalty repetition_penalty typical_p
    diversity_penalty early_stopping no_repeat_ngram_size encoder_no_repeat_ngram_size
    """.split()
)


class Fields:
    """A config dict that remembers which of its fields were asked for.

    Errors name `where`, the field, the value found and what was expected.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.values, self.where = values, where
        self._used: set[str] = set()

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The field's value, whatever its type; null counts as absent."""
        self._used.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(
                f"{self.where}: {name} is missing and the model cannot be built without it; "
                "add the value it was trained with"
            )
        return default

    def integer(self, name: str, default: Any = REQUIRED, least: int = 1) -> Any:
        """A whole number of at least `least`, or the default."""
        value = self.get(name, default)
        if value is not default and (type(value) is not int or value < least):
            self._refuse(name, value, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number above 0 as a float, or the default."""
        value = self.get(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self._refuse(name, value, "a number above 0")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above 0, as floats."""
        value = self.get(name)
        good = isinstance(value, list) and len(value) == count
        if not good or not all(type(v) in (int, float) and 0 < v < float("inf") for v in value):
            found = f"{len(value)} entries" if isinstance(value, list) else value
            self._refuse(name, found, f"a list of {count} numbers above 0")
        return tuple(map(float, value))

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            self._refuse(name, value, "true or false")
        return value

    def finish(self, harmless: Collection[str] = HARMLESS, allow: Collection[str] = ()) -> None:
        """Refuses every field that was not asked for, unless it is harmless, off or in `allow`."""
        unknown = {
            name: value
            for name, value in self.values.items()
            if name not in self._used
            and name not in harmless
            and name not in allow
            and not (value is None or value is False or value in ({}, [], ""))
        }
        if unknown:
            shown = ", ".join(f"{name}={str(value)[:80]!r}" for name, value in unknown.items())
            names = ", ".join(repr(name) for name in unknown)
            raise ValueError(
                f"{self.where}: {len(unknown)} field(s) that could change the model are not "
                f"supported: {shown}. If they change nothing, vouch for them with "
                f"allow_config=({names},)"
            )

    def _refuse(self, name: str, value: Any, expected: str) -> None:
        raise ValueError(f"{self.where}: {name}={value!r} must be {expected}; correct it there")
