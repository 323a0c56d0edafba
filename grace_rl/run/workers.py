"""The same work on many items: by this process, or by workers of a Ray cluster.

Ray schedules, retries and feeds; an item and what comes of it are small plain data, and what is
large goes from the worker to a file. So memory stays flat, and work that is whole in its file is
done, whoever dies. Ray (the extra `ray`) is imported only where it is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from grace_rl.errors import UserError, first_line

Item = dict[str, Any]
Work = Callable[[Item], Item]
RETRIES = 3
"""How often an item is given to another worker after it took one down with it."""
SMALL = 128 * 2**20  # bytes of shared memory, for what travels
BLOCKS = 2000  # of items; what Ray holds at a time is told by blocks, not by items


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, one of this machine's own unless an address is told.

    Attributes:
        address: `host:port`, `ray://...` or `auto`; None starts one here, for this work.
        workers: How many; None: one for each GPU, or for each CPU where there is no GPU.
    """

    address: str | None = None
    workers: int | None = None

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The options of a command that says with `--engine ray` that a cluster does its work."""
        parser.add_argument(
            "--address", metavar="HOST:PORT", help="of a Ray cluster; default: one here"
        )
        parser.add_argument(
            "--workers", type=int, metavar="N", help="of it; default: one for each GPU or CPU"
        )

    @classmethod
    def told(cls, options: argparse.Namespace, problems: list[str]) -> Cluster | None:
        """The cluster that is asked for, if one is; what is wrong with it goes to `problems`."""
        if options.engine == "ray":
            if options.workers is not None and options.workers < 1:
                problems.append(f"--workers: must be at least 1, not {options.workers}")
            return cls(options.address, options.workers)
        problems += [
            f"--{name}: is of a Ray cluster; add --engine ray or leave it out"
            for name in ("address", "workers")
            if getattr(options, name) is not None
        ]
        return None

    def run(self, items: Sequence[Item], make: Callable[[], Work]) -> Iterator[Item]:
        """As `run_all`, by the cluster's workers."""
        ray, data = _ray()
        if not ray.is_initialized():
            try:
                here = {} if self.address else {"object_store_memory": SMALL}
                ray.init(address=self.address, **_QUIET, **here)
            except (ConnectionError, ValueError) as error:
                raise UserError(f"--address: {first_line(error)}") from error
        there = ray.cluster_resources()
        resource = "GPU" if there.get("GPU") else "CPU"
        most = max(1, int(there.get(resource, 1)))
        count = min(self.workers or most, len(items))
        if count > most:
            raise UserError(f"--workers: {count} of one {resource} each, but there are {most}")
        rows = [{"number": i, "item": json.dumps(item)} for i, item in enumerate(items)]
        # Whoever counts must outlive workers, and is found again where its own node is lost.
        begun = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Begun).remote()
        work = data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map_batches(
            _Worker,
            fn_constructor_args=(make, begun, os.getcwd()),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=count),
            **{f"num_{resource.lower()}s": 1},
        )
        for row in work.iter_rows():
            if row["problems"]:
                raise UserError(json.loads(row["problems"]))
            if row["raised"]:
                raise RuntimeError(f"a worker's own error:\n{row['raised']}")
            yield json.loads(row["result"])


def run_all(
    items: Sequence[Item], make: Callable[[], Work], cluster: Cluster | None = None
) -> Iterator[Item]:
    """What comes of every item, in the order in which it is done.

    Args:
        items: Plain data.
        make: Makes what does an item; called once by each worker, for it may load a model. On a
            cluster it travels there, so it holds nothing that cannot.
        cluster: Where; None: in this process.

    Raises:
        UserError: As the work did; the cluster is not there or has too few of something; an item
            took down every worker that it was given to.
    """
    if cluster is not None:
        yield from cluster.run(items, make)
    elif items:
        work = make()
        yield from map(work, items)


class _Worker:
    """What Ray Data calls with one item at a time; an error is an answer, and no death.

    Args:
        make: See `run_all`.
        begun: Counts how often an item was begun and not ended: Ray gives it to a worker again,
            and again, where a worker or its node is lost.
        folder: Where the command was given; what paths are relative to.
    """

    def __init__(self, make: Callable[[], Work], begun: Any, folder: str) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._make, self._begun = make, begun
        self._work: Work | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        answer = {"result": "", "problems": "", "raised": ""}
        [number], [item] = batch["number"], batch["item"]
        try:
            self._look(int(number))
            if self._work is None:  # here and not above, for what is raised there Ray tries again
                self._work = self._make()
            answer["result"] = json.dumps(self._work(json.loads(item)))
            self._begun.ended.remote(int(number))
        except UserError as error:
            answer["problems"] = json.dumps(error.problems)
        except Exception:
            answer["raised"] = traceback.format_exc()
        return {name: [told] for name, told in answer.items()}

    def _look(self, number: int) -> None:
        import ray

        if (times := ray.get(self._begun.once_more.remote(number))) > RETRIES + 1:
            raise UserError(
                f"a worker died {times - 1} times over the same item (memory? a text that breaks "
                "the model?); what is finished is kept, the same command goes on"
            )


class _Begun:
    def __init__(self) -> None:
        self._times = Counter[int]()

    def once_more(self, number: int) -> int:
        """How often the item was begun, with this time."""
        self._times[number] += 1
        return self._times[number]

    def ended(self, number: int) -> None:
        """Forget it; it may be asked for again with others that were not done."""
        del self._times[number]


_QUIET = {
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": logging.ERROR,
    "configure_logging": True,
}


def _ray() -> tuple[Any, Any]:
    """The modules `ray` and `ray.data`, told to keep quiet and to send nothing home."""
    if find_spec("ray") is None:
        raise UserError("--engine ray: needs Ray; pip install 'grace-rl[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its errors are retried, or ours
    import ray
    import ray.data as data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray, data
