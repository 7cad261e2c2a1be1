"""Progress drawn on the terminal: one bar a phase, with how many kernels are done of how many, and the seconds.

Writes to stderr only, so that `--json` output stays clean; where stderr is no terminal it prints one line a finished phase.
Implements flagtree.progress.Progress for the commands.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text


class Counted(ProgressColumn):
    """`done/total`, or only what is done where the total is not known."""

    def render(self, task: Task) -> Text:
        return Text(counted(int(task.completed), task.fields["known_total"]), style="progress.download")


def counted(done: int, total: int | None) -> str:
    if total is None:
        return str(done) if done else ""
    return f"{done}/{total}"


class Drawn:
    """A context manager: the bars live while it is open, and the last phase ends with it."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), BarColumn(bar_width=24), Counted(), TimeElapsedColumn(),
            console=self.console,
        )
        self._task: TaskID | None = None
        self._started = 0.0

    def __enter__(self) -> Drawn:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        if self.console.is_terminal:
            self._bars.stop()

    def phase(self, name: str, total: int | None = None) -> None:
        self._finish()
        self._started = time.monotonic()
        self._task = self._bars.add_task(name, total=total, known_total=total)

    def advance(self, count: int = 1) -> None:
        if self._task is not None:
            self._bars.advance(self._task, count)

    def _finish(self) -> None:
        if self._task is None:
            return
        task = next(t for t in self._bars.tasks if t.id == self._task)
        done = task.completed
        self._bars.update(self._task, total=done or 1, completed=done or 1)  # the bar is full, the count stays what it was
        self._bars.stop_task(self._task)
        if not self.console.is_terminal:
            words = (str(task.description), counted(int(done), task.fields["known_total"]), f"{time.monotonic() - self._started:.1f} s")
            self.console.print(" ".join(w for w in words if w), highlight=False, markup=False)
        self._task = None
