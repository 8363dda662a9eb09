"""Progress on a terminal: a bar a step or evaluation, with the error and the time that is left."""

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import rich.console
import rich.progress as bars

from jaxcomp.core.metrics import Row


class ConsoleProgress:
    """Bars on `console`; None or a console that is not a terminal prints a line now and then."""

    def __init__(self, console: rich.console.Console | None):
        self.console = console
        self._bar: bars.Progress | None = None
        self._task: Any = None

    def step(self, name: str, done: int, total: int, rows: list[Row]) -> None:
        """`calibrate.Run.progress`: `done` of `total` blocks, or steps of a training, are over."""
        if self.console is None:
            return
        if self._bar is None:
            if done:
                self.console.print(f"{name}: {done} of {total} are already done, resuming")
            self._bar = _bar(self.console)
            self._bar.start()
            self._task = self._bar.add_task(name, total=total, completed=done, note="")
        self._bar.update(self._task, completed=done, note=_error(rows))
        often = max(5, total // 20)
        if not self.console.is_terminal and done and (done % often == 0 or done == total):
            self.console.print(f"{name}: {done}/{total} {_error(rows)}", highlight=False)
        if done == total:
            self.close()

    def each(self, items: Iterable, name: str, total: int) -> Iterator:
        """The items, with a bar that moves as they are taken."""
        if self.console is None:
            yield from items
            return
        with _bar(self.console) as bar:
            task = bar.add_task(name, total=total, note="")
            for item in items:
                yield item
                bar.advance(task)

    def close(self) -> None:
        """Ends the current bar, finished or not."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(console: rich.console.Console) -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description:<22}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("[dim]{task.fields[note]}"),
        console=console,
        transient=not console.is_terminal,
    )


def _error(rows: list[Row]) -> str:
    """The newest block's median error, before and after where both are known; or the loss."""
    if rows and "loss" in rows[-1].metrics:
        return f"loss {rows[-1].metrics['loss']:.4f}"
    newest = [row for row in rows if row.linear and row.block == rows[-1].block]
    medians = {
        name: statistics.median(values)
        for name in ("error_before", "error_after", "weight_error")
        if (values := [row.metrics[name] for row in newest if name in row.metrics])
    }
    if "error_after" in medians:
        return f"error {medians['error_before']:.2e} → {medians['error_after']:.2e}"
    return f"weight error {medians['weight_error']:.2e}" if medians else ""
