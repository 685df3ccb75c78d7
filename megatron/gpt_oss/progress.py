# Copyright (c) 2026, the megatron-core gptoss authors.

"""One live line on stderr; silent where stderr is no terminal."""

import sys
import time


class Progress:
    """Share done, speed and time left.

    Args:
        total: of the work, in units of `advance`.
        unit: shown after the amounts.
        scale: factor from `advance`'s unit to the shown one.
        enabled: False shows nothing.
    """

    def __init__(self, total: float, unit: str, scale: float = 1.0, enabled: bool = True):
        self._total, self._unit, self._scale = max(total, 1e-9), unit, scale
        self._enabled = enabled and sys.stderr.isatty()
        self._done = self._before = 0.0
        self._start = time.monotonic()
        self._shown = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        if self._enabled and self._shown:
            print(file=sys.stderr)

    def begin_at(self, done: float) -> None:
        """Count what an earlier process did, which says nothing of the speed of this one."""
        self._done = self._before = done

    def advance(self, amount: float, note: str = "") -> None:
        """Count work as done; the line is redrawn ten times a second at most."""
        self._done += amount
        now = time.monotonic()
        if not self._enabled or (now - self._shown < 0.1 and self._done < self._total):
            return
        self._shown = now
        speed = (self._done - self._before) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / max(speed, 1e-9)
        line = (
            f"{100 * self._done / self._total:5.1f} %  "
            f"{self._done * self._scale:.1f} of {self._total * self._scale:.1f} {self._unit}  "
            f"{speed * self._scale:.1f} {self._unit}/s  {left:.0f} s left  {note}"
        )
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
