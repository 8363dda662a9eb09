"""Export format `gguf`: one file `model.gguf` for llama.cpp and all that reads its files.

Codes are moved into the storage types of `gguf_blocks` and never rounded again where a type holds
their grid; what that cost, and every tensor that no type holds, is said in the notes. llama.cpp
multiplies weights with float activations and keeps floats in its cache, so a model with transforms
or quantizers at its sites is refused.

Where llama.cpp leaves the model beyond some length (windows that its architecture does not have,
dynamic NTK) the file's context ends there, and a note says so.

Source: llama.cpp's `convert_hf_to_gguf` for keys, names and the order of rows.
"""

import collections
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxcomp.core.quantize import QTensor, dequantize
from jaxcomp.hub.dense import parts, structures
from jaxcomp.hub.gguf_blocks import (
    BLOCK,
    FLOATS,
    Loss,
    encode_dense,
    encode_grid,
    grid_type,
    loss,
    take_columns,
)
from jaxcomp.hub.gguf_container import Entry, write_gguf
from jaxcomp.hub.gguf_dialects import DIALECTS, gguf_name
from jaxcomp.hub.gguf_keys import context_length, llama3_divisors, model_keys, rope_keys
from jaxcomp.hub.gguf_notes import changes, contents
from jaxcomp.hub.gguf_tokenizer import build_tokenizer
from jaxcomp.hub.gguf_vocab import PROBE, vocabulary
from jaxcomp.hub.names import ARCHITECTURES, Architecture
from jaxcomp.hub.stock import Leaf, gather, stock
from jaxcomp.hub.tokenizer import load_tokenizer
from jaxcomp.hub.write import ExportSource
from jaxcomp.models.attention import GQA
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.families.template import stored_shape, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LOAD = "llama-cli -m {out}/model.gguf"
FILE = "model.gguf"
DENSE = ("stored", *FLOATS, "Q8_0")
FALLBACK = "F16"  # of a quantized weight whose grid no type holds
FREQS = "rope_freqs.weight"
CHUNK = 2**22  # elements of a weight in float32 at a time


class Planned(NamedTuple):
    """A tensor to be written.

    Attributes:
      entry: its place in the table.
      paths: the leaves it is made of.
      transpose: they lie as `[in_ch, out_ch]`, and rows of the file are their columns.
      on_grid: codes are kept, as the type holds their grid.
      note: what happens to the numbers; empty where they are stored as they are.
    """

    entry: Entry
    paths: tuple[str, ...]
    transpose: bool
    on_grid: bool
    note: str


def check(model: Decoder, hf_config: dict[str, Any]) -> None:
    """Raises ValueError where llama.cpp would not compute what the model computes."""
    arch = _architecture(model)
    stock(model, hf_config)
    blocks = [block_struct(block) for block in model.blocks]
    for i, block in enumerate(blocks):
        _check_sites(block, f"block {i}")
        if block.ffn.activation != "silu":
            raise ValueError(
                f"block {i} has the activation {block.ffn.activation} and {arch.name} of llama.cpp "
                "has silu"
            )
        if not arch.biases and (block.attn.q.b is not None or block.ffn.gate.b is not None):
            raise ValueError(f"block {i} has biases and {arch.name} of llama.cpp has none")
        if arch.square and block.attn.q.w.shape[-1] != model.config.d_model:
            raise ValueError(
                f"block {i} has {block.attn.n_heads} heads of {block.attn.head_dim} channels, and "
                f"{arch.name} of llama.cpp makes them of {model.config.d_model}"
            )
    rope_keys(blocks[0].attn.rope, arch)
    if not arch.tied and model.lm_head is None:
        raise ValueError(f"the head is the embedding, and {arch.name} of llama.cpp has its own")


