import os
import pathlib
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import jaxcomp
from jaxcomp import job
from jaxcomp.calibrate import Calibration, Run, StepStore, blockwise
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.tree import named_leaves
from jaxcomp.methods import AWQ, GPTQ, QuaRot
from jaxcomp.parallel import Placement, data_mesh
from jaxcomp.recipe import CalibSpec, Recipe
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
WORKER = pathlib.Path(__file__).with_name("worker.py")
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
LIMITS = {  # largest difference over largest entry
    "stats": 1e-5,
    "gradient": 1e-5,
    "fitted": 1e-4,
    "GPTQ/row": 1e-5,
    "SmoothQuant/model": 1e-5,
    "RTN/model": 1e-5,
}


class Pretended(Placement):
    """A placement that reports more devices and processes than there are."""

    devices = property(lambda self: 3)
    processes = property(lambda self: 2)


def start(devices, *args):
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", PYTHONPATH=places)
    command = [sys.executable, str(WORKER), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def wait(*processes):
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)  # seconds; a quarter of it on idle cores
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Numbers without a mesh, and on eight devices of one process."""
    out = tmp_path_factory.mktemp("devices") / "out"
    wait(start(8, out))
    return np.load(f"{out}.alone.npz"), np.load(f"{out}.mesh.npz")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Numbers of two processes that share a mesh of four devices."""
    out = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    wait(*(start(2, out / str(i), port, i, 2) for i in range(2)))
    return [np.load(out / f"{i}.mesh.npz") for i in range(2)]


def assert_close(found, expected):
    assert set(found.files) == set(expected.files)
    for group, limit in LIMITS.items():
        names = [name for name in expected.files if name.startswith(f"{group}/")]
        assert names, group
        for name in names:
            x, y = (a[name].astype(np.float64) for a in (found, expected))
            assert np.abs(x - y).max() <= limit * np.abs(y).max(), name
    for name in expected.files:
        if name.endswith(("mse_before", "mse_after")):
            np.testing.assert_allclose(found[name], expected[name], rtol=0.05)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(one_process):
    alone, mesh = one_process
    assert_close(mesh, alone)


@pytest.mark.slow
def test_two_processes_compute_what_one_does_and_end_with_the_same_bits(one_process, two_processes):
    alone, _ = one_process
    first, second = two_processes
    assert_close(first, alone)
    for name in first.files:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.slow
def test_a_program_compiles_once_for_all_blocks_on_a_mesh_too(one_process):
    for numbers in one_process:
        counts = {k: int(numbers[k]) for k in numbers.files if "/compiled/" in k}
        assert counts["FlatQuant/compiled/fit_step"] == 1
        assert max(counts.values()) == 1


FUSE = """
import jax, numpy as np
from jaxcomp.calibrate import Calibration, Run
from jaxcomp.calibrate.group_fit import PROGRAMS
from jaxcomp.core.tree import named_leaves
from jaxcomp.methods import FuseGPT
from jaxcomp.parallel import data_mesh
from tests import tiny

model = tiny.model("qwen2", jax.random.key(0), num_hidden_layers=3)
calib = Calibration(np.asarray(tiny.tokens(jax.random.key(1), 8, 12)), batch=4)
step = FuseGPT(1, rank=4, lora_rank=4, batch=4, epochs=2, lr=1e-2, lora_lr=1e-3)
alone = step(model, calib)
for program in PROGRAMS:
    program.clear_cache()
mesh = step(model, calib, Run(mesh=data_mesh()))
assert mesh.model.kept == alone.model.kept
expected = named_leaves(alone.model.blocks)
for name, leaf in named_leaves(mesh.model.blocks).items():
    np.testing.assert_allclose(leaf, expected[name], atol=2e-5, err_msg=name)
assert [program._cache_size() for program in PROGRAMS] == [1] * len(PROGRAMS)
"""


@pytest.mark.slow
def test_a_group_is_fused_on_two_devices_as_on_one():
    flags = f"{QUICK} --xla_force_host_platform_device_count=2"
    env = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", FUSE]
    wait(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))


def model_and_calibration(samples=8, batch=4):
    tokens = np.asarray(tiny.tokens(jax.random.key(1), samples, 16))
    return tiny.model("llama", jax.random.key(0)), Calibration(tokens, batch)


def test_a_mesh_of_one_device_changes_nothing():
    model, calib = model_and_calibration()
    alone, mesh = (GPTQ(QuantSpec(4))(model, calib, Run(mesh=m)) for m in (None, data_mesh()))
    expected = named_leaves(alone.model.blocks)
    for name, leaf in named_leaves(mesh.model.blocks).items():
        np.testing.assert_array_equal(leaf, expected[name])


def test_batches_come_back_from_the_mesh_as_they_went():
    x, place = np.arange(24.0, dtype=np.float32).reshape(4, 3, 2), Placement(data_mesh())
    np.testing.assert_array_equal(place.get(place.put(place.share(x))), x)
    tree = {"a": jax.numpy.ones(3)}
    np.testing.assert_array_equal(place.local(place.replicate(tree))["a"], np.ones(3))


@pytest.mark.parametrize(
    ("samples", "batch", "message"),
    [
        (8, 4, "batch of calibration windows is 4, which 3 devices .* calib.batch to a multiple"),
        (8, 6, "last batch of calibration windows is 2, which 3 .* calib.samples to a multiple"),
    ],
)
def test_a_batch_that_the_devices_cannot_share_is_refused(samples, batch, message):
    model, calib = model_and_calibration(samples, batch)
    run = types.SimpleNamespace(place=Pretended(), store=None)
    with pytest.raises(ValueError, match=message):
        GPTQ()(model, calib, run)


def test_what_several_processes_cannot_do_is_refused(tmp_path):
    model, calib = model_and_calibration()
    run = types.SimpleNamespace(place=Pretended(), store=StepStore(tmp_path), progress=None)
    with pytest.raises(ValueError, match="a store and a mesh over 2 processes"):
        blockwise("look", model, calib, lambda step: (step.block, {}), run=run)
    with pytest.raises(ValueError, match=r"AWQ searches .* the devices of one process"):
        AWQ(QuantSpec(4))(model, calib, run)


def test_a_method_that_reads_no_text_runs_under_any_mesh():
    model, _ = model_and_calibration()
    run = types.SimpleNamespace(place=Pretended(), store=None, progress=None)
    assert QuaRot()(model, None, run).rows


def test_the_main_job_shares_batches_if_asked_and_refuses_several_processes(tmp_path, monkeypatch):
    source = tiny.checkpoint("llama", jax.random.key(0), tmp_path / "model", num_hidden_layers=1)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.SENTENCES * 10))
    recipe = Recipe((GPTQ(QuantSpec(4)),), CalibSpec(str(text), samples=4, length=16, batch=2))
    report = jaxcomp.compress(source, recipe, tmp_path / "out", data_parallel=True)
    assert report.environment["data_parallel"] == jax.device_count()
    monkeypatch.setattr(job, "Placement", lambda mesh: Pretended(mesh))
    with pytest.raises(ValueError, match="is 2, which 3 devices cannot share evenly"):
        job.dry_run(source, recipe, data_parallel=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="compress is for one process, and this is one of 2"):
        jaxcomp.compress(source, recipe, tmp_path / "again")
