"""The GPTQ solver beside others: seconds and output error on the same matrices.

Each case is a weight and the Hessian of correlated, heavy-tailed inputs, given to every solver
that is installed; 4 bits, symmetric, damping 0.01. Each solver works on each case in a process of
its own, imports not counted: the first call (which compiles) and later ones are timed apart.

Run: python benchmarks/peers/gptq.py [--shapes 576x576 2048x2048] [--repeats 3] [--limit 600]
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from benchmarks import common

SHAPES = ("576x576", "576x1536", "1536x576", "2048x2048", "5632x2048")  # in_ch × out_ch
BITS, DAMP = 4, 0.01


@dataclasses.dataclass(frozen=True)
class Peer:
    """A solver: how to get it, the distribution that says its version, and what it cannot do."""

    make: Callable[[dict[str, Any]], tuple[Callable, Callable]]
    package: str
    install: str
    act_order: bool = True
    note: str = ""


def make_jaxcomp(task: dict[str, Any]) -> tuple[Callable, Callable]:
    import jax

    from jaxcomp.core.quantize import QuantSpec, dequantize
    from jaxcomp.solvers.gptq import gptq

    w, hessian = map(jax.device_put, arrays(task))
    spec = QuantSpec(BITS, group_size=task["group"])
    solve = jax.jit(
        functools.partial(gptq, spec=spec, act_order=task["act_order"], damp=DAMP),
    )
    run = lambda: jax.block_until_ready(solve(w, hessian).weight)  # noqa: E731
    return run, lambda solved: np.asarray(dequantize(solved))


def make_qwix(task: dict[str, Any], jitted: bool = False) -> tuple[Callable, Callable]:
    import jax
    import jax.numpy as jnp
    from qwix._src.core import qarray
    from qwix.contrib.gptq_core import quantize_weight

    w, hessian = arrays(task)
    w, hessian = jax.device_put(np.ascontiguousarray(w.T)), jax.device_put(hessian)
    how = qarray.HowToQuantize(
        qtype=jnp.int4,
        channelwise_axes=[0],
        tiled_axes={1: task["group"]} if task["group"] else {},
        calibration_method="absmax",
    )
    solve = functools.partial(quantize_weight, how=how, percdamp=DAMP)
    solve = jax.jit(solve) if jitted else solve
    run = lambda: jax.block_until_ready(solve(w, hessian)[0])  # noqa: E731
    return run, lambda solved: np.asarray(qarray.dequantize(solved), np.float32).T


def make_llmcompressor(task: dict[str, Any]) -> tuple[Callable, Callable]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    torch.set_num_threads(common.usable_cores())
    w, hessian = (torch.from_numpy(np.ascontiguousarray(a.T)) for a in arrays(task))
    strategy = {"strategy": "group", "group_size": task["group"]}
    args = QuantizationArgs(
        num_bits=BITS,
        symmetric=True,
        actorder="weight" if task["act_order"] else None,
        **(strategy if task["group"] else {"strategy": "channel"}),
    )

    def run() -> torch.Tensor:
        # Its grids come from the caller: the same as ours, max|w| / 7.
        groups = w.reshape(len(w), -1, task["group"] or w.shape[1])
        scale = groups.abs().amax(-1) / (2 ** (BITS - 1) - 1)
        zero = torch.zeros_like(scale)
        # It works in place on the first two.
        batch = w[None].clone(), hessian[None].clone(), scale[None], zero[None]
        return quantize_weight(*batch, None, args, percdamp=DAMP)[0][0]

    return torch.inference_mode()(run), lambda values: values.numpy().T


def make_gptqmodel(task: dict[str, Any]) -> tuple[Callable, Callable]:
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    torch.set_num_threads(common.usable_cores())
    w, hessian = (torch.from_numpy(np.ascontiguousarray(a.T)) for a in arrays(task))
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w
    config = QuantizeConfig(
        bits=BITS,
        group_size=task["group"] or -1,
        sym=True,
        damp_percent=DAMP,
        desc_act=task["act_order"],
        act_group_aware=False,
        offload_to_disk=False,
    )

    def run() -> torch.Tensor:
        solver = GPTQ(layer, config)
        solver.quantizer.configure(perchannel=True)
        solver.H, solver.nsamples = hessian.clone(), 128  # as add_batch leaves them
        return solver.quantize()[0]

    return torch.inference_mode()(run), lambda values: values.float().numpy().T


PEERS = {
    "jaxcomp": Peer(make_jaxcomp, "jaxcomp", "pip install -e ."),
    "qwix": Peer(
        make_qwix,
        "qwix",
        "pip install --no-deps qwix==0.1.8",
        act_order=False,
        note="as shipped: its own `quantize` calls the solver without jit; scale max|w| / 7.5",
    ),
    "qwix jit": Peer(
        functools.partial(make_qwix, jitted=True),
        "qwix",
        "pip install --no-deps qwix==0.1.8",
        act_order=False,
        note="the same under jax.jit, which unrolls its column loop: minutes to compile",
    ),
    "llmcompressor": Peer(
        make_llmcompressor,
        "llmcompressor",
        "pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 loguru",
        note="torch; scale handed in (max|w| / 7); groups keep the grid of the original weights",
    ),
    "gptqmodel": Peer(
        make_gptqmodel,
        "gptqmodel",
        "pip install --no-deps --no-build-isolation gptqmodel==7.7.0 pypcre logbar tokenicer "
        "device-smi defuser threadpoolctl torchao",
        note="torch; scale max|w| / 7.5; with act-order, groups are of the permuted channels",
    ),
}
DEFAULT = ("jaxcomp", "qwix", "llmcompressor", "gptqmodel")
UNUSABLE = """\
Torch packages without a GPTQ that takes a bare matrix and Hessian on a CPU:
  torchao 0.18     prototype/gptq asserts a CUDA device ("GPTQ only supports CUDA currently")
  auto-gptq 0.7.1  imports a name that transformers 5 removed, and ends in torch.cuda.synchronize()
  optimum 2.3      its source hands GPTQ over to gptqmodel (not run)
  auto-round 0.16  its source has no GPTQ solver, only the format (not run)
  gptq 0.0.3       does not build here"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="in_ch x out_ch")
    parser.add_argument("--groups", nargs="+", type=int, help="0: per channel")
    parser.add_argument("--peers", nargs="+", default=DEFAULT, choices=PEERS)
    parser.add_argument("--act-order", choices=["off", "on", "both"], default="both")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls after the first")
    parser.add_argument("--rounds", type=int, default=1, help="processes per solver and case")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one process")
    parser.add_argument("--json", help="default: benchmarks/results/<device>/gptq.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    packages = ["jax", "torch", *(p.package for name, p in PEERS.items() if name != "jaxcomp")]
    facts = common.environment(list(dict.fromkeys(packages)))
    common.header(f"GPTQ solvers, W{BITS} symmetric, damp {DAMP}", facts)
    peers = [name for name in args.peers if installed(name)]
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in args.shapes:
            file, w, hessian = make_case(shape, pathlib.Path(scratch))
            for group, act_order in settings(shape, args):
                case = {"shape": shape, "group": group or None, "act_order": act_order}
                print(f"{shape} {describe(case)} …", file=sys.stderr)
                results.append(case | {"solvers": run_case(case, file, w, hessian, peers, args)})
            file.unlink()
    show(results)
    common.write_results("gptq", facts, results, args.json)


def installed(name: str) -> bool:
    """Whether a peer can be compared; says how to get it when not."""
    peer = PEERS[name]
    there = name == "jaxcomp" or common.version(peer.package) is not None
    if not there:
        print(f"{name} is left out, as it is not installed; get it with: {peer.install}")
    return there


def settings(shape: str, args: argparse.Namespace) -> list[tuple[int, bool]]:
    groups = args.groups if args.groups is not None else (0, 64 if shape.startswith("576") else 128)
    orders = {"off": (False,), "on": (True,), "both": (False, True)}[args.act_order]
    return list(itertools.product(groups, orders))


def make_case(shape: str, folder: pathlib.Path) -> tuple[pathlib.Path, np.ndarray, np.ndarray]:
    """A weight and the mean XXᵀ of tokens that share directions and have a few huge channels."""
    in_ch, out_ch = map(int, shape.split("x"))
    rng = np.random.default_rng([in_ch, out_ch])
    w = (rng.standard_t(5, (in_ch, out_ch)) / np.sqrt(in_ch)).astype(np.float32)
    tokens, rank = max(2048, 2 * in_ch), in_ch // 8
    mixing = rng.standard_normal((rank, in_ch), np.float32) / np.float32(np.sqrt(rank))
    x = rng.standard_normal((tokens, rank), np.float32) @ mixing
    x += 0.3 * rng.standard_normal((tokens, in_ch), np.float32)
    x *= np.exp(rng.standard_normal(in_ch)).astype(np.float32)
    x *= np.sqrt(5 / rng.chisquare(5, (tokens, 1))).astype(np.float32)
    hessian = 2 / tokens * (x.T @ x)
    np.savez(folder / "case.npz", w=w, hessian=hessian)
    return folder / "case.npz", w, hessian


def arrays(task: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    with np.load(task["file"]) as stored:
        return stored["w"], stored["hessian"]


def run_case(case, file, w, hessian, peers, args) -> dict[str, Any]:
    runs: dict[str, list] = {}
    for name in common.alternate(peers, args.rounds):
        if case["act_order"] and not PEERS[name].act_order:
            continue
        out = file.with_name("values.npy")
        out.unlink(missing_ok=True)
        task = case | {"peer": name, "file": str(file), "out": str(out), "repeats": args.repeats}
        result = common.run_worker(__file__, task, args.limit)
        if out.exists():
            result["relative_error"] = output_error(np.load(out), w, hessian)
        runs.setdefault(name, []).append(result)
        if "error" in result:
            print(f"  {name}: {result['error']}", file=sys.stderr)
    return {name: summary(list_) for name, list_ in runs.items()}


def output_error(values: np.ndarray, w: np.ndarray, hessian: np.ndarray) -> float:
    """tr(Δᵀ H Δ) / tr(Wᵀ H W); weights are `[in_ch, out_ch]` here."""
    delta = values - w
    energy = lambda a: float(np.sum((hessian @ a) * a, dtype=np.float64))  # noqa: E731
    return energy(delta) / energy(w)


def work(task: dict[str, Any]) -> None:
    run, values = PEERS[task["peer"]].make(task)
    first, first_cpu, solved = common.clocked(run)
    np.save(task["out"], values(solved))
    later = [common.clocked(run)[:2] for _ in range(task["repeats"])]
    common.answer(
        {
            "first_seconds": first,
            "first_cpu_seconds": first_cpu,
            "later_seconds": [wall for wall, _ in later],
            "later_cpu_seconds": [cpu for _, cpu in later],
            "peak_rss": common.memory("VmHWM"),
        }
    )


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    good = [run for run in runs if "error" not in run]
    if not good:
        return {"runs": runs, "error": runs[0]["error"], "timeout": runs[0].get("timeout")}
    flat = lambda name: [x for run in good for x in run[name]]  # noqa: E731
    return {
        "runs": runs,
        "first_seconds": statistics.median(run["first_seconds"] for run in good),
        "later_seconds": statistics.median(flat("later_seconds")),
        "best_seconds": min(flat("later_seconds")),
        "later_cpu_seconds": statistics.median(flat("later_cpu_seconds")),
        "relative_error": good[0]["relative_error"],
        "peak_rss": max(run["peak_rss"] for run in good),
    }


def describe(case: dict[str, Any]) -> str:
    grid = f"g{case['group']}" if case["group"] else "channel"
    return grid + (" act-order" if case["act_order"] else "")


def show(results: list[dict[str, Any]]) -> None:
    columns = "in x out,setting,solver,first s,later s,best s,CPU s,error,× ours first,× ours later"
    rows = []
    for case in results:
        ours = case["solvers"].get("jaxcomp", {})
        for name, r in case["solvers"].items():
            first, later = r.get("first_seconds"), r.get("later_seconds")
            ratio = [
                x / ours[key] if x and key in ours else None
                for x, key in ((first, "first_seconds"), (later, "later_seconds"))
            ]
            if r.get("timeout"):  # a lower bound: not even the first call ended
                first = f">{r['timeout']:.0f}"
                bound = r["timeout"] / ours["first_seconds"] if "first_seconds" in ours else None
                ratio[0] = f">{bound:.0f}" if bound else None
            error = r.get("relative_error")
            shown = f"{error:.3e}" if error is not None else r.get("error", "")[:40]
            times = [first, later, r.get("best_seconds"), r.get("later_cpu_seconds")]
            rows.append([case["shape"], describe(case), name, *times, shown, *ratio])
    common.table(columns.split(","), rows)
    print("first s: the first call of a process, compiling included; later s, best s: of the rest.")
    print("error: tr(ΔᵀHΔ) / tr(WᵀHW). × ours: the solver's seconds over jaxcomp's, > 1 is slower.")
    used = {name for case in results for name in case["solvers"]}
    for name, peer in PEERS.items():
        if name in used and peer.note:
            print(f"{name}: {peer.note}")
    print(f"{UNUSABLE}\n")


if __name__ == "__main__":
    main()
