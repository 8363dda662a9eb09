"""`blockwise`: the loop that every block method shares.

    hidden = embed(tokens)
    for block in blocks:                     one block in memory
        block', metrics = visit(block, hidden)      and block(hidden) where that is the stream
        hidden = block'(hidden)              "compressed": what the finished prefix really produces
              or block(hidden)               "original": what the model this step received produces

With a `StepStore` every finished block, its rows and the hidden states behind it are on disk before
the next block is begun, so a run killed at any point continues at the next block with the very
arrays it would have had.
"""

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxcomp.core.metrics import Row
from jaxcomp.core.store import StoredTree, save_tree
from jaxcomp.core.tree import named_leaves
from jaxcomp.models.decoder import Block, Decoder, load_block
from jaxcomp.models.stream import Hidden, embed_batches, step_batches
from jaxcomp.parallel.mesh import Placement

log = logging.getLogger(__name__)

Metrics = dict[
    str, dict[str, float | int | str | list[float]]
]  # path of a linear ("" for the block) → numbers


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Token windows to calibrate on.

    Attributes:
      tokens: int32 `[samples, length]`.
      batch: windows that go through a block at once.
    """

    tokens: Int[np.ndarray, "samples length"]
    batch: int = 4


@dataclasses.dataclass(frozen=True)
class BlockStep:
    """What a visitor sees of one block.

    Attributes:
      index: position among the blocks, for messages only.
      block: the block with its arrays on the device, in their stored dtypes.
      hidden: its inputs on the host, one array a batch; empty when the method needs none. With
        several processes, the rows of each batch that this one holds.
      outputs: what the block gives for them, where the stream is the "original" one; else empty.
      place: to be handed to every pass over `hidden`; where it has several processes, a number
        taken from `hidden` in any other way is this process's own.
    """

    index: int
    block: Block
    hidden: Hidden
    outputs: Hidden = dataclasses.field(default_factory=list)
    place: Placement = Placement()


Visit = Callable[[BlockStep], tuple[Block, Metrics]]
Progress = Callable[[str, int, int, list[Row]], None]  # step, blocks done, blocks, rows so far


class StepStore:
    """The unfinished work of one step, in a directory: finished blocks, rows, hidden states.

    `state.json` is written last and atomically; what it names is complete. A step that does not go
    block by block keeps what it found as JSON values, see `keep`.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def resume(self) -> tuple[int, list[Row]]:
        """Blocks finished so far and their rows."""
        try:
            state = json.loads((self.path / "state.json").read_text())
        except FileNotFoundError:
            return 0, []
        return state["done"], [Row(**row) for row in state["rows"]]

    def block(self, index: int) -> StoredTree | None:
        """A finished block; None where it is the one that the step was given."""
        place = self.path / f"blocks.{index}"
        return StoredTree(place) if place.exists() else None

    def part(self, name: str) -> "StepStore":
        """The store of a part of this step, for a step that walks the blocks more than once."""
        return StepStore(self.path / name)

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value kept under `name`, made the first time and complete or not there."""
        place = self.path / f"{name}.kept.json"
        if not place.exists():
            text = json.dumps(make(), allow_nan=False)
            write_whole(place, lambda f: f.write(text.encode()))
        return json.loads(place.read_text())

    def keep_tree(self, name: str, make: Callable[[], Any]) -> Any:
        """The same for a tree of nodes and arrays, which come back as numpy arrays."""
        place = self.path / f"{name}.kept"
        return (StoredTree(place) if place.exists() else save_tree(place, make())).load()

    def hidden(self, done: int) -> Hidden:
        """The hidden states behind `done` finished blocks."""
        with np.load(self.path / f"hidden.{done}.npz") as stored:
            dtype = jnp.dtype(str(stored["dtype"]))
            return [stored[f"{i}"].view(dtype) for i in range(len(stored.files) - 1)]

    def finish(
        self, index: int, block: Block | None, hidden: Hidden, rows: list[Row]
    ) -> StoredTree | None:
        """Records that block `index` is finished; returns its handle.

        A block that did not change is None, and so is its handle.
        """
        place = self.path / f"blocks.{index}"
        shutil.rmtree(place, ignore_errors=True)  # written by a run killed before its state.json
        handle = None if block is None else save_tree(place, block)
        done = index + 1
        if hidden:
            write_whole(
                self.path / f"hidden.{done}.npz", lambda f: np.savez(f, **_as_bytes(hidden))
            )
        state = {"done": done, "rows": [dataclasses.asdict(row) for row in rows]}
        write_whole(self.path / "state.json", lambda f: f.write(json.dumps(state).encode()))
        (self.path / f"hidden.{done - 1}.npz").unlink(missing_ok=True)
        return handle


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Lets `write` fill a file, which appears complete or not at all.

    Raises:
      OSError: it cannot be written; the message names the place and what to do.
    """
    part = path.with_name(f"{path.name}.tmp")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"writing {path} failed: {error}; free some space there and run again: finished blocks "
            "are kept",
        ) from error


