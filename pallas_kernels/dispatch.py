"""Choose an implementation: the first that does not refuse the device or the shape.

An implementation refuses with `NotImplementedError`; every other error is the caller's or ours and
passes through. The reference is always last and refuses nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any


def first_supported(implementations: Sequence[Callable], *args: Any, **kwargs: Any) -> Any:
    """The result of the first implementation that takes these arguments."""
    refusals = []
    for implementation in implementations:
        try:
            return implementation(*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{implementation.__module__}: {refusal}")
    raise NotImplementedError("no implementation takes this call:\n" + "\n".join(refusals))
