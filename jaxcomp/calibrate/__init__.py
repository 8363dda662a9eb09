"""The block loop: hidden states stream by, a method changes one block at a time."""

from jaxcomp.calibrate.stream import (
    BlockStep,
    Calibration,
    Result,
    Run,
    StepStore,
    blockwise,
)

__all__ = ["BlockStep", "Calibration", "Result", "Run", "StepStore", "blockwise"]
