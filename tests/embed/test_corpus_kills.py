"""`embed` killed at any moment: the same job goes on, another one never gets its rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from grace_rl.data.corpus import OneFile
from grace_rl.data.texts import TextSource
from grace_rl.embed.corpus import EmbedJob, embed_corpus
from grace_rl.embed.encoder_module import Encoded
from grace_rl.errors import UserError

ROWS = 7


class Digests:
    """A vector for every text, without a model."""

    writes_rationales = False

    def encode(self, texts: Sequence[str], rationale: Any = None, *, role: Any = None) -> Encoded:
        rows = [list(hashlib.sha256(text.encode()).digest()) for text in texts]
        return Encoded([], torch.tensor(rows, dtype=torch.float32))


class Killed(BaseException):
    pass


@contextmanager
def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the given change of the disk on, no change takes effect and each raises."""
    left = [moment]

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        yield


def write_texts(path: Path, word: str) -> Path:
    rows = [{"text": f"{word} {i}"} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def embed(source: Path, model: Path, output: Path, **options: Any) -> int:
    job = EmbedJob(OneFile(TextSource(source)), output, keep_rationales=False, chunk=2)
    return embed_corpus(Digests, job, model, console=Console(quiet=True), **options).rows


def rows_of(output: Path, word: str) -> bool:
    expected = Digests().encode([f"{word} {i}" for i in range(ROWS)]).vectors.numpy()
    found = np.stack(pq.read_table(output)["vector"].to_numpy())
    return np.array_equal(found, expected)


def test_killed_at_any_moment(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for moment in range(200):
        folder = tmp_path / str(moment)
        folder.mkdir()
        old, output = write_texts(folder / "a.jsonl", "old"), folder / "v.parquet"
        new = write_texts(folder / "b.jsonl", "new")
        ended = False
        try:
            with killed_at(moment, monkeypatch):
                embed(old, model, output)
                ended = True
        except Killed:
            pass
        finished = output.exists()
        try:  # another job: refused, or only its own rows
            embed(new, model, output)
        except UserError:
            assert finished or (folder / "v.parquet.parts" / "_job.json").exists()
        else:
            assert not finished and rows_of(output, "new")
            output.unlink()
        if not (finished and not (folder / "v.parquet.parts").exists()):
            assert embed(old, model, output) == ROWS
        assert rows_of(output, "old")
        assert {path.name for path in folder.iterdir()} == {"a.jsonl", "b.jsonl", "v.parquet"}
        if ended:
            assert moment > 20
            return
    raise AssertionError("it never ended")


def test_an_input_edited_to_the_same_size_is_another_job(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_texts(tmp_path / "a.jsonl", "old"), tmp_path / "v.parquet"
    with pytest.raises(Killed), killed_at(14, monkeypatch):
        embed(source, model, output)
    assert list((tmp_path / "v.parquet.parts").glob("part-*"))
    size = source.stat().st_size
    write_texts(source, "new")
    assert source.stat().st_size == size
    with pytest.raises(UserError, match="different: input"):
        embed(source, model, output)
    assert embed(source, model, output, overwrite=True) == ROWS and rows_of(output, "new")


def test_parts_without_a_note_are_nobodys(tmp_path: Path, model: Path) -> None:
    old, output = write_texts(tmp_path / "a.jsonl", "old"), tmp_path / "v.parquet"
    embed(old, model, output)
    parts = tmp_path / "w.parquet.parts"
    parts.mkdir()
    output.rename(parts / "part-000000.parquet")
    new = write_texts(tmp_path / "b.jsonl", "new")
    assert embed(new, model, tmp_path / "w.parquet") == ROWS
    assert rows_of(tmp_path / "w.parquet", "new")


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path: Path, model: Path) -> None:
    source, output = write_texts(tmp_path / "a.jsonl", "old"), tmp_path / "v.parquet"

    class Editing(Digests):
        def encode(self, texts: Sequence[str], *args: Any, **kwargs: Any) -> Encoded:
            write_texts(source, "new")
            return super().encode(texts)

    job = EmbedJob(OneFile(TextSource(source)), output, chunk=2)
    with pytest.raises(UserError, match="changed while it was read"):
        embed_corpus(Editing, job, model, console=Console(quiet=True))
    assert not output.exists()
