"""Peak memory of compressing a model larger than the limit: RTN and GPTQ at TinyLlama-1.1B's shape.

Writes a random checkpoint (2.2 GB, bfloat16), then lets `jaxcomp.compress` work on it in a process
of its own for each recipe. The peak is VmHWM; the dry run's prediction stands beside it.

Run: python benchmarks/memory.py [--methods RTN GPTQ] [--blocks 22] [--dir DIR] [--keep]
"""

import argparse
import json
import logging
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from benchmarks import common

LIMIT = 3e9
SHARDS = 2
CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=2048,
    intermediate_size=5632,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    tie_word_embeddings=False,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position_embeddings=2048,
    attention_bias=False,
    mlp_bias=False,
    torch_dtype="bfloat16",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["RTN", "GPTQ"], choices=["RTN", "GPTQ"])
    parser.add_argument("--group", type=int, help="channels a scale; default: per channel")
    parser.add_argument("--blocks", type=int, default=22, help="22 is TinyLlama's depth")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows of GPTQ")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--dir", type=pathlib.Path, help="where to work; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--json", help="default: benchmarks/results/<device>/memory.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    facts = common.environment(["jax", "orbax-checkpoint"])
    shape = f"{args.blocks} blocks × {CONFIG['hidden_size']}, bfloat16"
    common.header(f"Peak memory of compression, Llama of {shape}", facts)
    base = args.dir or pathlib.Path(tempfile.gettempdir())
    base.mkdir(parents=True, exist_ok=True)
    folder = base / f"jaxcomp-memory-{args.blocks}"
    try:
        if not (folder / "config.json").exists():
            print(f"writing {folder} …", file=sys.stderr)
            write_checkpoint(folder, args.blocks)
        results = [measure(method, folder, args) for method in args.methods]
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    show(results)
    common.write_results("memory", facts, results, args.json)


class RandomWeight:
    """A tensor that is drawn when it is written, so that a shard never stands in memory."""

    def __init__(self, name: str, *shape: int):
        self.name, self.shape, self.dtype = name, shape, np.dtype("bfloat16")

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if len(self.shape) == 1:
            return np.ones(self.shape, self.dtype)
        rng = np.random.default_rng(np.frombuffer(self.name.encode(), np.uint8))
        x = rng.standard_normal(self.shape, np.float32)
        x *= np.float32(self.shape[-1] ** -0.5)
        return x.astype(self.dtype)


def write_checkpoint(folder: pathlib.Path, blocks: int) -> None:
    """A Hugging Face directory: shards, index, config and a byte-level tokenizer."""
    import ml_dtypes  # noqa: F401  registers bfloat16 with numpy

    from jaxcomp.core.tensorfile import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    d, ff, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    kv = d * CONFIG["num_key_value_heads"] // CONFIG["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, d)}
    for i in range(blocks):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (d, d) for p in "qo"}
        shapes |= {f"{at}self_attn.{p}_proj.weight": (kv, d) for p in "kv"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (ff, d) for p in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (d, ff)}
        shapes |= {f"{at}{p}_layernorm.weight": (d,) for p in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (vocab, d)}
    names, weight_map = list(shapes), {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS]
        tensors = {name: RandomWeight(name, *shapes[name]) for name in part}
        write_tensors(folder / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    byte_tokenizer().save_pretrained(folder)
    config = CONFIG | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config))  # last: it says that all is there


def byte_tokenizer() -> Any:
    """A token a byte: no vocabulary to train, and ids below any model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def measure(method: str, folder: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
    """One recipe: the dry run and the run, a process each."""
    print(f"{method} …", file=sys.stderr)
    task = {"method": method, "source": str(folder), "out": str(folder / f"out-{method}")}
    task |= {"group": args.group, "samples": args.samples, "length": args.length}
    planned = common.run_worker(__file__, task | {"only": "plan"})
    result = common.run_worker(__file__, task | {"only": "run"})
    shutil.rmtree(task["out"], ignore_errors=True)
    for what in (planned, result):
        if "error" in what:
            print(f"  {method}: {what['error']}", file=sys.stderr)
    return {"method": method, "planned": planned, **result}


def work(task: dict[str, Any]) -> None:
    from jaxcomp import GPTQ, RTN, CalibSpec, QuantSpec, Recipe, job

    weight = QuantSpec(bits=4, group_size=task["group"])
    recipe = Recipe(steps=(RTN(weight=weight),))
    if task["method"] == "GPTQ":
        calib = CalibSpec("wiki_calib", samples=task["samples"], length=task["length"], batch=4)
        recipe = Recipe(steps=(GPTQ(weight=weight),), calib=calib)
    if task["only"] == "plan":
        return common.answer({"steps": job.dry_run(task["source"], recipe)})
    baseline = common.memory("VmHWM")
    with Trace() as trace:
        report = job.compress(task["source"], recipe, task["out"], compare=False)
    common.answer(
        {
            "baseline_rss": baseline,
            "peak_rss": common.memory("VmHWM"),
            "seconds": sum(report.seconds.values()),
            "phases": trace.phases,
        }
    )


class Trace(logging.Handler):
    """Largest VmRSS in each phase; the library's log line of a finished block ends its phase."""

    def __init__(self, period: float = 0.02):
        super().__init__(logging.INFO)
        self.phases: list[dict[str, Any]] = []
        self._period, self._done, self._peak = period, threading.Event(), 0
        self._start = time.perf_counter()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Trace":
        logger = logging.getLogger("jaxcomp")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("jaxcomp").removeHandler(self)
        self._done.set()
        self._thread.join()
        self._end("writing the artefact")

    def emit(self, record: logging.LogRecord) -> None:
        self._end(record.getMessage())

    def _end(self, phase: str) -> None:
        at = time.perf_counter() - self._start
        now = common.memory("VmRSS")
        peak, self._peak = max(self._peak, now), 0
        self.phases.append({"phase": phase, "until": at, "peak_rss": peak, "rss_after": now})

    def _sample(self) -> None:
        while not self._done.wait(self._period):
            self._peak = max(self._peak, common.memory("VmRSS"))


def show(results: list[dict[str, Any]]) -> None:
    rows = []
    for r in results:
        peak, steps = r.get("peak_rss"), r["planned"].get("steps") or []
        predicted = max((step["peak_bytes"] for step in steps), default=None)
        mega = [x / 1e6 if x else None for x in (r.get("baseline_rss"), peak, predicted)]
        off = f"{predicted / peak - 1:+.0%}" if peak and predicted else None
        verdict = None if peak is None else "below" if peak < LIMIT else "ABOVE"
        seconds = sum(step["seconds"] for step in steps) if steps else None
        rows.append([r["method"], *mega, off, LIMIT / 1e6, verdict, r.get("seconds"), seconds])
    columns = "method,imports MB,peak MB,predicted MB,off,limit MB,verdict,seconds,predicted s"
    common.table(columns.split(","), rows)
    for r in results:
        phases = sorted(r.get("phases", []), key=lambda p: -p["peak_rss"])
        print(f"{r['method']}: where most memory was held (sampled every 20 ms)")
        for p in phases[:4]:
            held, after, until = p["peak_rss"] / 1e6, p["rss_after"] / 1e6, p["until"]
            print(f"  {held:7,.0f} MB, {after:7,.0f} after, until {until:6.1f} s: {p['phase']}")


if __name__ == "__main__":
    main()
