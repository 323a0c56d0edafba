"""Corpora: a folder of parquet in, a folder of parts out, by one worker or by several on Ray."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from travelling import Travelling

from grace_rl.cli import main
from grace_rl.data.corpus import ParquetTexts, Partition, texts_of
from grace_rl.data.texts import TextSource
from grace_rl.embed.corpus import Done, EmbedJob, embed_corpus, embed_many
from grace_rl.embed.encoder_module import Encoded
from grace_rl.embed.loading import load_encoder
from grace_rl.errors import UserError
from grace_rl.run.workers import Cluster, Item, Work, run_all

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


def test_partitions_are_plain_data() -> None:
    partition = Partition(1, "a.parquet", 4, 4, 8)
    assert Partition(**json.loads(json.dumps(partition._asdict()))) == partition


def test_many_texts_at_once_are_what_the_encoder_gives(
    model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    load, many = partial(load_encoder, model_folder), [texts[2], " ", *texts[:6], texts[0]]
    how = {"rationale": "greedy", "role": None}
    found = embed_many(load, many, model_folder, Travelling(), tmp_path, 4, **how)
    expected = load().encode(many)
    assert found.rationales == expected.rationales and found.lengths == expected.lengths
    torch.testing.assert_close(found.vectors, expected.vectors, atol=1e-5, rtol=0)
    assert not [*tmp_path.iterdir()]  # what lay there meanwhile is gone


# -- on Ray ------------------------------------------------------------------------------------

BUSY = {  # a busy machine makes Ray slower, and no node or worker dead
    "RAY_worker_niceness": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "40",
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "900",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_enable_worker_prestart": "0",
}
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
STARTS = 5  # Ray itself gives up after half a minute


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with one slot each."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from ray import cloudpickle
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patch:
        for name, value in BUSY.items():
            patch.setenv(name, value)
        for left in reversed(range(STARTS)):
            nodes = Nodes()
            try:
                nodes.add_node(**NODE, include_dashboard=False)
                nodes.second = nodes.add_node(**NODE)
                break
            except Exception:
                nodes.shutdown()
                if not left:
                    raise
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


@pytest.mark.slow
def test_what_a_killed_driver_left_is_gone_on_with(
    nodes: Any, model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    source, parts = write_folder(tmp_path / "in", [*texts, *texts]), tmp_path / "out"
    command = ["embed", str(model_folder), "--input", str(source), "--chunk", "1", "--output"]
    ray = ["--engine", "ray", "--address", nodes.address, "--workers", "1"]
    program = [sys.executable, "-m", "grace_rl", *command, str(parts), *ray]
    with subprocess.Popen(program) as driver:
        while not (made := [*parts.glob("part-*")]):
            assert driver.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        driver.kill()
    before = {path: path.stat().st_mtime_ns for path in made}
    assert not (parts / "_finished.json").exists()
    assert main([*command, str(parts)]) == 0  # with the worker here
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert table(parts) == table(tmp_path / "whole")


@pytest.mark.slow
def test_what_the_work_raises_and_a_deadly_item_end_the_job(nodes: Any) -> None:
    def make() -> Work:
        def work(item: Item) -> Item:
            if item["deadly"]:
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError(["a: is wrong", "b: too"])

        return work

    with pytest.raises(UserError) as raised:
        list(run_all([{"deadly": False}], make, Cluster()))
    assert raised.value.problems == ["a: is wrong", "b: too"]
    with pytest.raises(UserError, match="a worker died 4 times over the same item"):
        list(run_all([{"deadly": True}], make, Cluster()))
    with pytest.raises(UserError, match="--workers: 3 of one CPU each, but there are 2"):
        list(run_all([{"deadly": False}] * 3, make, Cluster(workers=3)))


@pytest.mark.slow
def test_what_a_lost_node_had_in_hand_is_done_by_the_other(nodes: Any, tmp_path: Path) -> None:
    def make() -> Work:
        def work(item: Item) -> Item:  # both workers take one, and wait until a node is gone
            (tmp_path / f"{os.getpid()}").touch()
            while not (tmp_path / "lost").exists():
                time.sleep(0.01)
            return item

        return work

    def lose() -> None:
        while len([*tmp_path.iterdir()]) < 2:
            time.sleep(0.01)
        nodes.remove_node(nodes.second, allow_graceful=False)
        (tmp_path / "lost").touch()

    items = [{"number": number} for number in range(6)]
    Thread(target=lose, daemon=True).start()
    made = [*run_all(items, make, Cluster(workers=2))]
    assert sorted(one["number"] for one in made) == [*range(6)]
