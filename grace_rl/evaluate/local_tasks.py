"""Local files as tasks of mteb, so that they are scored by mteb's own code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

from grace_rl.evaluate.tasks import LocalTask

# kind -> (class of mteb, its name of the kind, main metric)
FORMS: dict[str, tuple[type[AbsTask], str, str]] = {
    "sts": (AbsTaskSTS, "STS", "cosine_spearman"),
    "retrieval": (AbsTaskRetrieval, "Retrieval", "ndcg_at_10"),
    "reranking": (AbsTaskRetrieval, "Reranking", "map_at_1000"),
    "classification": (AbsTaskClassification, "Classification", "accuracy"),
    "clustering": (AbsTaskClustering, "Clustering", "v_measure"),
    "pair_classification": (AbsTaskPairClassification, "PairClassification", "max_ap"),
}


def mteb_task(task: LocalTask, seed: int = 42) -> AbsTask:
    """A local task as one of mteb's, its data loaded.

    - `sts`: Spearman of the cosine with `score`.
    - `retrieval`: nDCG@10; a document's title is put before its text, as in BEIR.
    - `reranking`: mean average precision of each query's own sentences; queries without any
      relevant sentence are left out.
    - `classification`: accuracy of a logistic regression on 8 rows of each label, the mean of ten
      draws.
    - `clustering`: V-measure of k-means, the mean of ten draws.
    - `pair_classification`: average precision, by the similarity that does best.

    Args:
        task: From `grace_rl.evaluate.tasks.load_tasks`.
        seed: Of the draws; 42 is mteb's own.
    """
    form, kind, main = FORMS[task.kind]
    metadata = TaskMetadata(
        name=re.sub(r"[^A-Za-z0-9_.-]", "-", task.name),
        description=f"{task.name}, from local files",
        type=kind,  # type: ignore[arg-type]
        category="t2t",
        dataset={"path": "local", "revision": "local"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main,
    )
    name = f"Local{kind}"
    # Two bases would do, but the class must know its metadata before an instance is made.
    local = type(name, (form,), {"metadata": metadata, "__module__": __name__})
    made: AbsTask = local(seed=seed)
    made.dataset = {"default": DATA[task.kind](task.parts)}
    if isinstance(made, AbsTaskSTS):
        gold = [row["score"] for row in task.parts[""]]
        made.min_score, made.max_score = min(0, *gold), max(gold)
    if isinstance(made, AbsTaskClustering):
        made.max_fraction_of_documents_to_embed = None
    made.data_loaded = True
    return made


Parts = Mapping[str, list[dict[str, Any]]]


def _columns(rows: list[dict[str, Any]], **names: str) -> Dataset:
    """Our column = the file's; labels become texts, as mteb wants one type."""
    columns = {ours: [row[theirs] for row in rows] for ours, theirs in names.items()}
    return Dataset.from_dict(columns)


def _sts(parts: Parts) -> Any:
    rows = parts[""]
    return DatasetDict(
        test=_columns(rows, sentence1="sentence1", sentence2="sentence2", score="score")
    )


def _pair_classification(parts: Parts) -> Any:
    rows = parts[""]
    return DatasetDict(
        test=_columns(rows, sentence1="sentence1", sentence2="sentence2", labels="label")
    )


def _classification(parts: Parts) -> Any:
    names = sorted({str(row["label"]) for rows in parts.values() for row in rows})
    numbers = {name: number for number, name in enumerate(names)}
    return DatasetDict(
        {
            part.removeprefix("."): Dataset.from_dict(
                {
                    "text": [row["text"] for row in rows],
                    "label": [numbers[str(row["label"])] for row in rows],
                }
            )
            for part, rows in parts.items()
        }
    )


def _clustering(parts: Parts) -> Any:
    rows = [{"text": row["text"], "label": str(row["label"])} for row in parts[""]]
    return DatasetDict(test=_columns(rows, sentences="text", labels="label"))


def _retrieval(parts: Parts) -> Any:
    relevant: dict[str, dict[str, int]] = {}
    for row in parts[".qrels"]:
        if row["score"] > 0:
            relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
    corpus = [{"title": "", **row} for row in parts[".corpus"]]
    return {
        "test": {
            "corpus": _columns(corpus, id="_id", title="title", text="text"),
            "queries": _columns(parts[".queries"], id="_id", text="text"),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
    }


def _reranking(parts: Parts) -> Any:
    """Every query with its own sentences as the candidates."""
    queries: dict[str, str] = {}
    corpus: list[dict[str, Any]] = []
    relevant: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for number, row in enumerate(parts[""]):
        query = queries.setdefault(row["query"], f"q{len(queries)}")
        corpus.append({"_id": f"d{number}", "text": row["sentence"]})
        candidates.setdefault(query, []).append(f"d{number}")
        if row["relevant"] > 0:
            relevant.setdefault(query, {})[f"d{number}"] = row["relevant"]
    texts = [{"_id": name, "text": text} for text, name in queries.items() if name in relevant]
    return {
        "test": {
            "corpus": _columns(corpus, id="_id", text="text"),
            "queries": _columns(texts, id="_id", text="text"),
            "relevant_docs": relevant,
            "top_ranked": {query: candidates[query] for query in relevant},
        }
    }


DATA: dict[str, Callable[[Parts], Any]] = {
    "sts": _sts,
    "retrieval": _retrieval,
    "reranking": _reranking,
    "classification": _classification,
    "clustering": _clustering,
    "pair_classification": _pair_classification,
}
