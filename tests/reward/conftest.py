"""Several processes in one: threads that meet where the real ones would gather."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from grace_rl.reward import LoadedReward, RewardBatch, RewardRuntime


class World:
    """One runtime per simulated process; the same rewards on each."""

    def __init__(self, rewards: list[LoadedReward], processes: int) -> None:
        self.processes = processes
        self._barrier = threading.Barrier(processes, timeout=900)
        self._seen: list[Any] = [None] * processes
        self.runtimes = [
            RewardRuntime(
                rewards,
                gather=lambda tensor, i=i: torch.cat(self._exchange(i, tensor)),
                gather_object=lambda item, i=i: self._exchange(i, item),
                main_process=i == 0,
            )
            for i in range(processes)
        ]

    def _exchange(self, i: int, item: Any) -> list[Any]:
        self._seen[i] = item
        self._barrier.wait()
        everybody = list(self._seen)
        self._barrier.wait()
        return everybody

    def score(self, batches: list[RewardBatch]) -> list[Any]:
        """What each process returns or raises."""
        return self._each(lambda i: self.runtimes[i].score(batches[i]))

    def start(self) -> list[Any]:
        """As `score`, of `start_from`."""
        return self._each(lambda i: self.runtimes[i].start_from("policy"))

    def _each(self, call: Callable[[int], Any]) -> list[Any]:
        def one(i: int) -> Any:
            try:
                return call(i)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.processes) as threads:
            return list(threads.map(one, range(self.processes)))


@pytest.fixture
def world() -> Callable[[list[LoadedReward], int], World]:
    return World
