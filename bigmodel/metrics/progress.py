"""The live line: step, loss, tokens per second, time left.

A terminal has one moving line; a log gets a line every LOG_SECONDS.
"""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LOG_SECONDS = 10.0  # between lines when the output is not a terminal


class LiveLine:
    """Shows a run's progress on rank 0; `enabled=False` shows nothing."""

    def __init__(self, first_step: int, num_steps: int, enabled: bool) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._enabled = enabled
        self._num_steps = num_steps
        self._started = time.monotonic()
        self._first_step = first_step
        self._last_line = 0.0
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            columns = (
                TextColumn("step {task.completed}/{task.total}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
            )
            self._bar = Progress(
                *columns, TextColumn("{task.fields[news]}", markup=False), TimeRemainingColumn(), console=self._console
            )
            self._task = self._bar.add_task("train", total=num_steps, completed=first_step, news="")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line of its own, above the moving one."""
        if self._enabled:
            (self._bar.console if self._bar else self._console).print(text, soft_wrap=True, markup=False)

    def update(self, step: int, loss: float, tokens_per_second: float, warning: str = "") -> None:
        """Show the state after `step` steps; loss in nats per token. warning: of what lasts."""
        if not self._enabled:
            return
        news = f"loss {loss:.3f}  {_thousands(tokens_per_second)} tokens/s{f'  {warning}' if warning else ''}"
        if self._bar:
            self._bar.update(self._task, completed=step, news=news)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_SECONDS or step == self._num_steps:
            self._last_line = now
            left = (now - self._started) / max(1, step - self._first_step) * (self._num_steps - step)
            self._console.print(f"step {step}/{self._num_steps}  {news}  {left:.0f} s left", soft_wrap=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _thousands(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"
