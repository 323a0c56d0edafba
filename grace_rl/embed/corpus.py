"""A file of texts -> a parquet file of vectors: any size, constant memory, resumable.

Every `chunk` rows become a part beside the output, `<output>.parts/part-000000.parquet`, whole or
not at all. A job that was killed goes on after its last part; when all are there they become the
one output file. Whose parts they are stands in `job.json` among them, by the content of the input
and of the model; parts without it are nobody's and go.
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
from grace_rl.embed.encoder_module import Encoder
from grace_rl.errors import UserError
from grace_rl.run.files import UNFINISHED, held, whole_file, write_text
from grace_rl.run.identity import file_digest

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
    encoder: Encoder, job: EmbedJob, model: Path, *, overwrite: bool = False, console: Console
) -> int:
    """Do the job, going on where an earlier attempt of the same job stopped.

    Args:
        encoder: What `load_encoder` gives.
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
    own = _identity(job, model)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    note = _note(job)
    if job.output.exists() and not overwrite and note != own:
        if note is None:  # nobody's: what a clean-up left that was killed
            shutil.rmtree(job.parts, ignore_errors=True)
        raise UserError(f"{job.output}: is there already; --overwrite replaces it")
    job.parts.mkdir(exist_ok=True)
    with held(job.parts):
        if overwrite or not job.output.exists():
            _open(job, own, overwrite)
            _embed(encoder, job, rows, id_type, console)
            if _identity(job, model) != own:
                raise UserError(f"{job.source.path}: was changed while it was read; start again")
            _join(job, rows)
        # A kill from here on leaves a finished output; the same command then only cleans up.
        for part in job.parts.glob("part-*.parquet"):
            part.unlink()
        _note_path(job).unlink()
    shutil.rmtree(job.parts)
    return rows


def _embed(encoder: Encoder, job: EmbedJob, rows: int, id_type: type, console: Console) -> None:
    """Make the parts that are not there yet."""
    done = 0
    with _progress(console) as bar:
        task = bar.add_task("embedding", total=rows)
        for number, chunk in enumerate(in_chunks(job.source.rows(), job.chunk)):
            part = _part(job, number)
            if part.exists():
                done += len(chunk)
                bar.reset(task, completed=done, total=rows)  # speed is of this attempt
                continue
            table = _table(encoder, job, chunk, id_type)
            with whole_file(part) as unfinished:
                pq.write_table(table, unfinished, compression="zstd")
            bar.advance(task, len(chunk))


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


def _identity(job: EmbedJob, model: Path) -> dict[str, Any]:
    """What a job is, by the content of its files: only parts of the same job are joined."""
    return {
        "input": file_digest(job.source.path),
        "columns": [job.source.text, job.source.id, job.source.rationale],
        "shard": list(job.source.shard),
        "model": model_fingerprint(model, ENCODER_FILES),
        "settings": job.settings,
        "keep_rationales": job.keep_rationales,
        "chunk": job.chunk,
    }


def _note_path(job: EmbedJob) -> Path:
    return job.parts / "job.json"


def _note(job: EmbedJob) -> dict[str, Any] | None:
    """The identity of the job whose parts are there; None where it is not known."""
    try:
        note = json.loads(_note_path(job).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else {}


def _part(job: EmbedJob, number: int) -> Path:
    return job.parts / f"part-{number:06d}.parquet"


def _open(job: EmbedJob, own: dict[str, Any], overwrite: bool) -> None:
    """Make sure that what is in the folder is of this job, or nothing."""
    note = _note(job)
    if note is not None and not overwrite:
        other = [name for name, value in own.items() if note.get(name) != value]
        if other:
            raise UserError(
                f"{job.parts}: is the unfinished output of another job (different: "
                f"{', '.join(other)}); finish that one, or begin anew with --overwrite"
            )
    patterns = [UNFINISHED] if note == own and not overwrite else [UNFINISHED, "part-*.parquet"]
    for pattern in patterns:
        for left in job.parts.glob(pattern):
            left.unlink()
    write_text(_note_path(job), json.dumps(own, indent=2) + "\n")


def _join(job: EmbedJob, rows: int) -> None:
    """All parts as one file, a row group each."""
    parts = [_part(job, number) for number in range(-(-rows // job.chunk))]
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
