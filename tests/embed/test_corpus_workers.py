"""Corpora: a folder of parquet in, a folder of parts out, by one worker or by several on Ray."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from grace_rl.cli import main
from grace_rl.data.corpus import ParquetTexts, Partition, texts_of
from grace_rl.data.texts import TextSource
from grace_rl.embed.corpus import Done, EmbedJob, embed_corpus
from grace_rl.embed.encoder_module import Encoded
from grace_rl.embed.loading import load_encoder
from grace_rl.errors import UserError
from grace_rl.run.workers import Cluster

QUIET = Console(quiet=True)
COLUMNS = TextSource(Path("unused"))


class Digests:
    """A vector for every text, without a model; some texts are poison."""

    writes_rationales = False

    def encode(self, texts: Sequence[str], *args: Any, **kwargs: Any) -> Encoded:
        if any("poison" in text for text in texts):
            raise RuntimeError("it cannot be read")
        rows = [list(hashlib.sha256(text.encode()).digest()) for text in texts]
        return Encoded([], torch.tensor(rows, dtype=torch.float32))


def write_folder(folder: Path, texts: Sequence[str | None], files: int = 2, group: int = 3) -> Path:
    """The texts in several parquet files with small row groups."""
    folder.mkdir(parents=True)
    size = -(-len(texts) // files)
    for number in range(files):
        table = pa.table({"text": pa.array(texts[number * size : (number + 1) * size])})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=group)
    return folder


def embed(folder: Path, output: Path, model: Path, load: Any = Digests, **options: Any) -> Done:
    job = EmbedJob(ParquetTexts(str(folder), COLUMNS), output, chunk=4)
    return embed_corpus(load, job, model, console=QUIET, **options)


def table(output: Path) -> pa.Table:
    return pq.read_table(output)


def test_every_row_of_every_file_is_in_one_partition(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(21)]
    corpus = ParquetTexts(str(write_folder(tmp_path / "in", texts)), COLUMNS)
    for size in (1, 4, 50):
        parts, kind = corpus.partitions(size)
        rows = [row for part in parts for row in corpus.read(part)]
        assert rows == [{"id": i, "text": text} for i, text in enumerate(texts)] and kind is int
    assert texts_of(f"file://{tmp_path}/in/*.parquet", COLUMNS).partitions(4)[0] == [
        *corpus.partitions(4)[0]
    ]


def test_a_bad_row_is_an_error_row_and_loses_no_other(tmp_path: Path, model: Path) -> None:
    texts = [f"text {i}" for i in range(19)]
    texts[5], texts[9] = "poison", " "
    done = embed(write_folder(tmp_path / "in", texts), tmp_path / "out", model)
    assert done == Done(19, 2)
    found = table(tmp_path / "out")
    assert {i for i, error in enumerate(found["error"].to_pylist()) if error} == {5, 9}
    assert "it cannot be read" in found["error"][5].as_py()
    assert "0.parquet: row 10: text is empty" in found["error"][9].as_py()
    vectors = found["vector"].to_pylist()
    assert [i for i, vector in enumerate(vectors) if vector is None] == [5, 9]
    assert vectors[6] == Digests().encode(["text 6"]).vectors[0].tolist()
    assert json.loads((tmp_path / "out" / "_finished.json").read_text()) == {
        "rows": 19,
        "errors": 2,
    }


def test_a_worker_that_can_embed_nothing_ends_the_job(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be read"):
        embed(write_folder(tmp_path / "in", ["poison"] * 6), tmp_path / "out", model)


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path, model: Path) -> None:
    source = write_folder(tmp_path / "in", [f"text {i}" for i in range(9)])
    embed(source, tmp_path / "out", model)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert embed(source, tmp_path / "out", model) == Done(9)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    next(iter(before)).unlink()  # a part that is lost is made again
    assert embed(source, tmp_path / "out", model) == Done(9)
    pq.write_table(pa.table({"text": ["another"]}), source / "2.parquet")
    with pytest.raises(UserError, match="another job .different: input"):
        embed(source, tmp_path / "out", model)
    (tmp_path / "theirs").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "theirs" / "a.parquet")
    with pytest.raises(UserError, match="has parquet files already"):
        embed(source, tmp_path / "theirs", model)


def test_what_is_wrong_with_a_corpus_is_told_before(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "in", ["a", "b"])
    pq.write_table(pa.table({"texts": ["a"], "id": [0.5]}), folder / "c.parquet")
    arguments = ["embed", str(model_folder), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--input", str(folder)]) == 2
    told = capsys.readouterr().err
    assert "c.parquet: column text is not there" in told and "id must be texts" in told
    assert main([*arguments, "--input", str(tmp_path / "none*.parquet")]) == 2
    assert "there are no parquet files" in capsys.readouterr().err
    assert main([*arguments, "--input", str(folder), "--workers", "2"]) == 2
    assert "--workers: is of a Ray cluster" in capsys.readouterr().err


# -- on Ray ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with one slot each, the second without the head."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from ray import cloudpickle
    from ray.cluster_utils import Cluster as Nodes

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine lets them starve
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield nodes
    ray.shutdown()
    nodes.shutdown()


class DiesOnce:
    """An encoder whose worker is killed at the first text."""

    def __init__(self, encoder: Any, mark: Path) -> None:
        self.encoder, self.mark = encoder, mark
        self.writes_rationales = encoder.writes_rationales

    def encode(self, texts: Sequence[str], *args: Any, **kwargs: Any) -> Encoded:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if any("poison" in text for text in texts):
            raise RuntimeError("it cannot be read")
        return self.encoder.encode(texts, *args, **kwargs)


@pytest.mark.slow
@pytest.mark.skipif("GRACE_RL_RAY" not in os.environ, reason="starts Ray: GRACE_RL_RAY=1")
def test_two_workers_one_killed_give_what_one_gives(
    nodes: Any, model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "in", [*texts[:7], "poison", *texts[7:15]])
    mark = tmp_path / "died"

    def load() -> Any:
        return DiesOnce(load_encoder(model_folder), mark)

    several = embed(source, tmp_path / "two", model_folder, load, cluster=Cluster(workers=2))
    assert mark.exists() and several == Done(16, 1)
    assert embed(source, tmp_path / "one", model_folder, load) == several
    assert table(tmp_path / "two") == table(tmp_path / "one")  # to the last bit


def test_partitions_are_plain_data() -> None:
    partition = Partition(1, "a.parquet", 4, 4, 8)
    assert Partition(**json.loads(json.dumps(partition._asdict()))) == partition
