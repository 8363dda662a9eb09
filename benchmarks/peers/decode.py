"""Greedy decoding, tokens a second: jaxcomp beside transformers (torch), on the same prompt.

Both get SmolLM2-135M from the same GGUF file; jaxcomp also runs artefacts that this script makes of
it by rounding, once: W8A8 and W4A8 (per channel and token, in integers) and W4 in groups of 64
(weights only); E8 has the embedding, which is the head as well, in 8 bits. Each contestant runs in
processes of its own, in turns, and in each: load, generate once (which compiles), then `--repeats`
times. Prefill is timed apart, on a longer prompt.

Run: python benchmarks/peers/decode.py [--new 128] [--repeats 3] [--rounds 2]
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from benchmarks import common

TORCH = {"torch float32": "float32", "torch bfloat16": "bfloat16"}
# name → bits of weights, group, bits of activations, bits of the embedding and the head
ARTEFACTS = {
    "W8A8": (8, None, 8, None),
    "W8A8 E8": (8, None, 8, 8),
    "W4A8 E8": (4, None, 8, 8),
    "W4 g64": (4, 64, None, None),
    "W4 g64 E8": (4, 64, None, 8),
}
CONTESTANTS = (*TORCH, "dense float32", *ARTEFACTS)
PROMPT = (
    "The Atlantic Ocean is the second largest of the world's five oceans, with an area of about"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo:smollm2", help="a GGUF file or demo:smollm2")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the longer prompt")
    parser.add_argument("--repeats", type=int, default=3, help="generations per process, after one")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contestant")
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--json", help="default: benchmarks/results/<device>/decode.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, pathlib.Path(scratch))


def compare(args: argparse.Namespace, scratch: pathlib.Path) -> None:
    """The whole comparison: artefacts, contestants in turns, table, JSON."""
    from jaxcomp.hub.locate import locate

    facts = common.environment(["jax", "torch", "transformers"])
    setting = f"{args.new} new tokens, prefill of {args.prefill} tokens, batch 1"
    common.header(f"Greedy decoding of {args.model}: {setting}", facts)
    for who in set(args.contestants) & set(ARTEFACTS):
        make_artefact(args.model, who, scratch / who)
    runs: dict[str, list] = {who: [] for who in args.contestants}
    for who in common.alternate(args.contestants, args.rounds):
        model = str(scratch / who) if who in ARTEFACTS else args.model
        task = {"who": who, "model": model, "file": str(locate(args.model)), "new": args.new}
        task |= {"prefill": args.prefill, "repeats": args.repeats}
        runs[who].append(common.run_worker(__file__, task) | {"load": common.load()})
        if "error" in runs[who][-1]:
            print(f"{who}: {runs[who][-1]['error']}", file=sys.stderr)
    results = [summary(who, list_) for who, list_ in runs.items()]
    show(results)
    common.write_results("decode", facts, results, args.json)


def make_artefact(model: str, who: str, out: pathlib.Path) -> None:
    """Rounds the model to the format of a contestant."""
    from jaxcomp import RTN, QuantSpec, Recipe, compress

    bits, group, act_bits, ends = ARTEFACTS[who]
    act = act_bits and QuantSpec(act_bits, granularity="token", dynamic=True)
    step = RTN(QuantSpec(bits, group_size=group), act=act, ends=ends and QuantSpec(ends))
    compress(model, Recipe(steps=(step,)), out, compare=False)


def work(task: dict[str, Any]) -> None:
    """One contestant: load, one generation, then several, and the longer prompt."""
    make = torch_generator if task["who"] in TORCH else jax_generator
    load_seconds, _, (generate, prefill, imports, baseline) = common.clocked(lambda: make(task))
    first, _, (_, ids) = common.clocked(lambda: generate(task["new"]))
    runs = [generate(task["new"])[0] for _ in range(task["repeats"])]
    prefill()
    common.answer(
        {
            "load_seconds": load_seconds - imports,
            "first_seconds": first,
            "first_token_seconds": [run[0] for run in runs],
            "decode_seconds": [run[1] for run in runs],
            "prefill_seconds": [common.clocked(prefill)[0] for _ in range(task["repeats"])],
            "new": task["new"],
            "prefill": task["prefill"],
            "tokens": ids,
            "baseline_rss": baseline,
            "peak_rss": common.memory("VmHWM"),
        }
    )


def jax_generator(task: dict[str, Any]):
    start = time.perf_counter()
    # What loading imports, too, so that the baseline is all libraries and nothing else.
    import gguf  # noqa: F401
    import jax
    import orbax.checkpoint  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    from jaxcomp.job import load
    from jaxcomp.models.prepare import prepare
    from jaxcomp.models.session import Session

    imports, baseline = time.perf_counter() - start, common.memory("VmHWM")
    integer = bool(ARTEFACTS.get(task["who"], (0, 0, None, None))[2])
    loaded = load(task["model"], compute_dtype="float32", lazy=True, integer=integer)
    model, ids = prepare(loaded.model), loaded.encode(PROMPT)

    def generate(new: int) -> tuple[tuple[float, float], list[int]]:
        session, start = Session(model, 1), time.perf_counter()
        tokens = [session.prefill(ids[None], ahead=new)]
        tokens[0].block_until_ready()
        first = time.perf_counter()
        tokens += [session.step() for _ in range(new - 1)]
        tokens[-1].block_until_ready()
        seconds = (first - start, time.perf_counter() - first)
        return seconds, [int(t[0]) for t in jax.device_get(tokens)]

    long = np.resize(ids, task["prefill"])[None]
    return (
        generate,
        lambda: Session(model, 1).prefill(long, ahead=1).block_until_ready(),
        imports,
        baseline,
    )


def torch_generator(task: dict[str, Any]):
    start = time.perf_counter()
    import torch
    import transformers

    from jaxcomp.job import load as load_ours

    imports, baseline = time.perf_counter() - start, common.memory("VmHWM")
    torch.set_num_threads(common.usable_cores())
    file = pathlib.Path(task["file"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    dtype = getattr(torch, TORCH[task["who"]])
    model = load(str(file.parent), gguf_file=file.name, dtype=dtype).eval()
    ids = torch.from_numpy(load_ours(task["model"], lazy=True).encode(PROMPT).astype(np.int64))

    @torch.inference_mode()
    def generate(new: int) -> tuple[tuple[float, float], list[int]]:
        times = []

        class Clock(transformers.generation.streamers.BaseStreamer):
            def put(self, _):
                times.append(time.perf_counter())

            def end(self):
                pass

        start = time.perf_counter()
        out = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            streamer=Clock(),
        )
        # The streamer gets the prompt first, then each token.
        return (times[1] - start, times[-1] - times[1]), out[0, len(ids) :].tolist()

    long = torch.from_numpy(np.resize(ids.numpy(), task["prefill"]))[None]

    @torch.inference_mode()
    def prefill() -> None:
        model(long, logits_to_keep=1).logits.argmax(-1)

    return generate, prefill, imports, baseline


def summary(who: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all processes of one contestant, the raw runs beside them."""
    result = {"contestant": who, "runs": runs}
    good = [run for run in runs if "error" not in run]
    if not good:
        return result
    all_of = lambda name: [x for run in good for x in run[name]]  # noqa: E731
    decode = [(good[0]["new"] - 1) / x for x in all_of("decode_seconds")]
    return result | {
        "decode_tokens_per_s": statistics.median(decode),
        "best_decode_tokens_per_s": max(decode),
        "prefill_tokens_per_s": good[0]["prefill"] / statistics.median(all_of("prefill_seconds")),
        "first_token_seconds": statistics.median(all_of("first_token_seconds")),
        "compile_seconds": max(
            0.0,
            good[0]["first_seconds"] - statistics.median(all_of("decode_seconds")),
        ),
        "tokens": good[0]["tokens"],
        "peak_above_imports": max(run["peak_rss"] - run["baseline_rss"] for run in good),
    }


