"""Damaged and lying files: an error of ours, or exactly the values that the file now holds.

Valid files are mutated at random: bits flipped, ends cut or added, stretches swapped or zeroed, and
headers that lie about lengths, counts, dtypes, shapes and offsets. What is still read is compared
with another reader of the same bytes. Where a hash covers the bytes, every change is an error.
"""

import contextlib
import json
import random
import shutil
import signal
import struct
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxcomp
from jaxcomp import artefact
from jaxcomp.core.quantize import QuantSpec, dequantize
from jaxcomp.core.tree import get_at, named_leaves
from jaxcomp.export import export
from jaxcomp.hub.names import to_gguf
from jaxcomp.hub.read import open_checkpoint
from jaxcomp.hub.write import verify_checksums
from jaxcomp.methods import RTN
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.families import template_of
from jaxcomp.recipe import Recipe
from tests import tiny

KINDS = ("safetensors", "sharded", "gguf", "compressed-tensors", "artefact")
SECONDS, BYTES = 30, 100e6  # that a case may take; the files have a few hundred kilobytes
CI_CASES, SLOW_CASES = 25, 250
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One directory of each kind; qwen2 has no permuted rows, so other readers see its layout."""
    place = tmp_path_factory.mktemp("originals")
    model = tiny.checkpoint("qwen2", KEY, place / "safetensors")
    tiny.checkpoint("qwen2", KEY, place / "sharded", shards=3)
    rtn = RTN(weight=QuantSpec(bits=4, group_size=16))
    jaxcomp.compress(model, Recipe(steps=(rtn,)), place / "artefact", compare=False)
    export(model, "gguf", place / "gguf")
    export(place / "artefact", "compressed-tensors", place / "compressed-tensors")
    return place


def cases(kind):
    """CI's share of the cases of a kind, and the rest of them."""
    return [
        pytest.param(kind, 0, CI_CASES, id=f"{kind}-first"),
        pytest.param(kind, CI_CASES, SLOW_CASES, id=f"{kind}-rest", marks=pytest.mark.slow),
    ]


@pytest.mark.parametrize(("kind", "start", "stop"), [c for kind in KINDS for c in cases(kind)])
def test_a_mutated_file_is_refused_or_read_as_it_is(kind, start, stop, originals, tmp_path):
    refused, wrong = 0, []
    for seed in range(start, stop):
        rng = random.Random(f"{kind} {seed}")
        place = tmp_path / f"{seed}"
        shutil.copytree(originals / kind, place)
        changed, what = mutate(place, kind, rng)
        with limited(f"case {seed}: {what}"):
            found, error = attempt(kind, place)
        refused += error is not None
        if problem := judge(kind, place, changed, found, error):
            wrong.append(f"case {seed}, {what}: {problem}")
        shutil.rmtree(place)
    assert not wrong, "\n".join(wrong)
    assert refused > 0.3 * (stop - start)  # the mutations bite


def judge(kind, place, changed, found, error):
    """What is wrong with the outcome; "" if nothing is."""
    if error is not None:
        plain = type(error) is ValueError and str(error)
        return "" if plain else f"not an error of ours but {error!r}"
    if not changed:
        return ""
    if kind == "artefact":
        return "accepted under a hash"
    if kind == "compressed-tensors":
        with contextlib.suppress(ValueError):
            verify_checksums(place)
            return "the checksums say nothing"
    try:
        check_values(kind, place, found)
    except Exception as difference:
        return f"read, but {difference!r}"
    return ""


