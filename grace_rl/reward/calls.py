"""Calling what may never return: in threads that the caller can stop waiting for.

Plain functions run one after the other in one thread, coroutines together on one event loop in
another; both live as long as the run, because clients keep connections that belong to their loop
and thread, and both are daemons, so that nothing they do keeps the process from ending. Whoever
waits can be interrupted (Ctrl-C reaches the main thread only) and has time limits.

A call that is given up goes on behind our back where Python cannot end it: a coroutine is
cancelled, a plain function is left alone in its thread and the next one gets a new thread.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future, wait
from queue import SimpleQueue
from typing import Any

import torch

ANSWERS = 1.0  # seconds after which an event loop that does not answer is blocked
LOOKS_UP = 1.0  # seconds after which whoever waits sees a signal that another thread received


class Calls:
    """Runs calls that never raise: what they return tells how they ended."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] | None = None
        self._loop: _Loop | None = None
        self._given_up: dict[str, Future[Any]] = {}

    def run(self, owner: str, function: Callable[[], Any], limit: float | None) -> Any:
        """Call a function in the thread of functions and return what it returns.

        Args:
            owner: Who has one call at a time.
            function: Raises nothing.
            limit: Seconds; None is no limit.

        Raises:
            TimeoutError: The limit is over; or the owner's last call was given up and still runs.
        """
        before = self._given_up.pop(owner, None)
        if before is not None and not before.done():
            self._given_up[owner] = before
            raise TimeoutError("its last call was given up and still runs")
        if self._jobs is None:
            self._jobs = SimpleQueue()
            threading.Thread(target=_run_jobs, args=(self._jobs,), daemon=True).start()
        future: Future[Any] = Future()
        self._jobs.put(lambda: future.set_result(function()))
        try:
            return _result(future, time.monotonic(), limit)
        except TimeoutError:
            self._given_up[owner] = future
            self._leave_thread()  # the next call needs one that is free
            raise

    def run_together(
        self, coroutines: Sequence[tuple[str, Coroutine[Any, Any, Any], float | None]]
    ) -> list[Any]:
        """Await coroutines together on the loop.

        Args:
            coroutines: Owner, coroutine and limit of each, as for `run`.

        Returns:
            For each what it returned; or the exception that `run` would raise.
        """
        if not coroutines:
            return []
        self._loop = loop = self._loop or _Loop()
        began = time.monotonic()
        futures = [loop.submit(coroutine) for _, coroutine, _ in coroutines]
        limits = [math.inf if limit is None else limit for _, _, limit in coroutines]
        results: dict[int, Any] = {}
        blocked: Future[Any] | None = None  # done when the loop answers again
        for i in sorted(range(len(futures)), key=limits.__getitem__):
            owner, future = coroutines[i][0], futures[i]
            try:
                if blocked is None:
                    results[i] = _result(future, began, coroutines[i][2])
                else:
                    results[i] = future.result(0)
            except CancelledError as error:  # by another call on the loop, before it had begun
                results[i] = error
            except TimeoutError as error:
                future.cancel()
                results[i] = error
                if blocked is not None:
                    results[i] = TimeoutError(
                        "another call blocks the event loop, which they share"
                    )
                elif (answer := loop.no_answer()) is not None:
                    blocked = self._given_up[owner] = answer
        if blocked is not None:  # the others go on with a new one
            loop.end()
            self._loop = None
        return [results[i] for i in range(len(futures))]

    def _leave_thread(self) -> None:
        if self._jobs is not None:
            self._jobs.put(None)
        self._jobs = None

    def __del__(self) -> None:
        self._leave_thread()
        if self._loop is not None:
            self._loop.end()


class _Loop:
    """An event loop that outlives whatever is run on it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._ended = threading.Event()
        arguments = (self.loop, self._ended)
        threading.Thread(target=_run_loop, args=arguments, daemon=True).start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def no_answer(self) -> Future[Any] | None:
        """None if it answers; else the answer that is not there yet."""
        answer = self.submit(asyncio.sleep(0))
        try:
            answer.result(ANSWERS)
        except TimeoutError:
            return answer
        return None

    def end(self) -> None:
        self._ended.set()
        self.loop.call_soon_threadsafe(self.loop.stop)


def _result(future: Future[Any], began: float, limit: float | None) -> Any:
    """What it answers. The waiting thread looks up now and then: a signal can reach another one,
    and Python handles it in the main thread only."""
    end = math.inf if limit is None else began + limit
    while not future.done():
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {limit:g} s")
        wait([future], min(left, LOOKS_UP))
    return future.result()


def _run_loop(loop: asyncio.AbstractEventLoop, ended: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    torch.set_grad_enabled(False)  # in this thread
    while not ended.is_set():
        try:
            loop.run_forever()  # until a call stops it, or lets SystemExit out of a task of its own
        except BaseException:
            continue
    loop.close()


def _run_jobs(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    loop = asyncio.new_event_loop()  # as the main thread has one
    asyncio.set_event_loop(loop)
    torch.set_grad_enabled(False)
    while (job := jobs.get()) is not None:
        job()
    loop.close()