@dataclasses.dataclass(frozen=True)
class Run:
    """How a step is run, as opposed to what it does.

    Attributes:
      store: where finished blocks go; None keeps them in memory and cannot resume.
      progress: told after every block.
      mesh: devices that share every batch, from `jaxcomp.parallel.data_mesh`. They may belong to
        several processes, each of which then calls the method with the same model, text and
        settings, without a store, and gets the same blocks.
      original: the model as the recipe was given it, for a step that looks at what the steps before
        it changed; see `needs_original`.
    """

    store: StepStore | None = None
    progress: Progress | None = None
    mesh: Mesh | None = None
    original: Decoder | None = None

    def needs_original(self, name: str) -> Decoder:
        """The original, for the step `name`.

        Raises:
          ValueError: the run has none.
        """
        if self.original is None:
            raise ValueError(
                f"{name} looks at the model as it was before the recipe, and the run has none; "
                "call it inside a recipe, or with Run(original=…)"
            )
        return self.original

    @property
    def place(self) -> Placement:
        """Between the host and the mesh."""
        return Placement(self.mesh)


class Result(NamedTuple):
    """What a method returns: the new model, its blocks perhaps behind handles, and the rows."""

    model: Decoder
    rows: list[Row]


def blockwise(
    name: str,
    model: Decoder,
    calib: Calibration | None,
    visit: Visit,
    inputs: Literal["compressed", "original"] | None = "compressed",
    run: Run = Run(),
) -> Result:
    """Lets `visit` change every block in turn.

    Args:
      name: the method's name in rows and messages.
      calib: windows to stream through the model; needed unless `inputs` is None.
      visit: gets a block and its inputs, returns the new block and its metrics; a block that it
        returns as it came is not stored.
      inputs: which model produces the inputs of the next block; None streams nothing.

    Raises:
      ValueError: no calibration where one is needed; NaN or infinity in weights or activations; a
        batch that the mesh cannot share; a store where several processes share it.
    """
    place = run.place
    if inputs:
        check_text(name, calib)
    if run.store and place.processes > 1:
        raise ValueError(
            f"{name} has a store and a mesh over {place.processes} processes, of whose hidden "
            "states a store keeps only its own; leave the store out, and save what process 0 gets"
        )
    if inputs:
        check_batches(calib, place)
    total = len(model.blocks)
    done, rows = run.store.resume() if run.store else (0, [])
    blocks = [run.store.block(i) or model.blocks[i] for i in range(done)] if run.store else []
    hidden: Hidden = []
    if inputs and done < total:
        hidden = run.store.hidden(done) if done else _embedded(model, calib, place)
    if run.progress:
        run.progress(name, done, total, rows)
    for index in range(done, total):
        started = time.perf_counter()
        block = jax.device_put(load_block(model.blocks[index]))
        check_finite(block, f"the weights of block {index}")
        outputs: Hidden = []
        if inputs == "original":
            outputs = step_batches(block, hidden, place=place)
        new, metrics = visit(BlockStep(index, block, hidden, outputs, place))
        last = index + 1 == total
        if inputs == "compressed" and not last:
            outputs = step_batches(jax.device_put(new), hidden, place=place)
        hidden = [] if last else outputs
        seconds = time.perf_counter() - started
        rows = rows + [
            Row(name, index, linear or None, values) for linear, values in metrics.items() if linear
        ]
        rows.append(Row(name, index, None, metrics.get("", {}), seconds))
        log.info("%s block %d/%d: %.1f s", name, index + 1, total, seconds)
        kept = new is block
        del block
        if run.store:
            new = run.store.finish(index, None if kept else new, hidden, rows)
        blocks.append(model.blocks[index] if kept else new)
        if run.progress:
            run.progress(name, index + 1, total, rows)
    return Result(model.replace(blocks=tuple(blocks)), rows)


