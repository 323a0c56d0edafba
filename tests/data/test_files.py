"""The one reader of files: what one kind of file can say, all can say, and places are right."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grace_rl.data.files import file_records
from grace_rl.data.rows import read_rows
from grace_rl.data.texts import TextSource
from grace_rl.errors import UserError
from grace_rl.evaluate.tasks import load_tasks
from grace_rl.recipe.rows import DataConfig

LONG = "long " * 60_000  # beyond the csv module's own limit
BOM = b"\xef\xbb\xbf"
JSON = "".join(json.dumps({"text": text}) + "\n" for text in ("a", LONG, "c")).encode()
CSV = f'text\na\n"{LONG}"\nc\n'.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSON),
        ("a.jsonl", BOM + JSON),
        ("a.jsonl", JSON.replace(b"\n", b"\r\n\n")),
        ("a.jsonl.gz", gzip.compress(BOM + JSON)),
        ("a.jsonl", gzip.compress(JSON)),
        ("a.csv", CSV),
        ("a.csv", BOM + CSV.replace(b"\n", b"\r\n")),
        ("a.csv.gz", gzip.compress(CSV)),
    ],
)
def test_every_reader_takes_every_form(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    texts = ["a", LONG, "c"]
    assert [record["text"] for _, record in file_records(path)] == texts
    assert [row["text"] for row in read_rows(DataConfig(dataset_name=str(path)))] == texts
    assert [row["text"] for row in TextSource(path).rows()] == texts


def test_pandas_and_nested_columns_are_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a", "b"], "more": [{"x": [1]}, {"x": []}]}, index=[7, 9])
    frame.to_parquet(tmp_path / "a.parquet")
    (first, second) = file_records(tmp_path / "a.parquet")
    assert first[1]["more"] == {"x": [1]} and second[0].endswith("row 2")
    assert [row["id"] for row in TextSource(tmp_path / "a.parquet").rows()] == [0, 1]
    assert len(read_rows(DataConfig(dataset_name=str(tmp_path / "a.parquet")))) == 2
    table = pa.table({"text": pa.array(["a", "b"]).dictionary_encode(), "id": [None, None]})
    pq.write_table(table, tmp_path / "b.parquet")
    assert [row["id"] for row in TextSource(tmp_path / "b.parquet").rows()] == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", 'text,id\n"two\nlines",1\n\nb,2,3\n', 5),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', 3),
        ("a.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}", 1),
        ("a.jsonl", '{"text": "a", "n": ' + "[" * 9000 + "}", 1),
        ("a.jsonl", "[1]", 1),
    ],
)
def test_a_bad_record_has_the_line_where_it_begins(
    tmp_path: Path, name: str, content: str, line: int
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    bad = [place for place, record in file_records(path) if isinstance(record, str)]
    assert bad == [f"{path}:{line}"]
    for read in (lambda: read_rows(DataConfig(dataset_name=str(path))), TextSource(path).check):
        with pytest.raises(UserError) as error:
            read()  # type: ignore[operator]
        assert error.value.problems[0].startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b'{"text": "a"}'),
        ("a.jsonl.gz", gzip.compress(JSON)[:-9]),
        ("a.csv", b"text,text\na,b\n"),
        ("a.parquet", b"PAR1 no parquet PAR1"),
        ("a.txt", b"a"),
        ("a.jsonl", None),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(file_records(path))
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith(f"{path}:")


def test_null_is_null_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"query": "a", "positive": "b", "negative": null}')
    (tmp_path / "a.csv").write_text("query,positive,negative\na,b,\n")
    frame = pd.DataFrame([{"query": "a", "positive": "b", "negative": None}])
    frame.to_parquet(tmp_path / "a.parquet")
    rows: list[Any] = []
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        rows += read_rows(DataConfig(dataset_name=str(tmp_path / name)))
    assert rows == [{"query": "a", "positive": "b", "negative": []}] * 3


def test_tasks_are_read_alike(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": LONG, "score": n} for n in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "pairs.jsonl").write_bytes(BOM + text)
    (tmp_path / "tasks.yaml").write_text(f"- {{name: p, kind: sts, path: {tmp_path}/pairs}}\n")
    (task,) = load_tasks(tmp_path / "tasks.yaml")
    assert not isinstance(task, str) and len(task.parts[""]) == 3
