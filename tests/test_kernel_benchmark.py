import argparse
import dataclasses

import pytest

from benchmarks import kernels
from pallas_kernels.chips import CHIPS

ARGS = argparse.Namespace(
    only=None, quick=True, share=0.4, repeats=2, models=["smollm2-135m"], tokens=[1]
)


def test_a_call_is_bound_by_its_bytes_or_by_its_operations():
    few = kernels.product_job("x", "W8A8", (4096, 4096), 1, CHIPS["h100"])
    many = dataclasses.replace(few, operations=few.operations * 10_000)
    assert kernels.limit(few, CHIPS["h100"]) == pytest.approx(4096 * 4096 / 3350e9, rel=0.01)
    assert kernels.limit(many, CHIPS["h100"]) == pytest.approx(2 * 4096**2 * 1e4 / 1979e12)
    assert kernels.limit(few, CHIPS["cpu"]) is None


def test_what_there_is_no_time_for_is_listed_and_not_run(monkeypatch):
    monkeypatch.setattr(kernels.Clock, "left", lambda self: 0.0)
    clock = kernels.Clock(60)
    checks, unchecked = kernels.check(CHIPS["cpu"], ARGS, clock)
    rows, left_out = kernels.measure(CHIPS["cpu"], ARGS, clock)
    assert not checks and not rows
    assert any(name.startswith("quant_matmul/") for name in unchecked)
    assert "smollm2-135m qkv W4A16/1/XLA bf16" in left_out


def test_a_wrong_result_and_a_refusal_are_told_apart(monkeypatch):
    def wrong(x, w, out_dtype, chip, interpret):
        return x[..., :1] * 0.0

    def refusing(x, w, out_dtype, chip, interpret):
        raise NotImplementedError("no such shape")

    monkeypatch.setattr(kernels, "prepared", lambda w, *_: w)
    for f, result in ((wrong, "wrong"), (refusing, "refused")):
        monkeypatch.setattr(kernels, "implementation", lambda op, name, f=f: f)
        row = kernels.check_one("quant_matmul", "native", "m2", CHIPS["cpu"])
        assert row["result"] == result
    assert kernels.summary([row, row]) == [["quant_matmul", "native", 0, 2, 0]]


def test_attention_is_timed_over_caches_of_codes_and_of_floats():
    args = argparse.Namespace(**vars(ARGS) | {"only": ["quant_decode_attention"]})
    jobs = {job.name.split()[-1]: job for job in kernels.jobs(CHIPS["h100"], args)}
    assert list(jobs) == ["KV4", "KV8", "KV16"]
    assert all("mosaic_gpu" in job.contestants for job in jobs.values())
    assert "XLA bf16" in jobs["KV16"].contestants and "XLA packed" in jobs["KV4"].contestants
    rows = 2 * 3 * 512  # keys and values of three kv heads
    assert [job.bytes / rows for job in jobs.values()] == [32 + 5, 64 + 4, 128]
    assert len(jobs["KV16"].contestants["XLA bf16"](1)) == 1
