"""How sure a score is: percentile intervals over resampled examples of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grace_rl.evaluate.tasks import LocalTask

DRAWS = 1000
LEVEL = 0.95
Statistic = Callable[[np.ndarray[Any, Any]], float]


def interval(
    count: int, statistic: Statistic, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """The 95% percentile interval of a statistic.

    Args:
        count: Number of examples.
        statistic: Of the examples with the given numbers (count,), drawn with replacement.
        seed: Of the draws.
        draws: How many.

    >>> values = np.arange(100.0)
    >>> low, high = interval(100, lambda chosen: values[chosen].mean())
    >>> 42 < low < 46 < 53 < high < 57
    True
    """
    random = np.random.default_rng(seed)
    found = [statistic(random.integers(0, count, count)) for _ in range(draws)]
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(found, [tail, 100 - tail])
    return float(low), float(high)


def task_interval(task: LocalTask, predictions: Any, seed: int = 0) -> tuple[float, float] | None:
    """The interval of a local task's main metric; None where it is no mean over examples.

    Args:
        task: The task.
        predictions: What mteb saved of it: similarities, ranked documents, or predicted labels.
        seed: Of the draws.
    """
    values = EXAMPLES[task.kind](task, predictions) if task.kind in EXAMPLES else None
    return None if values is None else interval(*values, seed=seed)


def _sts(task: LocalTask, predictions: Mapping[str, Any]) -> tuple[int, Statistic]:
    from scipy.stats import rankdata

    gold = np.array([row["score"] for row in task.parts[""]])
    cosines = np.array(predictions["cosine_scores"])

    def spearman(chosen: np.ndarray[Any, Any]) -> float:
        return float(np.corrcoef(rankdata(gold[chosen]), rankdata(cosines[chosen]))[0, 1])

    return len(gold), spearman


def _classification(task: LocalTask, predictions: Sequence[Any]) -> tuple[int, Statistic]:
    names = sorted({str(row["label"]) for rows in task.parts.values() for row in rows})
    gold = np.array([names.index(str(row["label"])) for row in task.parts[".test"]])
    right = (np.array(predictions) == gold).mean(0)  # over the draws of training rows
    return len(gold), lambda chosen: float(right[chosen].mean())


def _pair_classification(task: LocalTask, predictions: Mapping[str, Any]) -> tuple[int, Statistic]:
    from sklearn.metrics import average_precision_score

    gold = np.array([row["label"] for row in task.parts[""]])
    cosines = np.array(predictions["cosine_scores"])

    def precision(chosen: np.ndarray[Any, Any]) -> float:
        some = gold[chosen]
        return float(average_precision_score(some, cosines[chosen])) if some.any() else np.nan

    return len(gold), precision


def _ranked(metric: str) -> Callable[[LocalTask, Any], tuple[int, Statistic]]:
    def values(task: LocalTask, predictions: Any) -> tuple[int, Statistic]:
        import pytrec_eval

        from grace_rl.evaluate.local_tasks import DATA

        relevant = DATA[task.kind](task.parts)["test"]["relevant_docs"]
        evaluator = pytrec_eval.RelevanceEvaluator(relevant, {metric})
        found = evaluator.evaluate(predictions)
        each = np.array([next(iter(scores.values())) for scores in found.values()])
        return len(each), lambda chosen: float(each[chosen].mean())

    return values


EXAMPLES: dict[str, Callable[[LocalTask, Any], tuple[int, Statistic]]] = {
    "sts": _sts,
    "retrieval": _ranked("ndcg_cut.10"),
    "reranking": _ranked("map_cut.1000"),
    "classification": _classification,
    "pair_classification": _pair_classification,
}
