"""A file of texts -> a parquet file of vectors: any size, constant memory, resumable.

Every `chunk` rows become a part beside the output, `<output>.parts/part-000000.parquet`, whole or
not at all. A job that was killed goes on after its last part; when all are there they become the
one output file.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from grace_rl.data.texts import TextSource, in_chunks
from grace_rl.embed.cache import ENCODER_FILES, model_fingerprint
from grace_rl.errors import UserError
from grace_rl.run.files import UNFINISHED, held, whole_file, write_text

CHUNK = 4096


@dataclass(frozen=True)
class EmbedJob:
    """What to embed, and where the vectors go.

    Attributes:
        source: The texts; with `source.rationale` nothing is written, only read.
        output: A parquet file with `id`, `vector` (float32 list of fixed length) and, if asked for,
            `text`, `rationale` and `tokens`.
        keep_rationales: Add these three columns.
        settings: Of `RationaleEncoder.encode`.
        chunk: Rows of a part.
    """

    source: TextSource
    output: Path
    keep_rationales: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    chunk: int = CHUNK

    @property
    def parts(self) -> Path:
        return self.output.with_name(self.output.name + ".parts")


def embed_file(
    encoder: Any, job: EmbedJob, model: Path, *, overwrite: bool = False, console: Console
) -> int:
    """Do the job, going on where an earlier attempt of the same job stopped.

    Args:
        encoder: A `RationaleEncoder`, or another whose `encode(texts)` gives `Encoded`.
        job: What to do.
        model: The encoder's folder, to know whether an unfinished output is of the same model.
        overwrite: Replace a finished output, or begin an unfinished one anew.
        console: Where progress is shown.

    Returns:
        The number of rows.

    Raises:
        UserError: Rows are bad, the output is there already, another process works on it, or what
            is unfinished there is of another job.
    """
    rows, id_type = job.source.check()
    if job.output.exists() and not overwrite:
        raise UserError(f"{job.output}: is there already; --overwrite replaces it")
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.parts.mkdir(exist_ok=True)
    with held(job.parts):
        _open(job, model, overwrite)
        done = 0
        with _progress(console) as bar:
            task = bar.add_task("embedding", total=rows)
            for number, chunk in enumerate(in_chunks(job.source.rows(), job.chunk)):
                part = job.parts / f"part-{number:06d}.parquet"
                if part.exists():
                    done += len(chunk)
                    bar.reset(task, completed=done, total=rows)  # speed is of this attempt
                    continue
                table = _table(encoder, job, chunk, id_type)
                with whole_file(part) as unfinished:
                    pq.write_table(table, unfinished, compression="zstd")
                bar.advance(task, len(chunk))
        _join(job)
    shutil.rmtree(job.parts)
    return rows


def _table(encoder: Any, job: EmbedJob, chunk: list[dict[str, Any]], id_type: type) -> pa.Table:
    texts = [row["text"] for row in chunk] if job.source.text else None
    lengths = None
    if job.source.rationale is not None:
        rationales = [row["rationale"] for row in chunk]
        vectors = encoder.encode_rationales(rationales, texts)
    else:
        encoded = encoder.encode(texts, **job.settings)
        vectors, rationales, lengths = encoded.vectors, encoded.rationales, encoded.lengths
    columns: dict[str, Any] = {
        "id": pa.array([row["id"] for row in chunk], pa.int64() if id_type is int else pa.string())
    }
    if job.keep_rationales:
        if texts is not None:
            columns["text"] = pa.array(texts, pa.string())
        columns["rationale"] = pa.array([_utf8(r) for r in rationales], pa.string())
        if lengths is not None:
            columns["tokens"] = pa.array(lengths, pa.int32())
    columns["vector"] = _vectors(vectors)
    return pa.table(columns)


def _vectors(vectors: Tensor) -> pa.FixedSizeListArray:
    values = pa.array(vectors.float().contiguous().numpy().reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.size(1))


def _utf8(text: str) -> str:
    """A policy may stop within a character; a lone surrogate has no UTF-8 form."""
    return text.encode("utf-8", "replace").decode("utf-8")


# -- the folder of parts ---------------------------------


def _open(job: EmbedJob, model: Path, overwrite: bool) -> None:
    """Make sure that what is in the folder is of this job, or nothing."""
    own = {
        "input": f"{job.source.path.resolve()}, {job.source.path.stat().st_size} bytes",
        "columns": [job.source.text, job.source.id, job.source.rationale],
        "shard": list(job.source.shard),
        "model": model_fingerprint(model, ENCODER_FILES),
        "settings": job.settings,
        "keep_rationales": job.keep_rationales,
        "chunk": job.chunk,
    }
    note = job.parts / "job.json"
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        other = [name for name, value in own.items() if found.get(name) != value]
        if other and not overwrite:
            raise UserError(
                f"{job.parts}: is the unfinished output of another job (different: "
                f"{', '.join(other)}); finish that one, or begin anew with --overwrite"
            )
        if overwrite:
            for part in job.parts.glob("part-*.parquet"):
                part.unlink()
    for left in job.parts.glob(UNFINISHED):
        left.unlink()
    write_text(note, json.dumps(own, indent=2) + "\n")


def _join(job: EmbedJob) -> None:
    """All parts as one file, a row group each."""
    parts = sorted(job.parts.glob("part-*.parquet"))
    with (
        whole_file(job.output) as unfinished,
        pq.ParquetWriter(unfinished, pq.read_schema(parts[0]), compression="zstd") as writer,
    ):
        for part in parts:
            writer.write_table(pq.read_table(part))


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} texts/s" if speed else "")


def _progress(console: Console) -> Progress:
    columns = Progress.get_default_columns()[:3]
    return Progress(
        *columns, MofNCompleteColumn(), _Speed(), TimeRemainingColumn(), console=console
    )
