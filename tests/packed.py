"""Packed checkpoints of tiny models, written from what the formats say of themselves.

Nothing here shares code with the readers: codes become words through Python's integers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp.core.tensorfile import TensorFile
from tests import tiny

KEY = jax.random.key(0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word, lowest first


class Codes(NamedTuple):
    """A weight on a grid: unsigned codes `[out, in]`, scale and zero point `[out, groups]`."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int

    @property
    def dense(self):
        """(code − zero)·scale in float32."""
        groups = self.scale.shape[1]
        q = self.codes.reshape(len(self.codes), groups, -1).astype(np.float32)
        w = (q - self.zero[..., None].astype(np.float32)) * self.scale[..., None]
        return w.reshape(self.codes.shape).astype(np.float32)


def quantized(w, bits, group=None, symmetric=True, zero_from=0, seed=0) -> Codes:
    """Rounds `w` `[out, in]`; asymmetric zero points are drawn from `zero_from` on."""
    grouped = w.reshape(len(w), -1, group or w.shape[1])
    half = 2 ** (bits - 1)
    scale = (np.abs(grouped).max(-1) / (half - 0.5)).astype(np.float32)
    rng = np.random.default_rng(seed)
    zero = np.full(scale.shape, half)
    if not symmetric:
        zero = rng.integers(zero_from, 2**bits, scale.shape)
    codes = np.clip(np.round(grouped / scale[..., None]) + zero[..., None], 0, 2**bits - 1)
    return Codes(codes.reshape(w.shape).astype(np.int64), scale, zero, bits)


def stream(codes, bits):
    """int32 words of a bit stream along the last axis, lowest bits first."""
    n_words = -(-codes.shape[-1] * bits // 32)
    rows = []
    for row in codes.reshape(-1, codes.shape[-1]):
        whole = sum(int(code) << (i * bits) for i, code in enumerate(row))
        rows.append([whole >> (32 * i) & 0xFFFFFFFF for i in range(n_words)])
    return np.array(rows, np.uint32).view(np.int32).reshape(*codes.shape[:-1], n_words)


def gapped(codes, bits):
    """int32 words of ⌊32/bits⌋ codes each along the last axis, the rest of a word 0."""
    per = 32 // bits
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)]
    codes = np.pad(codes, pad)
    return stream(codes.reshape(*codes.shape[:-1], -1, per), bits)[..., 0]


def awq_words(codes):
    """int32 words of eight 4-bit codes along the last axis in AWQ's order."""
    eight = codes.reshape(*codes.shape[:-1], -1, 8)
    return stream(eight[..., list(AWQ_ORDER)], 4)[..., 0]


def ct_tensors(name, q: Codes, symmetric, words=stream):
    """A module in the format "pack-quantized" of compressed-tensors."""
    tensors = {
        f"{name}.weight_packed": words(q.codes, q.bits),
        f"{name}.weight_shape": np.array(q.codes.shape, np.int64),
        f"{name}.weight_scale": q.scale,
    }
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = words(q.zero.T, q.bits).T.copy()
    return tensors


def gptq_tensors(name, q: Codes, version=1):
    """A module as AutoGPTQ (version 1) and GPTQModel (version 2) store it."""
    in_ch, groups = q.codes.shape[1], q.scale.shape[1]
    return {
        f"{name}.qweight": stream(q.codes, q.bits).T.copy(),
        f"{name}.qzeros": stream(q.zero.T - (version == 1), q.bits),
        f"{name}.scales": q.scale.T.copy(),
        f"{name}.g_idx": (np.arange(in_ch) // (in_ch // groups)).astype(np.int32),
    }


def awq_tensors(name, q: Codes):
    """A module as AutoAWQ stores it, version "gemm"."""
    return {
        f"{name}.qweight": awq_words(q.codes.T.copy()),
        f"{name}.qzeros": awq_words(q.zero.T.copy()),
        f"{name}.scales": q.scale.T.copy(),
    }


def modules(family="llama", **overrides) -> dict[str, np.ndarray]:
    """Every linear module in the blocks of a tiny model → its weight `[out, in]`."""
    tensors = tiny.hf_tensors(family, KEY, **overrides)
    return {
        name.removesuffix(".weight"): w
        for name, w in tensors.items()
        if name.endswith("proj.weight")
    }


def directory(
    place: Path,
    replaced: dict[str, dict[str, np.ndarray]],
    config: Any,
    family="llama",
    **overrides,
) -> Path:
    """A tiny model on disk with the tensors of some modules replaced by packed ones."""
    tensors = tiny.hf_tensors(family, KEY, **overrides)
    for name, packed in replaced.items():
        del tensors[f"{name}.weight"]
        tensors |= packed
    place.mkdir(parents=True, exist_ok=True)
    tiny.write_weights(place, tensors)
    described = tiny.hf_config(family, **overrides)
    if config is not None:
        described["quantization_config"] = config
    (place / "config.json").write_text(json.dumps(described))
    tiny.tokenizer().save_pretrained(place)
    return place


def ct_config(groups: dict[str, dict], ignore=("lm_head",), **fields) -> dict:
    """A `quantization_config` of compressed-tensors."""
    return (
        dict(
            quant_method="compressed-tensors",
            format="pack-quantized",
            quantization_status="compressed",
            config_groups=groups,
            ignore=list(ignore),
        )
        | fields
    )


def tensors_of(place: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory with one file."""
    file = TensorFile(place / "model.safetensors")
    return {name: file.read(name) for name in file.specs}


def rewrite(place: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """Applies `change` to the tensors of a directory, in place."""
    tensors = tensors_of(place)
    change(tensors)
    tiny.write_weights(place, tensors)
    return place


def config_of(place: Path) -> dict[str, Any]:
    """The `quantization_config` of a directory."""
    return json.loads((place / "config.json").read_text())["quantization_config"]


def set_config(place: Path, config: dict[str, Any] | None) -> Path:
    """Replaces the `quantization_config` of a directory; None takes it out."""
    described = json.loads((place / "config.json").read_text())
    described["quantization_config"] = config
    (place / "config.json").write_text(json.dumps(described))
    return place


def edit(place: Path, **fields: Any) -> Path:
    """Replaces fields of the `quantization_config` of a directory."""
    return set_config(place, config_of(place) | fields)
