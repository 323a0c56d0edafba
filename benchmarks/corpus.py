"""A corpus by one process, by Ray with one worker, and by Ray with more.

    python benchmarks/corpus.py MODEL --rows 20000 --workers 1 2

What is counted begins when a quarter of the partitions is done, so that the start of Ray, of its
workers and of their models, which does not grow with the corpus, stands by itself. Processor time
is that of this process and of all below it, Ray's own among them; on a shared machine it says more
than the clock. Memory is the most that this process held. `MODEL digests` is no model: a vector
from a hash, to see what Ray costs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from grace_rl.data import scenes
from grace_rl.data.corpus import ParquetTexts
from grace_rl.data.texts import TextSource
from grace_rl.embed.corpus import EmbedJob, embed_corpus
from grace_rl.embed.encoder_module import Encoded
from grace_rl.embed.loading import load_encoder
from grace_rl.run.workers import Cluster, Item, run_all


class Digests:
    writes_rationales = False

    def encode(self, texts: Sequence[str], *args: Any, **kwargs: Any) -> Encoded:
        rows = [list(hashlib.sha256(text.encode()).digest()) for text in texts]
        return Encoded([], torch.tensor(rows, dtype=torch.float32))


class Moment(NamedTuple):
    """When a partition was done: by the clock, in processor seconds, and rows so far."""

    clock: float
    processor: float
    rows: int


def processor() -> float:
    """Seconds that this process and all below it have used."""
    me, seconds = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def moments(load: Any, job: EmbedJob, model: Path, cluster: Cluster | None) -> list[Moment]:
    """The job's beginning, and each of its partitions as it is done."""
    found = [Moment(time.monotonic(), processor(), 0)]

    def watched(*given: Any) -> Iterator[Item]:
        for made in run_all(*given):
            rows = found[-1].rows + made["rows"]
            found.append(Moment(time.monotonic(), processor(), rows))
            yield made

    with patch("grace_rl.embed.corpus.run_all", watched):
        embed_corpus(load, job, model, cluster=cluster, console=Console(quiet=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2, help="each way so often, in turn")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="corpus-"))
    (folder / "in").mkdir()
    texts = [row["query"] for row in scenes.rows("train", "triplet", 500)]
    for start in range(0, options.rows, 5000):
        count = min(5000, options.rows - start)
        some = [f"{texts[i % 500]} {i}" for i in range(start, start + count)]
        pq.write_table(pa.table({"text": some}), folder / "in" / f"{start:09d}.parquet")
    if options.model == "digests":
        load, model = Digests, folder / "model"
        model.mkdir()
    else:
        model = Path(options.model).absolute()
        load = partial(load_encoder, model)
    ways: list[tuple[str, Cluster | None]] = [("plain loop", None)]
    ways += [(f"ray, {n} workers", Cluster(workers=n)) for n in options.workers]
    print("| way | first part, s | texts/s | texts per processor second | memory here, MB |")
    print("|---|---|---|---|---|")
    for number in range(options.repeats):
        for name, cluster in ways:
            job = EmbedJob(
                ParquetTexts(str(folder / "in"), TextSource(Path("unused"))),
                folder / f"out-{number}-{name.replace(', ', '-').replace(' ', '-')}",
                chunk=options.chunk,
            )
            began, *done = moments(load, job, model, cluster)
            first = done[len(done) // 4]
            last = max(done, key=lambda moment: moment.processor)  # before workers end
            rows = last.rows - first.rows
            clock, used = last.clock - first.clock, last.processor - first.processor
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"| {name} | {done[0].clock - began.clock:.1f} | {rows / clock:,.1f} | "
                f"{rows / used:,.1f} | {memory:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
