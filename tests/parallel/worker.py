"""Run by the tests in processes of their own: the same numbers, with and without a mesh.

`worker.py OUT` computes both, on however many devices XLA_FLAGS makes; `worker.py OUT PORT I N` is
process I of N that share one mesh.
"""

import sys

import jax
import numpy as np

from jaxcomp.calibrate import Calibration, Run, blockwise
from jaxcomp.calibrate.capture import capture, capture_batch
from jaxcomp.calibrate.fit import fit_init, fit_step
from jaxcomp.calibrate.learnable import block_loss
from jaxcomp.calibrate.stats import (
    hessian_init,
    hessian_update,
    magnitude_init,
    magnitude_update,
    range_init,
    range_update,
)
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.tree import named_leaves
from jaxcomp.methods import GPTQ, RTN, FlatQuant, SmoothQuant, flatquant
from jaxcomp.models.stream import block_step, step_batches
from jaxcomp.parallel import data_mesh
from tests import tiny

W4, A4 = QuantSpec(4), QuantSpec(4, granularity="token", dynamic=True)
A8 = QuantSpec(8, granularity="tensor", dynamic=False)
FIT = FlatQuant(W4, A4, init="hadamard", alpha=None, epochs=3)
METHODS = (FIT, GPTQ(W4, sequential=False), SmoothQuant(), RTN(W4, act=A8))
PROGRAMS = (fit_step, capture_batch, block_step)


def numbers(mesh):
    """Name → array, for all that a mesh must not change, and how often the programs compiled."""
    model = tiny.model("qwen2", jax.random.key(0))
    calib = Calibration(np.asarray(tiny.tokens(jax.random.key(1), 16, 16)), batch=8)
    found, run = {}, Run(mesh=mesh)
    first = model.replace(blocks=model.blocks[:1])
    blockwise("look", first, calib, lambda step: look(step, found), run=run)
    for method in METHODS:
        result = method(model, calib, run)
        name = type(method).__name__
        for row in result.rows:
            where = f"{name}/row/{row.block}/{row.linear}"
            found |= {f"{where}/{k}": v for k, v in row.metrics.items()}
        found |= {f"{name}/model/{k}": v for k, v in named_leaves(result.model.blocks).items()}
        found |= {f"{name}/compiled/{f.__name__}": f._cache_size() for f in PROGRAMS}
        for program in PROGRAMS:
            program.clear_cache()
    return {name: np.asarray(value) for name, value in found.items()}


def look(step, found):
    """Statistics of one block, the gradient of the first step of its fit, and three steps."""
    place, block = step.place, step.block
    start = {"attn_in": (hessian_init(32), magnitude_init(32), range_init(32))}
    states = capture(block, step.hidden, start, update_all, place=place)
    found.update({f"stats/{k}": v for k, v in named_leaves(states).items()})
    targets = step_batches(block, step.hidden, place=place)
    setting, spec = FIT.setting(block, 0, 2), flatquant._spec(FIT, len(targets))
    params = flatquant._init(FIT, block, setting, {}, 0)
    state, there = place.replicate((fit_init(params, spec), block))
    for i in range(3):
        x, y = place.put(step.hidden[i % 2]), place.put(targets[i % 2])
        kinds = dict(loss=block_loss, setting=setting, spec=spec)
        state, _ = fit_step(state, (there, x, y), **kinds)
        leaves = {k: np.array(v) for k, v in named_leaves(place.local(state)).items()}
        if i == 0:  # the first moment is then a tenth of the gradient
            found.update({f"gradient/{k}": v for k, v in leaves.items() if ".mu." in k})
    found.update({f"fitted/{k}": v for k, v in leaves.items() if k.startswith("params")})
    return block, {}


def update_all(state, x):
    hessian, magnitude, extremes = state
    return hessian_update(hessian, x), magnitude_update(magnitude, x), range_update(extremes, x)


def main(out, port=None, process=0, processes=1):
    if port is None:
        np.savez(f"{out}.alone.npz", **numbers(None))
    else:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    np.savez(f"{out}.mesh.npz", **numbers(data_mesh()))


if __name__ == "__main__":
    main(*sys.argv[1:])
