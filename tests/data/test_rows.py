"""Rows are read from every format, and every bad row is named with its line."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grace_rl.data.rows import SHOWN_PROBLEMS, read_rows
from grace_rl.errors import UserError
from grace_rl.recipe.rows import DataConfig

ROWS = [
    {
        "query": "A man walks.",
        "positive": "Someone moves.",
        "negative": ["A man sits."],
        "source": "a",
    },
    {
        "query": "Ein Café.",
        "positive": "Ein Kaffeehaus.",
        "negative": ["Kein Café."],
        "source": "b",
    },
]


def write_lines(path, lines):
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n"
    )
    return DataConfig(dataset_name=str(path))


def problems_of(data):
    with pytest.raises(UserError) as caught:
        read_rows(data)
    return caught.value.problems


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    flat = [row | {"negative": row["negative"][0]} for row in ROWS]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".csv"):
        body = "\n".join(",".join(row.values()) for row in flat)
        path.write_text("query,positive,negative,source\n" + body + "\n", encoding="utf-8")
    else:
        text = "\n".join(json.dumps(row) for row in flat).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert read_rows(DataConfig(dataset_name=str(path))) == ROWS


def test_negative_is_always_a_list(tmp_path):
    data = write_lines(
        tmp_path / "r.jsonl",
        [
            '{"query": "a", "positive": "b"}',
            '{"query": "a", "positive": "b", "negative": null}',
            '{"query": "a", "positive": "b", "negative": "c"}',
            "",
            '{"query": "a", "positive": "b", "negative": ["c", "d"]}',
        ],
    )
    assert [row["negative"] for row in read_rows(data)] == [[], [], ["c"], ["c", "d"]]


def test_empty_cells_of_a_csv_are_missing_negatives(tmp_path):
    data = write_lines(tmp_path / "r.csv", ["query,positive,negative,negative_positive", "a,b,,"])
    assert read_rows(data) == [{"query": "a", "positive": "b", "negative": []}]


def test_columns_can_have_other_names(tmp_path):
    path = tmp_path / "r.jsonl"
    write_lines(path, ['{"anchor": "a", "positive": "b", "score": 1}'])
    rows = read_rows(DataConfig(dataset_name=str(path), columns={"query": "anchor"}))
    assert rows == [{"query": "a", "positive": "b", "negative": [], "score": 1}]
    (problem,) = problems_of(DataConfig(dataset_name=str(path), columns={"query": "premise"}))
    assert "r.jsonl:1" in problem and "'premise'" in problem


def test_unsupervised_rows_and_limit(tmp_path):
    path = tmp_path / "r.jsonl"
    write_lines(path, ['{"text": "a"}', '{"text": "b"}', "this line is never reached"])
    assert read_rows(DataConfig(dataset_name=str(path), rows=2)) == [{"text": "a"}, {"text": "b"}]


def test_all_bad_rows_are_listed_with_their_lines(tmp_path):
    data = write_lines(
        tmp_path / "r.jsonl",
        [
            '{"query": "a", "positive": "b"}',  # 1: good
            '{"query": "  ", "positive": "b"}',
            '{"query": "a"}',
            '{"query": 3, "positive": ["b"]}',
            b'{"query": "\xff", "positive": "b"}',
            '{"query": "a", "positive": "b"',
            "[1, 2]",
            '{"text": "a"}',
            '{"query": "a", "positive": "b", "negative": ["c", ""]}',
            '{"query": "a", "positive": "b", "negative": 7}',
            '{"premise": "a"}',
            '{"text": "a", "query": "b", "positive": "c"}',
            '{"query": "\\ud800", "positive": "b"}',
            '{"query": "a", "positive": "b", "negative_positive": "c"}',
        ],
    )
    text = "\n".join(problems_of(data))
    assert "r.jsonl:1:" not in text
    for line, expected in {
        2: "query is empty",
        3: "positive is missing",
        4: "query must be a text, not 3 (int)",
        5: "is not UTF-8",
        6: "is not JSON",
        7: "is not an object",
        8: "is unsupervised, but the rows before it are supervised",
        9: "negative[1] is empty",
        10: "negative must be a text or a list of texts",
        11: "has neither query and positive nor text",
        12: "has both text and query",
        13: "query is not valid UTF-8",
        14: "negative_positive has no negative to be a paraphrase of",
    }.items():
        assert f"r.jsonl:{line}: {expected}" in text
    assert "r.jsonl:4: positive must be a text, not ['b'] (list)" in text


def test_csv_problems_have_lines(tmp_path):
    data = write_lines(tmp_path / "r.csv", ["query,positive", "a,b", ",b", b"\xe9,b", "a,b,c"])
    problems = problems_of(data)
    assert [p.split("r.csv:")[1].partition(": ")[0] for p in problems] == ["3", "4", "5"]


def test_a_long_list_is_cut(tmp_path):
    problems = problems_of(write_lines(tmp_path / "r.jsonl", ['{"query": "a"}'] * 50))
    assert len(problems) == SHOWN_PROBLEMS + 1
    assert "30 more" in problems[-1] and "50 bad rows" in problems[-1]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("r.jsonl.gz", b"no gzip", "damaged"),
        ("r.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9000)[:-20], "damaged"),
        ("r.parquet", b"no parquet", "is not parquet"),
        ("r.jsonl", b"", "has no rows"),
        ("r.csv", b"query,positive\n", "has no rows"),
    ],
)
def test_damaged_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in problems_of(DataConfig(dataset_name=str(tmp_path / name)))[0]


def test_missing_file_and_hub_data_set_without_a_hub(tmp_path):
    assert (
        "there is no such file"
        in problems_of(DataConfig(dataset_name=str(tmp_path / "r.jsonl")))[0]
    )
    (problem,) = problems_of(DataConfig(dataset_name="nobody/nothing-of-this-name"))
    assert "nobody/nothing-of-this-name" in problem and "HF_HUB_OFFLINE" in problem


def test_scenes_rows_follow_the_recipe():
    rows = read_rows(
        DataConfig(
            dataset_name="scenes", train_split="validation", rows=3, options={"form": "quad"}
        )
    )
    assert len(rows) == 3
    assert all(isinstance(row["negative"], list) and row["negative_positive"] for row in rows)
    assert rows == read_rows(
        DataConfig(
            dataset_name="scenes", train_split="validation", rows=3, options={"form": "quad"}
        )
    )


def test_real_triplets(shared):
    rows = read_rows(
        DataConfig(dataset_name=str(shared / "data/train/nli-triplets.train.jsonl.gz"), rows=100)
    )
    assert len(rows) == 100 and all(row["negative"] for row in rows)
