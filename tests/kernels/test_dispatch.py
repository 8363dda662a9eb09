import logging
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, use
from pallas_kernels.chips import CHIPS, Chip, chip_of, default_chip

OP = "pallas_kernels.double"
NAMES = {"cpu": ("fast", "slow"), "tpu": ("slow",)}


def reference(x, *, times):
    return x * times


@pytest.fixture
def made(monkeypatch):
    """Modules of an operation that is not there, and the log of what was called."""
    log = []

    def add(name, refuses=None):
        def double(x, *, times, chip, interpret):
            log.append((name, chip.name, interpret))
            if refuses:
                raise refuses(f"{name} takes no such shape")
            return x * times + 1  # a kernel's own result, to be told from the reference's

        module = types.ModuleType(f"{OP}.{name}")
        module.double = double
        monkeypatch.setitem(sys.modules, module.__name__, module)

    dispatch.tell_once.cache_clear()
    return add, log


def call(x=1.0, **kwargs):
    return dispatch.first_supported(OP, NAMES, reference, x, times=3.0, **kwargs)


def test_the_first_implementation_that_does_not_refuse_is_used_and_the_refusal_told_once(
    made, caplog
):
    add, log = made
    add("fast", NotImplementedError)
    add("slow")
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert call() == 4.0 and call() == 4.0
    assert [name for name, *_ in log] == ["fast", "slow"] * 2
    assert [r.message.count("fast takes no such shape") for r in caplog.records] == [1]


def test_the_reference_is_last_and_gives_the_gradient(made):
    add, _ = made
    add("fast", NotImplementedError)
    add("slow", NotImplementedError)
    assert call() == 3.0
    add("fast")
    assert jax.grad(call)(1.0) == 3.0
    assert jax.jit(jax.grad(lambda x: jnp.sum(call(x))))(jnp.ones(2)).tolist() == [3.0, 3.0]


def test_other_errors_are_not_taken_for_a_refusal(made):
    add, log = made
    add("fast", ValueError)
    with pytest.raises(ValueError, match="fast takes"):
        call()
    assert len(log) == 1


def test_use_chooses_a_chip_an_interpreter_or_the_reference_and_is_undone(made):
    add, log = made
    add("fast")
    add("slow")
    with use("v6e", interpret=True):
        assert call() == 4.0
        with use(reference=True):
            assert call() == 3.0
    assert call() == 4.0
    assert log == [("slow", "v6e", True), ("fast", "cpu", False)]
    with pytest.raises(ValueError, match=r"chip='v9' is unknown; use one of cpu, v5e"), use("v9"):
        pass


def test_a_compiled_function_does_not_keep_the_implementation_of_another_setting(made):
    add, _ = made
    add("fast")
    f = jax.jit(lambda x: call(x))
    assert f(1.0) == 4.0
    with use(reference=True):
        assert f(1.0) == 3.0
    assert f(1.0) == 4.0


@pytest.mark.parametrize("wish", ["reference", "", "fast"])
def test_the_environment_can_force_the_reference(wish):
    code = "from pallas_kernels import dispatch; print(dispatch._setting.reference)"
    env = os.environ | {"JAXCOMP_KERNELS": wish}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(wish == "reference"), done.stderr


def test_a_device_is_known_by_its_kind():
    assert default_chip() is CHIPS["cpu"]
    assert chip_of("NVIDIA H100 80GB HBM3", "gpu") is CHIPS["h100"]
    assert chip_of("NVIDIA A100-SXM4", "gpu") == Chip("nvidia a100-sxm4", "gpu", ())
