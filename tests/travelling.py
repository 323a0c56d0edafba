"""A cluster that is none: what goes to its workers is pickled and comes out again, here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import pytest

from grace_rl.run.workers import Cluster, Item, Work


class Travelling(Cluster):
    """One worker, in this process, that has only what can travel."""

    def run(self, items: Sequence[Item], make: Callable[[], Work]) -> Iterator[Item]:
        cloudpickle = pytest.importorskip("ray.cloudpickle", reason="needs the extra ray")
        work = cloudpickle.loads(cloudpickle.dumps(make))()
        for item in json.loads(json.dumps(items)):
            yield json.loads(json.dumps(work(item)))
