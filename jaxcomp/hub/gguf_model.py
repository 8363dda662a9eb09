"""A GGUF file as the Hugging Face model it was made from: its config, names and row order.

Every `<architecture>.*` key is used, harmless, or refused by name, as in a `config.json`.
Source: llama.cpp's `convert_hf_to_gguf` read backwards.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from jaxcomp.core.tensorfile import TensorSpec
from jaxcomp.hub.gguf import PLAIN, GGUFFile
from jaxcomp.hub.gguf_dialects import DIALECTS, ROPE_FACTORS, hf_name
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.families.fields import Fields
from jaxcomp.models.families.rope_fields import DEFAULT_THETA

HARMLESS = frozenset({"rope.scaling.finetuned"})
LLAMA3_CONTEXT = 8192  # of the released Llama 3.1 config; only ratios to it matter
FREQ_TOLERANCE = 1e-5  # relative error of a recovered divisor; they are float32


class GGUFTensors:
    """The tensors of a GGUF file under Hugging Face names and in its row order.

    llama.cpp rotates neighbouring channels where Hugging Face rotates channel i with i + dim/2, so
    converters of architecture "llama" reorder the rows of q and k within each head: `[2, dim/2]`
    becomes `[dim/2, 2]`. Here it is undone, and so is what is added to the norms of Gemma. Names
    without a translation are left as they are.

    Attributes:
      specs: Hugging Face name → shape and dtype as `rows` gives them.
      files, where: the file; its path for messages.
    """

    def __init__(self, file: GGUFFile, head_dim: int):
        self.where, self.files = str(file.path), (file.path,)
        self._file = file
        architecture = file.metadata["general.architecture"]
        dialect = DIALECTS[architecture]
        self._names = {hf_name(name, dialect) or name: name for name in file.tensors}
        for name in dialect.said:
            self._names.pop(name, None)
        self._head_dim, self._norm_shift = head_dim, dialect.norm_shift
        self._interleaved = architecture == "llama"
        self.specs = {
            name: TensorSpec(t.shape, PLAIN.get(t.type, PLAIN["F32"]))
            for name, t in ((name, file.tensors[stored]) for name, stored in self._names.items())
        }

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the tensor `name`."""
        stored = self._names[name]
        if self._norm_shift and name.endswith("norm.weight"):
            rows = self._file.rows(stored, start, stop)
            return (rows.astype(np.float32) - self._norm_shift).astype(rows.dtype)
        if not self._interleaved or (".attn_q." not in stored and ".attn_k." not in stored):
            return self._file.rows(stored, start, stop)
        dim = self._head_dim
        wanted = np.arange(*slice(start, stop).indices(self.specs[name].shape[0]))
        head, channel = wanted // dim * dim, wanted % dim
        source = head + channel % (dim // 2) * 2 + channel // (dim // 2)
        first = int(head[0])
        return self._file.rows(stored, first, int(head[-1]) + dim)[source - first]


def hf_config(file: GGUFFile, allow: Collection[str] = ()) -> dict[str, Any]:
    """The config of the model in `file`.

    Args:
      file: an open GGUF file.
      allow: unknown keys, without the architecture's prefix, that the caller vouches for.

    Raises:
      ValueError: an architecture or key this library does not have, a missing one, or one that
        disagrees with the tensors.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in DIALECTS:
        raise ValueError(
            f"{file.path}: general.architecture={architecture!r} is not supported; "
            f"there is {', '.join(DIALECTS)}"
        )
    dialect = DIALECTS[architecture]
    if file.metadata.get("split.count", 1) != 1:
        raise ValueError(
            f"{file.path}: the file is one of {file.metadata['split.count']} parts; merge them "
            "with llama-gguf-split --merge"
        )
    prefix = f"{architecture}."
    values = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    fields = Fields(values, f"{file.path}: metadata {architecture}.*")
    for name in ("expert_count", "expert_used_count"):
        if fields.integer(name, 0, least=0):
            raise ValueError(
                f"{fields.where}: {name}={values[name]}: mixtures of experts are not read from "
                "GGUF; use the model's Hugging Face directory"
            )
    if not fields.flag("attention.causal", True):
        raise ValueError(
            f"{fields.where}: attention.causal is false, and only causal models are read"
        )
    d_model, n_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", d_model // n_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if dialect.partial and name == "rope.dimension_count":
            continue
        if fields.integer(name, head_dim) != head_dim:
            raise ValueError(
                f"{fields.where}: {name}={values[name]} differs from a head's {head_dim} channels, "
                "and only equal ones are supported"
            )
    context = fields.integer("context_length")
    config = {
        "architectures": [FAMILIES[dialect.family].ARCHITECTURE],
        "model_type": dialect.family,
        "hidden_size": d_model,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "vocab_size": _vocab_size(file, fields),
        "rope_parameters": _rope(file, fields, head_dim, context),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if architecture != "qwen2":  # whose biases are not a choice
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    config |= dialect.config(file, fields, config) | _token_ids(file)
    fields.finish(HARMLESS, allow)
    return config


def _vocab_size(file: GGUFFile, fields: Fields) -> int:
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing; convert it again")
    rows = file.tensors["token_embd.weight"].shape[0]
    if fields.integer("vocab_size", rows) != rows:
        raise ValueError(
            f"{fields.where}: vocab_size={fields.get('vocab_size')} and tensor 'token_embd.weight' "
            f"has {rows} rows; convert the model again"
        )
    return rows


def _token_ids(file: GGUFFile) -> dict[str, Any]:
    of = file.metadata.get
    ends = [of("tokenizer.ggml.eos_token_id"), of("tokenizer.ggml.eot_token_id")]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    found = {"bos_token_id": of("tokenizer.ggml.bos_token_id"), "eos_token_id": ends or None}
    return {name: value for name, value in found.items() if value is not None}


def _rope(file: GGUFFile, fields: Fields, head_dim: int, context: int) -> dict[str, Any]:
    theta = fields.number("rope.freq_base", DEFAULT_THETA)
    kind = fields.get("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", None)
    original = fields.integer("rope.scaling.original_context_length", None)
    has_freqs = "rope_freqs.weight" in file.tensors
    if kind == "longrope" and file.tensors.keys() & set(ROPE_FACTORS.values()):
        kind = "none"  # the architecture that has these tensors reads them
    if kind not in ("none", "linear", "yarn") or (has_freqs and kind != "none"):
        raise ValueError(
            f"{fields.where}: rope.scaling.type={kind!r}{' with rope_freqs' * has_freqs} is not "
            "supported; there is none, linear, yarn, and none with rope_freqs (Llama 3)"
        )
    rope = {"rope_type": "default", "rope_theta": theta}
    if has_freqs:
        n = math.prod(file.tensors["rope_freqs.weight"].shape)
        rope |= llama3_scaling(file.rows("rope_freqs.weight", 0, n), theta, head_dim, file)
    elif kind != "none":
        rope |= {"rope_type": kind, "factor": 1.0 if factor is None else factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = original or context
    return rope


def llama3_scaling(
    divisors: np.ndarray, theta: float, head_dim: int, file: GGUFFile
) -> dict[str, Any]:
    """The llama3 scaling that divides the frequency of channel pair i by `divisors[i]`.

    With f the unscaled frequency, 1/divisor = s + (1 − s)/factor, where s is
    (context·f/2π − low)/(high − low) clipped to 0..1. So the largest divisor is the factor, and
    between the borders s is a line in f whose slope and intercept give low/context and
    high/context, which is all that matters.

    Raises:
      ValueError: the divisors are no such function.
    """
    divisors = np.asarray(divisors, np.float64)
    freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if divisors.shape != freq.shape or not (divisors >= 1 - FREQ_TOLERANCE).all():
        raise ValueError(
            f"{file.path}: tensor 'rope_freqs.weight' must hold {len(freq)} divisors of at least "
            f"1, found {divisors.size} from {divisors.min():g} on; convert the model again"
        )
    factor = float(np.round(divisors.max(), 4))
    turns = LLAMA3_CONTEXT * freq / (2 * np.pi)
    borders = [(1.0, 4.0)]  # the release's, taken where they fit
    inside = (divisors > 1 + FREQ_TOLERANCE) & (divisors < factor * (1 - FREQ_TOLERANCE))
    if inside.sum() >= 2:
        smooth = (1 / divisors[inside] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(turns[inside], smooth, 1)
        borders.append((float(-offset / slope), float((1 - offset) / slope)))
    for low, high in borders:
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        made = 1 / (smooth + (1 - smooth) / factor)
        if np.allclose(made, divisors, rtol=FREQ_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": LLAMA3_CONTEXT,
            }
    raise ValueError(
        f"{file.path}: tensor 'rope_freqs.weight' is no Llama 3 scaling, the only kind supported; "
        "use the model's Hugging Face directory"
    )