@contextlib.contextmanager
def limited(told):
    """Fails where the body hangs, or holds far more memory than its files have bytes."""

    def stop(*_):
        raise TimeoutError(f"{told}: more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert peak < BYTES, f"{told}: {peak / 1e6:.0f} MB"


def attempt(kind, place):
    """(the model with every block read, None), or (None, the error)."""
    try:
        if kind == "artefact":
            return artefact.load(place, verify=True), None
        opened = open_checkpoint(place / "model.gguf" if kind == "gguf" else place)
        blocks = tuple(block.load() for block in opened.model.blocks)
        return (opened.model.replace(blocks=blocks), opened.hf_config), None
    except Exception as error:  # every type is looked at
        return None, error


def check_values(kind, place, found):
    """Every tensor of the model is what another reader finds in the mutated files."""
    model, config = found
    if kind == "gguf":
        others = gguf_tensors(place / "model.gguf")
    else:
        files = sorted(place.glob("*.safetensors"))
        others = {name: a for file in files for name, a in load_file(file).items()}
    if kind == "compressed-tensors":
        check_packed(model, others)
        return
    ours = named_leaves(model)
    generation = (
        json.loads((place / "generation_config.json").read_text()) if kind != "gguf" else {}
    )
    for path, param in named_leaves(template_of(config, generation=generation)).items():
        name = to_gguf(param.name) if kind == "gguf" else param.name
        other = others[name].T if param.transpose else others[name]
        mine = np.asarray(ours[path])
        assert mine.dtype == other.dtype and np.array_equal(bits(mine), bits(other)), path


def check_packed(model, others):
    for i, block in enumerate(model.blocks):
        for path in anatomy(block).linears:
            module = f"model.layers.{i}.{'mlp' if path.startswith('ffn') else 'self_attn'}."
            stem = f"{module}{path.split('.')[1]}_proj."
            words = others[f"{stem}weight_packed"]
            nibbles = (words[:, :, None].view(np.uint32) >> np.arange(0, 32, 4, np.uint32)) & 15
            codes = nibbles.reshape(len(words), -1).astype(np.float32) - 8
            scale = np.repeat(others[f"{stem}weight_scale"], 16, axis=1)
            mine = np.asarray(dequantize(get_at(block, path).w)).T
            assert np.array_equal(mine, codes * scale), path


def gguf_tensors(path):
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


def bits(a):
    return np.ascontiguousarray(a).view(np.uint8)


def mutate(place, kind, rng):
    """Changes one file; returns whether its bytes differ now, and what was done."""
    suffixes = (".safetensors", ".gguf") if kind != "artefact" else ("",)
    files = [p for p in sorted(place.rglob("*")) if p.is_file()]
    weights = [p for p in files if p.name.endswith(suffixes)]
    others = [p for p in files if p.name in ("config.json", "model.safetensors.index.json")]
    file = rng.choice(others if others and rng.random() < 0.2 else weights)
    before = file.read_bytes()
    change = rng.choice(LIES.get(file.suffix, ()) + CHANGES)
    after = change(before, rng)
    file.write_bytes(after)
    return after != before, f"{change.__name__} of {file.relative_to(place)}"


def somewhere(data, rng):
    """A position, half of the time among the first bytes, where headers are."""
    return rng.randrange(min(len(data), 2048) if rng.random() < 0.5 else len(data))


def flip(data, rng):
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8))):
        if out:
            out[somewhere(out, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(data, rng):
    return data[: rng.randrange(len(data))] if data else data


def add(data, rng):
    return data + rng.randbytes(rng.choice((1, 7, 64, 4096)))


def swap(data, rng):
    size = min(rng.choice((1, 8, 64)), len(data) // 2)
    a, b = sorted(rng.sample(range(0, max(len(data) - size, 2)), 2))
    b = max(b, a + size)
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def zero(data, rng):
    at = somewhere(data, rng) if data else 0
    return data[:at] + bytes(min(rng.choice((1, 8, 256)), len(data) - at)) + data[at + 256 :]


def huge_header(data, rng):
    return struct.pack("<Q", rng.choice((2**63, 2**40, 200_000_000, len(data)))) + data[8:]


def lie_in_header(data, rng):
    """A well-formed header in which one tensor has another dtype, shape, place or name."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(6)
    if kind == 0:
        entry["dtype"] = rng.choice(("F64", "I32", "BF16", "U8", "F8_E4M3", "X1"))
    elif kind == 1:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 2:
        entry["shape"] = rng.choice(([], [-1], [2**62, 4], [*entry["shape"], 0], [1.5], "x", None))
    elif kind == 3:
        shift = rng.choice((-4, 4, 2**40, -(2**40)))
        entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    elif kind == 4:
        entry["data_offsets"] = rng.choice(([], [0], [8, 4], ["0", "4"], None))
    else:
        header[name + rng.choice(("x", ".weight"))] = header.pop(name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def lie_about_counts(data, rng):
    at = rng.choice((4, 8, 16))  # version, tensors, keys
    value = rng.choice((0, 1, 5, 2**20, 2**31 - 1, 2**62))
    size = 4 if at == 4 else 8
    return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


def lie_in_json(data, rng):
    """Another value, of the same type or another, somewhere in the object."""
    value = json.loads(data)
    holder = value
    while True:
        key = rng.choice(sorted(holder))
        if isinstance(holder[key], dict) and holder[key]:
            holder = holder[key]
            continue
        break
    old = holder[key]
    strange = [None, "x", [], {}, -1, 0, 1e308, 2**70, True]
    holder[key] = rng.choice([*strange, old * 2] if isinstance(old, int | float) else strange)
    return json.dumps(value).encode()


CHANGES = (flip, flip, cut, add, swap, zero)
LIES = {
    ".safetensors": (huge_header, lie_in_header, lie_in_header),
    ".gguf": (lie_about_counts,),
    ".json": (lie_in_json, lie_in_json),
}
