"""The dry run: it reads no block, and what it says is made of what the compiler knows."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration
from jaxcomp.calibrate.plan import ModelPlan, Program, check_steps, plan, tree_bytes
from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.scheme import Override
from jaxcomp.methods import GPTQ, RTN, FlatQuant, SmoothQuant
from jaxcomp.models.decoder import Block, block_struct
from jaxcomp.models.depth import drop
from jaxcomp.models.stream import block_step
from tests import tiny

TOKENS = np.zeros((6, 16), np.int32)


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A handle that knows its structure and must not be asked for more."""

    block: Block

    def load(self):
        raise AssertionError("a dry run read a block")

    def struct(self):
        return jax.eval_shape(lambda: self.block)


@pytest.fixture(scope="module")
def model():
    made = tiny.model("qwen2", jax.random.key(0))
    return made.replace(blocks=tuple(Unreadable(b) for b in made.blocks))


def test_every_step_is_planned_without_reading_a_block(model):
    steps = plan(model, (SmoothQuant(), RTN(weight=QuantSpec(8))), Calibration(TOKENS, batch=3))
    assert [s.step for s in steps] == ["SmoothQuant", "RTN"]
    assert all(s.seconds > 0 for s in steps)


def test_the_peak_covers_the_block_its_float32_copy_and_the_hidden_states(model):
    (step,) = plan(model, (GPTQ(),), Calibration(TOKENS, batch=3))
    (longer,) = plan(model, (GPTQ(),), Calibration(np.zeros((6000, 16), np.int32), batch=3))
    hidden = 4 * 16 * model.config.d_model * (6000 - 6)
    assert step.peak_bytes > 2 * tree_bytes(block_struct(model.blocks[0]))
    assert longer.peak_bytes > step.peak_bytes + hidden  # resident memory itself may differ a bit


def test_a_step_that_leaves_the_weights_alone_has_nothing_to_compile(model):
    (step,) = plan(model, (RTN(weight=None),), None)
    assert step.seconds == 0


def test_a_step_is_planned_on_what_the_steps_before_it_make(model):
    calib = Calibration(TOKENS, batch=3)
    flat = FlatQuant(epochs=1, init="hadamard", finish="keep")
    everywhere = Override(blocks=(1,), weight_bits=16)
    after = check_steps(model, (flat, GPTQ(overrides=(everywhere,))), calib)
    first, second = after.blocks
    assert isinstance(first.attn.q.w, QTensor) and not isinstance(second.attn.q.w, QTensor)
    assert first.sites["ffn_mid"].transforms and second.sites["ffn_mid"].transforms


@pytest.mark.parametrize("steps", [(GPTQ(), FlatQuant(act=None)), (RTN(), GPTQ())])
def test_an_order_that_cannot_be_is_refused_before_anything_begins(model, steps):
    for ask in (plan, check_steps):
        with pytest.raises(ValueError, match=r"block 0, attn.q is (already quantized|quantized)"):
            ask(model, steps, Calibration(TOKENS, batch=3))


def test_a_step_without_the_text_it_needs_is_refused(model):
    with pytest.raises(ValueError, match="SmoothQuant needs calibration text"):
        check_steps(model, (RTN(weight=None), SmoothQuant()), None)


@dataclasses.dataclass(frozen=True)
class DropFirst:
    """A step that changes the number of blocks."""

    needs_text: ClassVar[bool] = False

    def check(self, model):
        if len(model.blocks) < 2:
            raise ValueError("one block is left")

    def plan_model(self, model, hidden, batches):
        program = Program(block_step, (block_struct(model.blocks[0]), hidden), 3 * batches)
        return ModelPlan([program], 100, drop(model, (0,)))


def test_a_step_that_removes_blocks_is_planned_as_a_whole(model):
    calib, everywhere = Calibration(TOKENS, batch=3), Override(blocks=(1,), weight_bits=16)
    after = check_steps(model, (DropFirst(), GPTQ()), calib)
    assert len(after.blocks) == 1 and after.kept == (1,)
    steps = plan(model, (DropFirst(), GPTQ()), calib)
    assert [s.step for s in steps] == ["DropFirst", "GPTQ"] and steps[0].seconds > 0
    with pytest.raises(ValueError, match="one block is left"):
        check_steps(model, (DropFirst(), DropFirst()), calib)
    with pytest.raises(ValueError, match="an override is for block 1"):
        check_steps(model, (DropFirst(), GPTQ(overrides=(everywhere,))), calib)