def check_finite(tree: Any, what: str) -> None:
    """Refuses NaN and infinity.

    Raises:
      ValueError: names `what` and the leaf.
    """
    for path, leaf in named_leaves(tree).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(leaf))):
            bad = int(jnp.sum(~jnp.isfinite(leaf)))
            where = f", {path}" if path else ""
            raise ValueError(
                f"{what}{where}: {bad} of {leaf.size} values are NaN or infinity; "
                "the checkpoint is damaged or overflowed in its dtype, fetch it again"
            )


def check_text(name: str, calib: Calibration | None) -> None:
    """Refuses to begin without calibration text.

    Raises:
      ValueError: there is none.
    """
    if calib is None:
        raise ValueError(f"{name} needs calibration text; give the recipe a CalibSpec as `calib`")


def check_one_process(name: str, place: Placement) -> None:
    """Refuses several processes, for a step that looks at the whole text.

    Raises:
      ValueError: there are several; says what to do.
    """
    if place.processes > 1:
        raise ValueError(
            f"{name} looks at the whole text, and {place.processes} processes hold a part each; "
            "give it a mesh over the devices of one process"
        )


def check_batches(calib: Calibration, place: Placement, count: str = "calib.samples") -> None:
    """Refuses batches that the devices cannot share evenly.

    Args:
      count: the setting that says how many windows there are.

    Raises:
      ValueError: names the batch, the number of devices and what to set.
    """
    samples, n = len(calib.tokens), place.devices
    if samples >= calib.batch:
        instead = f"set calib.batch to a multiple of {n}"
        place.check_batch(calib.batch, "the batch of calibration windows", instead)
    instead = f"set {count} to a multiple of {calib.batch}"
    place.check_batch(samples % calib.batch, "the last batch of calibration windows", instead)


def first_windows(calib: Calibration, count: int | None, place: Placement) -> Calibration:
    """The first `count` windows, all where None, in batches that the devices share evenly.

    Raises:
      ValueError: see `check_batches`; names the setting `windows` where it is what limits them.
    """
    fewer = count is not None and count < len(calib.tokens)
    calib = dataclasses.replace(calib, tokens=calib.tokens[:count])
    check_batches(calib, place, "windows" if fewer else "calib.samples")
    return calib


def _embedded(model: Decoder, calib: Calibration, place: Placement) -> Hidden:
    starts = range(0, len(calib.tokens), calib.batch)
    shares = [place.share(calib.tokens[i : i + calib.batch]) for i in starts]
    hidden = [x for tokens in shares for x in embed_batches(model, tokens, len(tokens))]
    check_finite(hidden, "the embedding of the calibration text, batch")
    return hidden


def _as_bytes(hidden: Hidden) -> dict[str, np.ndarray]:
    """npz knows no bfloat16: raw words and the dtype's name."""
    dtype = hidden[0].dtype
    word = np.dtype(f"u{dtype.itemsize}")
    return {"dtype": np.array(dtype.name)} | {f"{i}": x.view(word) for i, x in enumerate(hidden)}
