"""The dry run: what each step of a recipe will take, before the first block is touched.

A method names the compiled programs it calls for a block. Memory is asked of the compiler, which
knows every temporary; time is measured by running each program once on zeros. Nothing is read but
the structure of the blocks.

    peak = resident now + hidden states, before and after a block + the block as stored
           + what the method keeps beside it + the largest program's temporaries, results and
             inputs other than the block
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.calibrate.stream import Calibration, check_text
from jaxcomp.core.scheme import settings_in_block
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

    def result(self) -> Any:
        """What a call gives, with structs for arrays; nothing is compiled."""
        return self.function.eval_shape(*self.args, **self.static)


class BlockPlan(NamedTuple):
    """What a method does with one block.

    Attributes:
      programs: in the order they are called.
      kept_bytes: what it keeps beside the block.
      result: the structure of the block it gives back.
    """

    programs: list[Program]
    kept_bytes: int
    result: Block


class ModelPlan(NamedTuple):
    """What a method does that changes the model as a whole, such as the number of its blocks.

    Attributes:
      programs: in the order they are called, each with its calls for the whole model.
      kept_bytes: what it keeps beside one block.
      result: the model it gives back, whose blocks may be structs or the handles it was given. What
        only the run will tell, such as which blocks are removed, is a guess of the right size.
    """

    programs: list[Program]
    kept_bytes: int
    result: Decoder


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
      model: blocks may be behind handles; they are not read.
      steps: methods with `check(model)`, `needs_text` and a `plan_block(block, hidden, batches,
        n_blocks)` that returns a `BlockPlan`, where `hidden` is the struct of one batch of hidden
        states (None without calibration); or in its place a `plan_model(model, hidden, batches)`
        that returns a `ModelPlan`. Each is planned on what the steps before it make of the model.
      calib: the windows, for their shape.

    Raises:
      ValueError: a step does not fit what it will be given.
    """
    _, _, hidden_bytes = _calibration(model, calib)
    planned = []
    for step, plans, _ in list(_walk(model, steps, calib)):  # all are checked, then compiled
        seconds, most, seen = 0.0, 0, {}
        for key, block, plan in plans:
            if key not in seen:
                seen[key] = _plan_block(plan, block)
            seconds += seen[key][0]
            most = max(most, seen[key][1])
        planned.append(StepPlan(type(step).__name__, seconds, rss() + 2 * hidden_bytes + most))
    return planned


def check_steps(model: Decoder, steps: Iterable[Any], calib: Calibration | None) -> Decoder:
    """Refuses a recipe of which some step could not begin; nothing is read or compiled.

    Arguments are those of `plan`.

    Returns:
      `model` with the structure of its blocks after the last step; see `ModelPlan.result`.

    Raises:
      ValueError: a step does not fit what the steps before it make of the model, or lacks text.
    """
    for _, _, after in _walk(model, steps, calib):
        model = after
    return model


def plan_write(model: Decoder) -> StepPlan:
    """What writing the artefact takes at its largest moment: the parts outside the blocks.

    To be called after `plan`: what its programs left resident, a run will hold as well.
    """
    block = max(tree_bytes(block_struct(block)) for block in model.blocks)
    return StepPlan("write", 0.0, rss() + 2 * block + tree_bytes(model.replace(blocks=())))


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays, or structs, in a tree."""
    return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))


def _walk(
    model: Decoder, steps: Iterable[Any], calib: Calibration | None
) -> Iterator[tuple[Any, list[tuple[Any, Block, BlockPlan | ModelPlan]], Decoder]]:
    """Each step, for every block a key that equal blocks share, the block and its plan, and what
    the step makes of the model. A step that is planned as a whole has one plan, and stands beside
    the model's largest block."""
    hidden, batches, _ = _calibration(model, calib)
    for step in steps:
        step.check(model)
        if step.needs_text:
            check_text(type(step).__name__, calib)
        if hasattr(step, "plan_model"):
            whole = step.plan_model(model, hidden, batches)
            largest = max(map(block_struct, model.blocks), key=tree_bytes)
            model = whole.result
            yield step, [(None, largest, whole)], model
            continue
        found, keys = {}, []
        for i, block in enumerate(map(block_struct, model.blocks)):
            here, leaves = settings_in_block(step, i, len(model.blocks)), jax.tree.leaves(block)
            key = here, jax.tree.structure(block), tuple((a.shape, a.dtype) for a in leaves)
            if key not in found:
                found[key] = block, here.plan_block(block, hidden, batches, len(model.blocks))
            keys.append(key)
        plans = [(key, *found[key]) for key in keys]
        model = model.replace(blocks=tuple(plan.result for _, _, plan in plans))
        yield step, plans, model


def _calibration(model: Decoder, calib: Calibration | None) -> tuple[Any, int, int]:
    """The struct of a batch of hidden states, the number of batches, and the bytes of them all."""
    if calib is None:
        return None, 0, 0
    (samples, length), width = calib.tokens.shape, model.config.d_model
    dtype = jnp.dtype(model.config.compute_dtype)
    batch = jax.ShapeDtypeStruct((min(calib.batch, samples), length, width), dtype)
    return batch, -(-samples // calib.batch), samples * length * width * dtype.itemsize


def _plan_block(plan: BlockPlan | ModelPlan, block: Block) -> tuple[float, int]:
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
