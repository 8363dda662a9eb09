"""The dry run: what each step of a recipe will take, before the first block is touched.

A method names the compiled programs it calls for a block. Memory is asked of the compiler, which
knows every temporary; time is measured by running each program once on zeros. Nothing is read but
the structure of the blocks.

    peak = resident now + hidden states, before and after a block + the block as stored
           + what the method keeps beside it + the largest program's temporaries, results and
             inputs other than the block
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.calibrate.stream import Calibration
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.sizes import rss


class Program(NamedTuple):
    """A compiled function that a method calls for every block.

    Attributes:
      function: the jitted function itself, so that the run finds it compiled.
      args: its arguments with `jax.ShapeDtypeStruct` leaves for arrays.
      calls: how often it is called for one block.
      static: its keyword arguments.
    """

    function: Callable
    args: tuple
    calls: int
    static: dict[str, Any] = {}  # noqa: RUF012


class BlockPlan(NamedTuple):
    """What a method does with one block: its programs, and the bytes it keeps beside the block."""

    programs: list[Program]
    kept_bytes: int


class StepPlan(NamedTuple):
    """A step of a recipe as it is expected to go.

    Attributes:
      step: the method's name.
      seconds: wall time of all blocks; reading and writing files not counted.
      peak_bytes: largest resident memory of the process during the step.
    """

    step: str
    seconds: float
    peak_bytes: int


def plan(model: Decoder, steps: Iterable[Any], calib: Calibration | None) -> list[StepPlan]:
    """Plans every step on the structure of `model`.

    Args:
      model: blocks may be behind handles; they are not read. Each step is planned on these blocks,
        although it will see what the step before it made of them.
      steps: methods with a `plan_block(block, hidden, batches)` that returns a `BlockPlan`, where
        `hidden` is the struct of one batch of hidden states (None without calibration).
      calib: the windows, for their shape.
    """
    structs = [block_struct(block) for block in model.blocks]
    return [_plan_step(step, model, structs, calib) for step in steps]


def plan_write(model: Decoder) -> StepPlan:
    """What writing the artefact takes at its largest moment: the parts outside the blocks.

    To be called after `plan`: what its programs left resident, a run will hold as well.
    """
    block = max(tree_bytes(block_struct(block)) for block in model.blocks)
    return StepPlan("write", 0.0, rss() + 2 * block + tree_bytes(model.replace(blocks=())))


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays, or structs, in a tree."""
    return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))


def _plan_step(step: Any, model: Decoder, structs: list[Block], calib: Calibration | None):
    hidden, batches, hidden_bytes = None, 0, 0
    if calib is not None:
        samples, length = calib.tokens.shape
        batches = -(-samples // calib.batch)
        dtype = jnp.dtype(model.config.compute_dtype)
        width = model.config.d_model
        hidden = jax.ShapeDtypeStruct((min(calib.batch, samples), length, width), dtype)
        hidden_bytes = samples * length * width * dtype.itemsize
    seconds, most, seen = 0.0, 0, {}
    for block in structs:
        key = (jax.tree.structure(block), tuple((a.shape, a.dtype) for a in jax.tree.leaves(block)))
        if key not in seen:
            seen[key] = _plan_block(step.plan_block(block, hidden, batches), block)
        seconds += seen[key][0]
        most = max(most, seen[key][1])
    return StepPlan(type(step).__name__, seconds, rss() + 2 * hidden_bytes + most)


def _plan_block(plan: BlockPlan, block: Block) -> tuple[float, int]:
    seconds, working = 0.0, 0
    for program in plan.programs:
        compiled = program.function.lower(*program.args, **program.static).compile()
        memory = compiled.memory_analysis()
        needed = (
            memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        inputs = [arg for arg in program.args if not isinstance(arg, Block)]
        working = max(working, needed + tree_bytes(inputs))
        seconds += program.calls * _rehearse(program)
    return seconds, tree_bytes(block) + plan.kept_bytes + working


def _rehearse(program: Program) -> float:
    """Seconds of one call on zeros, the second of two: the first may load the program."""
    for _ in range(2):
        args = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), program.args)
        jax.block_until_ready(args)
        start = time.perf_counter()
        jax.block_until_ready(program.function(*args, **program.static))
    return time.perf_counter() - start