def show(results: list[dict[str, Any]]) -> None:
    """The table: one row per contestant, compared with transformers in float32."""
    columns = "contestant,decode tok/s,best,× torch f32,prefill tok/s,× torch f32,first token s"
    columns += ",compile s,peak MB,same tokens"
    peer = next((r for r in results if r["contestant"] == "torch float32"), {})
    rows = []
    for r in results:
        ratios = []
        for name in ("decode_tokens_per_s", "prefill_tokens_per_s"):
            ratios.append(r[name] / peer[name] if name in r and name in peer else None)
        peak = r["peak_above_imports"] / 1e6 if "peak_above_imports" in r else None
        same = None
        if "tokens" in r and "tokens" in peer:
            pairs = zip(r["tokens"], peer["tokens"], strict=True)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(r["tokens"]))
        rows.append(
            [
                r["contestant"],
                r.get("decode_tokens_per_s"),
                r.get("best_decode_tokens_per_s"),
                ratios[0],
                r.get("prefill_tokens_per_s"),
                ratios[1],
                r.get("first_token_seconds"),
                r.get("compile_seconds"),
                peak,
                same,
            ]
        )
    common.table(columns.split(","), rows)
    print("peak MB: above what the imports took. same tokens: before the first that differs.")


if __name__ == "__main__":
    main()
