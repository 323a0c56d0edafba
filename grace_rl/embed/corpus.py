"""Texts -> parquet files of vectors: any size, constant memory, resumable, by one or many workers.

Every partition of `chunk` rows becomes a part, whole or not at all: beside the output file, in
`<output>.parts/part-000000.parquet`, or in the folder that is the output. A job that was killed
goes on with the parts that are not there. Whose parts they are stands in `_job.json` among them, by
the content of the input and of the model; parts without it are nobody's and go.

`embed_corpus` in this process is the same pipeline with one worker: `run.workers` gives partitions
to `_PartMaker`s, which read, embed and write.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from torch import Tensor

from grace_rl.data.corpus import ParquetTexts, Partition, Texts
from grace_rl.data.texts import TextSource
from grace_rl.embed.cache import ENCODER_FILES, model_fingerprint
from grace_rl.embed.encoder_module import Encoded, Encoder
from grace_rl.errors import UserError, describe_error
from grace_rl.run.files import UNFINISHED, held, whole_file, write_text
from grace_rl.run.identity import digest
from grace_rl.run.screen import bar
from grace_rl.run.workers import Cluster, run_all

CHUNK = 4096
ERRORS = b"grace_rl.errors"  # key of a part's own number of error rows, in its schema's metadata


@dataclass(frozen=True)
class EmbedJob:
    """What to embed, and where the vectors go.

    Attributes:
        texts: Where the texts come from; with `columns.rationale` nothing is written, only read.
        output: A parquet file with `id`, `vector` (float32 list of fixed length) and, if asked for,
            `text`, `rationale` and `tokens`. Any other name is a folder of such files, which have
            a column `error` too: a row that could not be embedded has no vector and says why.
        keep_rationales: Add these three columns.
        settings: Of `RationaleEncoder.encode`.
        chunk: Rows of a part.
    """

    texts: Texts
    output: Path
    keep_rationales: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    chunk: int = CHUNK

    @property
    def parted(self) -> bool:
        """Whether the output is a folder of parts."""
        return self.output.suffix != ".parquet"

    @property
    def parts(self) -> Path:
        if self.parted:
            return self.output
        return self.output.with_name(self.output.name + ".parts")

    def part(self, number: int) -> Path:
        return self.parts / f"part-{number:06d}.parquet"


@dataclass(frozen=True)
class Done:
    """What became of a job: its rows, and how many of them are errors."""

    rows: int
    errors: int = 0


def embed_corpus(
    load: Callable[[], Encoder],
    job: EmbedJob,
    model: Path,
    *,
    cluster: Cluster | None = None,
    overwrite: bool = False,
    console: Console,
) -> Done:
    """Do the job, going on where an earlier attempt of the same job stopped.

    Args:
        load: Gives the encoder, such as `load_encoder`; called once by each worker.
        job: What to do.
        model: The encoder's folder, to know whether an unfinished output is of the same model.
        cluster: Where; None: in this process.
        overwrite: Replace a finished output, or begin an unfinished one anew.
        console: Where progress is shown.

    Raises:
        UserError: Rows are bad, the output is there already, another process works on it, or what
            is unfinished there is of another job; no row at all of a part could be embedded.
    """
    partitions, id_type = job.texts.partitions(job.chunk)
    own = _identity(job, model)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    note = _note(job)
    finished = job.output.exists() and not job.parted
    if finished and not overwrite and note != own:
        if note is None:  # nobody's: what a clean-up left that was killed
            shutil.rmtree(job.parts, ignore_errors=True)
        raise UserError(f"{job.output}: is there already; --overwrite replaces it")
    if job.parted and note is None and not overwrite and any(job.parts.glob("*.parquet")):
        raise UserError(f"{job.output}: has parquet files already; --overwrite replaces them")
    job.parts.mkdir(exist_ok=True)
    done = Done(sum(part.rows for part in partitions))
    with held(job.parts):
        if overwrite or not finished:
            _open(job, own, overwrite)
            _make(load, job, partitions, id_type, cluster, console)
            if _identity(job, model) != own:
                raise UserError(
                    f"{', '.join(job.texts.digests())}: was changed while it was read; start again"
                )
            done = _count(job, partitions)
            if job.parted:
                write_text(job.parts / "_finished.json", json.dumps(asdict(done)) + "\n")
                return done
            _join(job, partitions)
        # A kill from here on leaves a finished output; the same command then only cleans up.
        for part in job.parts.glob("part-*.parquet"):
            part.unlink()
        _note_path(job).unlink()
    shutil.rmtree(job.parts)
    return done


def embed_many(
    load: Callable[[], Encoder],
    texts: Sequence[str],
    model: Path,
    cluster: Cluster,
    beside: Path,
    chunk: int = CHUNK,
    **settings: Any,
) -> Encoded:
    """What `encode(texts, **settings)` gives, of many texts, made by the workers of a cluster.

    Args:
        load, model, cluster, chunk: As in `embed_corpus` and `EmbedJob`.
        texts: N texts; a blank one gets a vector of zeros.
        beside: A folder that all workers see; the corpus lies there meanwhile.
        settings: Of `Encoder.encode`.

    Raises:
        UserError: As `embed_corpus`; a text could not be embedded.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys(filter(str.strip, texts)))}
    with tempfile.TemporaryDirectory(dir=beside, prefix=".corpus-") as folder:
        source = Path(folder).absolute() / "texts.parquet"
        pq.write_table(pa.table({"text": [*place]}), source, row_group_size=chunk)
        corpus = ParquetTexts(str(source), TextSource(source))
        job = EmbedJob(corpus, source.with_name("vectors"), True, settings, chunk)
        done = embed_corpus(load, job, model, cluster=cluster, console=Console(quiet=True))
        table = pq.read_table(job.output)
    if done.errors:
        reason = next(filter(None, table["error"].to_pylist()))
        raise UserError(f"{done.errors} of {done.rows} texts could not be embedded: {reason}")
    found = torch.from_numpy(np.stack(table["vector"].to_numpy()))
    back = [place.get(text, -1) for text in texts]  # -1: what is put last, for a blank text
    vectors = torch.cat([found, found.new_zeros(1, found.size(1))])[back]
    rationales = [*(told or "" for told in table["rationale"].to_pylist()), ""]
    lengths = [*(count or 0 for count in table["tokens"].to_pylist()), 0]
    return Encoded([rationales[i] for i in back], vectors, [lengths[i] for i in back])