def write(source: ExportSource, out: Path, *, dense: str = "stored") -> list[str]:
    """Writes `out/model.gguf`.

    Args:
      source: a model that `check` lets pass.
      out: an existing directory.
      dense: storage type of matrices that are not quantized, F32, F16, BF16 or Q8_0; "stored" keeps
        what they have. Given, it is also the type of quantized ones whose grid no type holds, which
        are F16 otherwise. Norms and biases are always F32.

    Returns:
      What the user should know: types and sizes, and what lost something.

    Raises:
      ValueError: an unknown type, a number beyond its range, or a tokenizer that GGUF cannot hold.
    """
    if dense not in DENSE:
        raise ValueError(f"dense={dense!r} is no storage type; there is {', '.join(DENSE)}")
    check(source.model, source.hf_config)
    model, arch = source.model, _architecture(source.model)
    structs = [block_struct(block) for block in model.blocks]
    attn, found = structs[0].attn, stock(model, source.hf_config)
    plans = [_plan(*part, arch, dense) for part in structures(model, found)]
    entries = [tensor.entry for plan in plans for tensor in plan]
    has_freqs = attn.rope.kind == "llama3"
    if has_freqs:
        entries.insert(0, Entry(FREQS, (attn.head_dim // 2,), "F32"))
    tokenizer = load_tokenizer(source.tokenizer)
    keys = model_keys(model.config, structs, model.norm.eps, arch, _main_type(plans[1:]))
    keys |= vocabulary(tokenizer, model.config)
    losses: dict[str, Loss] = {}

    def data() -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        if has_freqs:
            yield FREQS, [llama3_divisors(attn.rope, attn.head_dim)]
        for plan, tree in zip(plans, parts(source), strict=True):
            for tensor in plan:
                leaf, rows = gather(tree, tensor.paths), _row_order(tensor.entry, arch, attn)
                yield tensor.entry.name, _pieces(leaf, rows, tensor, losses)

    write_gguf(out / FILE, keys, entries, data())
    _check_tokenizer(out / FILE, tokenizer)
    done = {t.entry.name: t.note for plan in plans for t in plan if t.note}
    notes = [contents(out / FILE, entries), *changes(done, losses)]
    context = context_length(model.config, structs)
    if context < model.config.context_length:
        notes.append(
            f"The file's context ends at {context} tokens instead of {model.config.context_length}:"
            " beyond them the model limits attention or stretches positions as llama.cpp cannot."
        )
    if len(ends := model.config.eos_token_ids) > 2:
        notes.append(f"Of the {len(ends)} tokens that end a text the file names two.")
    return notes


def _architecture(model: Decoder) -> Architecture:
    family = model.config.family
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{family} is not written to GGUF here; there is {', '.join(ARCHITECTURES)}. Export it "
            "as hf and convert that directory with llama.cpp's convert_hf_to_gguf.py"
        )
    return ARCHITECTURES[family]


def _check_sites(block: Block, where: str) -> None:
    for name, site in block.sites.items():
        if site.transforms:
            what = f"a transform ({type(site.transforms[0]).__name__})"
        elif site.quantizer is not None:
            what = f"a quantizer ({site.quantizer.spec})"
        else:
            continue
        raise ValueError(
            f"{where} has {what} at {name}, and llama.cpp has float activations, a float cache and "
            "no transform of either; quantize weights alone (act=None, kv=None) by a method that "
            "leaves nothing online (RTN, GPTQ, AWQ)"
        )


def _plan(tree: Any, template: Any, arch: Architecture, dense: str) -> list[Planned]:
    """The tensors of a part of the model; reads none of them."""
    plan = []
    for name, params in stored_tensors(template).items():
        shape, stored = stored_shape(params), gguf_name(name, DIALECTS[arch.name])
        assert stored is not None, f"no GGUF name for {name}"
        leaf = gather(tree, params)
        kind, on_grid, note = _storage(leaf, shape, dense)
        transpose = isinstance(leaf, QTensor) or any(p.transpose for p in params.values())
        plan.append(Planned(Entry(stored, shape, kind), tuple(params), transpose, on_grid, note))
    return plan


def _storage(leaf: Leaf, shape: tuple[int, ...], dense: str) -> tuple[str, bool, str]:
    """The storage type of a leaf, whether that keeps its codes, and what to say about it."""
    if len(shape) == 1:
        return "F32", False, ""
    own, why = None, ""
    if isinstance(leaf, QTensor):
        kind, why = grid_type(leaf)
        if kind is not None:
            return kind, True, "codes kept, scales rounded to float16"
        kind, why = FALLBACK if dense == "stored" else dense, f", as {why}"
    else:
        own = next(name for name, dtype in FLOATS.items() if dtype == leaf.dtype)
        kind = own if dense == "stored" else dense
    if kind == "Q8_0" and shape[-1] % BLOCK:
        kind, why = FALLBACK, f", as its rows of {shape[-1]} are no whole blocks of {BLOCK}"
    return kind, False, "" if kind == own else f"written as {kind}{why}"


def _row_order(entry: Entry, arch: Architecture, attn: GQA) -> Int[np.ndarray, " rows"]:
    """Which of our rows each row of the file is.

    llama.cpp turns neighbouring channels where Hugging Face turns channel i with i + dim/2, so q
    and k of architecture "llama" have the rows of each head reordered from `[2, dim/2]` to
    `[dim/2, 2]`.
    """
    rows = np.arange(entry.shape[0])
    if not arch.interleaved or not re.search(r"\.attn_[qk]\.", entry.name):
        return rows
    heads = rows.reshape(-1, 2, attn.head_dim // 2)
    return heads.swapaxes(1, 2).reshape(-1)


def _pieces(
    leaf: Leaf, rows: Int[np.ndarray, " rows"], tensor: Planned, losses: dict[str, Loss]
) -> Iterator[np.ndarray]:
    """The bytes of a tensor, a few rows at a time, and in `losses` what they lost."""
    (name, shape, kind), total = tensor.entry, Loss()
    step = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if isinstance(leaf, QTensor):
            weight = take_columns(leaf, part)
            if tensor.on_grid:
                raw = encode_grid(weight, kind)
            else:
                raw = encode_dense(np.asarray(dequantize(weight)).T, kind)
        else:
            weight = np.asarray(leaf[..., part]).T if tensor.transpose else np.asarray(leaf[part])
            raw = encode_dense(weight, kind)
        if raw.dtype != getattr(weight, "dtype", None):
            total += loss(raw, kind, weight)
        yield raw
    losses[name] = total


def _main_type(plans: list[list[Planned]]) -> str:
    """The storage type of most weights of the blocks."""
    count: collections.Counter[str] = collections.Counter()
    for tensor in itertools.chain.from_iterable(plans):
        if len(tensor.entry.shape) > 1:
            count[tensor.entry.type] += int(np.prod(tensor.entry.shape))
    return count.most_common(1)[0][0]


def _check_tokenizer(path: Path, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Reads the tokenizer of the file and compares it with the one it was made of.

    Raises:
      ValueError: they give different tokens.
    """
    again = build_tokenizer(path).backend_tokenizer
    special = "".join(dict.fromkeys(map(str, tokenizer.all_special_tokens)))
    for text in (PROBE, f"a{special} b"):
        wanted = tokenizer.backend_tokenizer.encode(text).ids
        if (found := again.encode(text).ids) != wanted:
            at = next(i for i, (a, b) in enumerate(itertools.zip_longest(wanted, found)) if a != b)
            raise ValueError(
                f"the tokenizer in the file gives other tokens than the model's own (from token "
                f"{at} of {text[:40]!r}... on): GGUF cannot hold it; convert the exported hf "
                "directory with llama.cpp's convert_hf_to_gguf.py instead"
            )
