"""Where the time of a step goes: seconds by phase, as metrics `time/<phase>`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PHASES = ("rollout", "embed", "reward", "train", "sync")


class PhaseClock:
    """Seconds spent in each phase; a phase inside another counts for itself only.

    >>> clock = PhaseClock()
    >>> with clock("rollout"), clock("sync"):
    ...     pass
    >>> clock.seconds["rollout"] < 1, clock.seconds["train"]
    (True, 0.0)
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._inner: list[float] = []  # of the phases under way: spent in phases inside

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] += spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def wrapped(self, phase: str, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function, timed."""

        def timed() -> Any:
            with self(phase):
                return function()

        return timed

    def take(self) -> list[float]:
        """Seconds of `PHASES` since the last time, which begin anew."""
        spent = list(self.seconds.values())
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return spent