def _make(
    load: Callable[[], Encoder],
    job: EmbedJob,
    partitions: list[Partition],
    id_type: type,
    cluster: Cluster | None,
    console: Console,
) -> None:
    """Make the parts that are not there yet."""
    left = [part for part in partitions if not job.part(part.number).exists()]
    rows, todo = (sum(part.rows for part in parts) for parts in (partitions, left))

    def make() -> _PartMaker:
        return _PartMaker(load(), job, id_type)

    with bar(console, "embedding", rows, done=rows - todo, unit="texts") as advance:
        for made in run_all([part._asdict() for part in left], make, cluster):
            advance(made["rows"])


class _PartMaker:
    """What a worker does: a partition of texts -> a part on the disk."""

    def __init__(self, encoder: Encoder, job: EmbedJob, id_type: type) -> None:
        self.encoder: Any = encoder
        self.job = job
        self.id_type = pa.int64() if id_type is int else pa.string()
        self.size = 0  # of a vector; known from the first on

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        partition = Partition(**item)
        path = self.job.part(partition.number)
        if not path.exists():  # a worker that died may have done it
            rows = self.job.texts.read(partition)
            if len(rows) != partition.rows:
                raise UserError(f"{partition.file}: was changed while it was read; start again")
            table = self._table(rows)
            with whole_file(path) as unfinished:
                pq.write_table(table, unfinished, compression="zstd")
        return {"number": partition.number, "rows": partition.rows}

    def _table(self, rows: list[dict[str, Any] | str]) -> pa.Table:
        good = [row for row in rows if isinstance(row, dict)]
        read = iter(self._embedded(good))
        whole = [_Row(None, error=row) if isinstance(row, str) else next(read) for row in rows]
        columns: dict[str, Any] = {"id": pa.array([row.id for row in whole], self.id_type)}
        if self.job.keep_rationales:
            if self.job.texts.columns.text:
                columns["text"] = pa.array([row.text for row in whole], pa.string())
            columns["rationale"] = pa.array([row.rationale for row in whole], pa.string())
            if self.job.texts.columns.rationale is None:
                columns["tokens"] = pa.array([row.tokens for row in whole], pa.int32())
        columns["vector"] = self._vectors([row.vector for row in whole])
        if not self.job.parted:
            return pa.table(columns)
        columns["error"] = pa.array([row.error for row in whole], pa.string())
        errors = sum(row.error is not None for row in whole)
        return pa.table(columns).replace_schema_metadata({ERRORS: str(errors).encode()})

    def _embedded(self, rows: list[dict[str, Any]]) -> list[_Row]:
        """As asked for; in a folder of parts a row that raises becomes an error row.

        Raises:
            Exception: As the encoder did, where it is not one row that is bad: all are.
        """
        if not rows:
            return []
        try:
            return self._encoded(rows)
        except Exception as error:
            if not self.job.parted:
                raise
            halves = self._halved(rows, error)
            if len(rows) > 1 and all(row.error is not None for row in halves):
                raise
            return halves

    def _halved(self, rows: list[dict[str, Any]], error: Exception) -> list[_Row]:
        """The rows one by one where needed, so that all but the bad ones are embedded."""
        if len(rows) == 1:
            return [_Row(rows[0]["id"], rows[0].get("text"), error=describe_error(error))]
        found: list[_Row] = []
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            try:
                found += self._encoded(half)
            except Exception as inner:
                found += self._halved(half, inner)
        return found

    def _encoded(self, rows: list[dict[str, Any]]) -> list[_Row]:
        texts = [row["text"] for row in rows] if self.job.texts.columns.text else None
        lengths: Iterable[int | None] = [None] * len(rows)
        if self.job.texts.columns.rationale is not None:
            rationales = [row["rationale"] for row in rows]
            vectors = self.encoder.encode_rationales(rationales, texts)
        else:
            encoded = self.encoder.encode(texts, **self.job.settings)
            vectors, rationales = encoded.vectors, encoded.rationales or [None] * len(rows)
            lengths = encoded.lengths or lengths
        self.size = vectors.size(1)
        found = zip(rows, rationales, lengths, vectors.float().cpu(), strict=True)
        return [
            _Row(row["id"], row.get("text"), None if told is None else _utf8(told), tokens, vector)
            for row, told, tokens, vector in found
        ]

    def _vectors(self, vectors: list[Tensor | None]) -> pa.FixedSizeListArray:
        if not self.size:  # no row is good, and none was before
            self.size = self.encoder.encode(["a text"]).vectors.size(1)
        none = torch.zeros(self.size)
        values = torch.stack([none if vector is None else vector for vector in vectors])
        mask = pa.array([vector is None for vector in vectors])
        flat = pa.array(values.contiguous().numpy().reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, self.size, mask=mask)


