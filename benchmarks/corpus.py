"""A corpus by one process, by Ray with one worker, and by Ray with more.

    python benchmarks/corpus.py MODEL --rows 20000 --workers 1 2

Seconds from the first partition that is done to the last, so that the start of Ray and of its
workers, which does not grow with the corpus, stands by itself; and the most memory that this
process held. `MODEL digests` is no model: a vector from a hash, to see what Ray costs alone.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from grace_rl.run.workers import Cluster


class Digests:
    writes_rationales = False

    def encode(self, texts: Sequence[str], *args: Any, **kwargs: Any) -> Encoded:
        rows = [list(hashlib.sha256(text.encode()).digest()) for text in texts]
        return Encoded([], torch.tensor(rows, dtype=torch.float32))


def timed(
    load: Any, job: EmbedJob, model: Path, cluster: Cluster | None
) -> tuple[float, float, int]:
    """Seconds to the first part, seconds from there to the end, and rows after the first part."""
    began = time.time()
    embed_corpus(load, job, model, cluster=cluster, console=Console(quiet=True))
    parts = sorted(job.parts.glob("part-*"), key=lambda path: path.stat().st_mtime)
    done = [path.stat().st_mtime for path in parts]
    rows = sum(pq.read_metadata(path).num_rows for path in parts[1:])
    return done[0] - began, done[-1] - done[0], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--chunk", type=int, default=512)
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
    plain = 0.0
    ways: list[tuple[str, Cluster | None]] = [("plain loop", None)]
    ways += [(f"ray, {n} workers", Cluster(workers=n)) for n in options.workers]
    print("| way | start, s | texts/s | times the plain loop | most memory here, MB |")
    print("|---|---|---|---|---|")
    for name, cluster in ways:
        job = EmbedJob(
            ParquetTexts(str(folder / "in"), TextSource(Path("unused"))),
            folder / f"out-{name.replace(', ', '-').replace(' ', '-')}",
            chunk=options.chunk,
        )
        start, seconds, rows = timed(load, job, model, cluster)
        speed = rows / seconds
        plain = plain or speed
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"| {name} | {start:.1f} | {speed:,.0f} | {speed / plain:.2f} | {memory:,.0f} |")


if __name__ == "__main__":
    main()
