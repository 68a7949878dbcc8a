"""The training line: step, loss, tokens per second, MFU, time left, the next save and evaluation.

A terminal has one moving line, which fits its width: what comes last is left out first. A log gets a line every
LOG_SECONDS, for example:

    step 718/1100  loss 3.912  8.7k tokens/s  MFU 18.0%  2 min left  save at 800  evaluation at 825
"""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bigmodel.sizes import duration, short_number

LOG_SECONDS = 10.0  # between lines when the output is not a terminal
LEAST_BAR = 8  # columns
FRAMES_PER_SECOND = 4
SHORT_WORDS = (
    ("step ", ""),
    ("tokens/s", "tok/s"),
    (" min left", "m left"),
    ("save at", "save"),
    ("evaluation at", "eval"),
)


class LiveLine:
    """Shows a run's progress on rank 0; `enabled=False` shows nothing."""

    def __init__(self, first_step: int, num_steps: int, enabled: bool) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._enabled = enabled
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None  # the first step shown, and when: before, ranks compile
        self._last_line = 0.0
        self._step, self._parts = first_step, [f"step {first_step}/{num_steps}"]
        self._live: Live | None = None
        if enabled and self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._line, refresh_per_second=FRAMES_PER_SECOND)
            self._live.start()

    def say(self, text: str) -> None:
        """A line of its own, above the moving one."""
        if self._enabled:
            self._console.print(text, soft_wrap=True, markup=False)

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        warning: str = "",
        utilization: float | None = None,
        due: Mapping[str, int] = {},
    ) -> None:
        """Show the state after `step` steps; loss in nats per label. warning: of what lasts. utilization: of the
        devices' FLOPs. due: what comes next -> its step; 0: unknown."""
        if not self._enabled:
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        before, then = self._first
        left = (now - then) / (step - before) * (self._num_steps - step) if step > before else None
        parts = [
            f"step {step}/{self._num_steps}",
            f"loss {loss:.3f}",
            f"{short_number(tokens_per_second)} tokens/s",
            warning,
            f"MFU {utilization:.1%}" if utilization is not None else "",
            f"{duration(left)} left" if left is not None else "",
            *(f"{what} at {when}" for what, when in due.items() if when),
        ]
        self._step, self._parts = step, [part for part in parts if part]
        if not self._live and (now - self._last_line >= LOG_SECONDS or step == self._num_steps):
            self._last_line = now
            self._console.print("  ".join(self._parts), soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _line(self) -> Text:
        width, step = self._console.width, self._step
        text = fitted(self._parts, width)
        room = width - len(text) - 2
        line = Text(text, no_wrap=True, overflow="crop")
        if room >= LEAST_BAR:
            done = round(room * step / max(1, self._num_steps))
            line.append("  ").append("━" * done, "bar.complete").append("━" * (room - done), "bar.back")
        return line


def fitted(parts: list[str], width: int) -> str:
    """The parts on one line: as they are, else in short words, else closer together, else without the last ones.

    >>> parts = ["step 7/9", "loss 3.9", "8.7k tokens/s", "2 min left", "save at 8", "evaluation at 9"]
    >>> fitted(parts, 60)
    '7/9  loss 3.9  8.7k tok/s  2m left  save 8  eval 9'
    >>> fitted(parts, 30)
    '7/9 loss 3.9 8.7k tok/s'
    """
    text = "  ".join(parts)
    if len(text) <= width:
        return text
    for long, short in SHORT_WORDS:
        parts = [part.replace(long, short) for part in parts]
    if len("  ".join(parts)) <= width:
        return "  ".join(parts)
    while len(parts) > 1 and len(" ".join(parts)) > width:
        parts = parts[:-1]
    return " ".join(parts)[:width]