@dataclass(frozen=True)
class _Row:
    """A row of a part; `vector` is (H,)."""

    id: Any
    text: str | None = None
    rationale: str | None = None
    tokens: int | None = None
    vector: Tensor | None = None
    error: str | None = None


def _utf8(text: str) -> str:
    """A policy may stop within a character; a lone surrogate has no UTF-8 form."""
    return text.encode("utf-8", "replace").decode("utf-8")


# -- the folder of parts ---------------------------------


def _identity(job: EmbedJob, model: Path) -> dict[str, Any]:
    """What a job is, by the content of its files: only parts of the same job are joined."""
    columns = job.texts.columns
    return {
        "input": digest([*job.texts.digests().values()]),
        "columns": [columns.text, columns.id, columns.rationale],
        "shard": list(columns.shard),
        "model": model_fingerprint(model, ENCODER_FILES),
        "settings": job.settings,
        "keep_rationales": job.keep_rationales,
        "chunk": job.chunk,
    }


def _note_path(job: EmbedJob) -> Path:
    return job.parts / "_job.json"


def _note(job: EmbedJob) -> dict[str, Any] | None:
    """The identity of the job whose parts are there; None where it is not known."""
    try:
        note = json.loads(_note_path(job).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else {}


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
    patterns = [UNFINISHED, "_finished.json"]
    if note != own or overwrite:
        patterns.append("part-*.parquet")
    for pattern in patterns:
        for left in job.parts.glob(pattern):
            left.unlink()
    write_text(_note_path(job), json.dumps(own, indent=2) + "\n")


def _count(job: EmbedJob, partitions: list[Partition]) -> Done:
    """Rows and errors, as the parts' footers tell.

    Raises:
        UserError: A part is not there or has other rows.
    """
    rows = errors = 0
    for partition in partitions:
        path = job.part(partition.number)
        try:
            footer = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: was made but cannot be read: {error}") from error
        if footer.num_rows != partition.rows:
            raise UserError(f"{path}: has {footer.num_rows} rows, not {partition.rows}; remove it")
        rows += footer.num_rows
        errors += int((footer.metadata or {}).get(ERRORS, 0))
    return Done(rows, errors)


def _join(job: EmbedJob, partitions: list[Partition]) -> None:
    """All parts as one file, a row group each."""
    parts = [job.part(partition.number) for partition in partitions]
    with (
        whole_file(job.output) as unfinished,
        pq.ParquetWriter(unfinished, pq.read_schema(parts[0]), compression="zstd") as writer,
    ):
        for part in parts:
            writer.write_table(pq.read_table(part))
