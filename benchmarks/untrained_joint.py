"""Do rationales help a model that was never trained for it? Text alone against text + rationale.

    python benchmarks/untrained_joint.py models/smollm2-135m DATA --tasks trec-qa.dev --queries 60

DATA is a folder of gzipped JSON lines: `NAME.jsonl.gz` with `query`, `sentence`, `relevant` (ranked
inside each query, MAP), with `sentence1`, `sentence2`, `score` (Spearman), or
`NAME.corpus`, `NAME.queries`, `NAME.qrels` as in BEIR (nDCG@10). Queries are written for, documents
are not; of pairs both sides are. Every part is centred on the texts of the task. Nothing is trained
and no label is looked at before scoring.

Prints, and writes with --output, the score of the text alone and of each weight, and a paired
bootstrap over queries (or pairs) of the difference. Rationales and vectors are kept in --cache, so
that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.settings import EncoderRole, EncoderSettings
from grace_rl.embed.similarity import rank_correlation
from grace_rl.recipe.prompt import PromptConfig

PROMPTS = {
    "continue": "Write a short passage that answers or continues this: {text}",
    "rewrite": "Rewrite the text in other words: {text}",
    "topic": "What is this text about? Answer with a short phrase: {text}",
    "keywords": "List five keywords for this text: {text}",
}
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
DRAWS = 2000

Score = Callable[[Tensor, Tensor], list[Any]]
"""Vectors of queries and of documents -> one number for each query, whose mean is the score."""


@dataclass
class Task:
    """Texts, and how their vectors are scored."""

    name: str
    queries: list[str]
    documents: list[str]
    write_documents: bool
    score: Score
    total: Callable[[Sequence[float]], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["trec-qa.dev"])
    parser.add_argument("--queries", type=int, default=60, help="the first N queries, or pairs")
    parser.add_argument("--documents", type=int, default=400, help="of a BEIR corpus")
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=["continue"])
    parser.add_argument("--tokens", type=int, default=40, help="of a rationale, at most")
    parser.add_argument("--text-tokens", type=int, default=96)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = []
    for prompt in options.prompts:
        encoder = load(options, PROMPTS[prompt])
        for name in options.tasks:
            task = read_task(options.data, name, options.queries, options.documents)
            result = {"prompt": prompt, **measure(encoder, task)}
            print(json.dumps(result), flush=True)
            found.append(result)
            if options.output:
                options.output.write_text(json.dumps(found, indent=2) + "\n")


def load(options: argparse.Namespace, user: str) -> RationaleEncoder:
    settings = EncoderSettings(
        reader=ReaderConfig(span="joint"),
        instruction=PromptConfig(user=user),
        max_text_tokens=options.text_tokens,
        max_rationale_tokens=options.tokens,
        roles={"document": EncoderRole(write=False)},
    )
    encoder = RationaleEncoder.from_pretrained(
        options.model, settings=settings, model_kwargs={"dtype": torch.float32}
    )
    if options.cache:
        encoder.use_cache(options.cache)
    return encoder


def measure(encoder: RationaleEncoder, task: Task) -> dict[str, Any]:
    """The scores of the text alone, of the rationale alone, and of their sums."""
    began = time.perf_counter()
    queries, words = read(encoder, task.queries, True)
    documents, _ = read(encoder, task.documents, task.write_documents)
    reader = encoder.reader
    reader.centre = reader.mean(torch.cat([queries, documents]))
    half = queries.size(1) // 2

    def rows(weight: float) -> list[Any]:
        reader.weight = weight
        return task.score(reader.finish(queries), reader.finish(documents))

    text = rows(0.0)
    scores = {"text": task.total(text)}
    gains = {}
    for weight in WEIGHTS:
        found = rows(weight)
        scores[f"text + {weight:g} x rationale"] = task.total(found)
        gains[f"{weight:g}"] = bootstrap(task.total, text, found)
    written = queries[:, half:] - reader.centre[half:]
    other = documents[:, half:] if task.write_documents else documents[:, :half]
    centre = reader.centre[half:] if task.write_documents else reader.centre[:half]
    unit = torch.nn.functional.normalize
    scores["rationale alone"] = task.total(task.score(unit(written), unit(other - centre)))
    return {
        "task": task.name,
        "queries": len(task.queries),
        "documents": len(task.documents),
        "scores": {name: round(value, 4) for name, value in scores.items()},
        "gain over text (mean, 2.5%, 97.5%)": gains,
        "tokens": round(sum(words) / max(1, len(words)), 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def read(encoder: RationaleEncoder, texts: list[str], write: bool) -> tuple[Tensor, list[int]]:
    """(N, 2H) raw vectors, and how many tokens were written for each text."""
    raws, lengths = [], []
    for start in range(0, len(texts), 64):
        _, counts, raw = encoder.raw(texts[start : start + 64], None if write else "none")
        raws.append(raw)
        lengths += counts
        print(f"  {start + len(counts)} of {len(texts)}", flush=True)
    return torch.cat(raws), lengths


def bootstrap(
    total: Callable[[Sequence[float]], float], before: Sequence[float], after: Sequence[float]
) -> list[float]:
    """Difference of two totals over the same queries, with the 95% interval of paired draws."""
    draw = np.random.default_rng(0)
    pairs = np.array([before, after])
    differences = []
    for _ in range(DRAWS):
        chosen = pairs[:, draw.integers(pairs.shape[1], size=pairs.shape[1])]
        differences.append(total(chosen[1]) - total(chosen[0]))
    low, high = np.percentile(differences, [2.5, 97.5])
    return [round(float(v), 4) for v in (total(after) - total(before), low, high)]


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


# -- tasks ---------------------------------


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def read_task(data: Path, name: str, queries: int, documents: int) -> Task:
    if (data / f"{name}.corpus.jsonl.gz").exists():
        return beir(data, name, queries, documents)
    rows = list(lines(data / f"{name}.jsonl.gz"))
    if "sentence1" in rows[0]:
        return pairs(name, rows[:: max(1, len(rows) // queries)][:queries])
    return ranking(name, rows, queries)


def ranking(name: str, rows: list[dict[str, Any]], count: int) -> Task:
    """Average precision inside each query's candidates; queries with one kind of them only say
    nothing."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["query"], []).append(row)
    kept = [q for q, g in groups.items() if 0 < sum(bool(r["relevant"]) for r in g) < len(g)]
    kept = kept[:count]
    texts = [row["sentence"] for query in kept for row in groups[query]]

    def score(asked: Tensor, found: Tensor) -> list[float]:
        values, start = [], 0
        for number, query in enumerate(kept):
            group = groups[query]
            cosines = found[start : start + len(group)] @ asked[number]
            start += len(group)
            order = cosines.argsort(descending=True, stable=True).tolist()
            hits = np.array([bool(group[i]["relevant"]) for i in order])
            precision = hits.cumsum() / np.arange(1, len(hits) + 1)
            values.append(float(precision[hits].mean()))
        return values

    return Task(name, kept, texts, False, score, mean)


def pairs(name: str, rows: list[dict[str, Any]]) -> Task:
    """Spearman; the number of a pair is its cosine and its gold score, packed as one."""
    gold = [float(row["score"]) for row in rows]

    def score(first: Tensor, second: Tensor) -> list[Any]:
        cosines = (first * second).sum(-1).tolist()
        return [complex(c, g) for c, g in zip(cosines, gold, strict=True)]

    def total(values: Any) -> float:
        packed = np.asarray(values)
        return rank_correlation(packed.real.tolist(), packed.imag.tolist())

    first, second = ([row[key] for row in rows] for key in ("sentence1", "sentence2"))
    return Task(name, first, second, True, score, total)


def beir(data: Path, name: str, queries: int, documents: int) -> Task:
    """nDCG@10 among all documents that are relevant to a kept query, and others up to a number."""
    asked = {row["_id"]: row["text"] for row in lines(data / f"{name}.queries.jsonl.gz")}
    asked = dict(list(asked.items())[:queries])
    gains: dict[str, dict[str, float]] = {}
    for row in lines(data / f"{name}.qrels.jsonl.gz"):
        if row["query-id"] in asked and float(row["score"]) > 0:
            gains.setdefault(row["query-id"], {})[row["corpus-id"]] = float(row["score"])
    asked = {key: text for key, text in asked.items() if key in gains}
    wanted = {document for found in gains.values() for document in found}
    texts: dict[str, str] = {}
    for row in lines(data / f"{name}.corpus.jsonl.gz"):
        if row["_id"] in wanted or len(texts) < documents - len(wanted):
            texts[row["_id"]] = f"{row.get('title', '')} {row['text']}".strip()
    ids = list(texts)

    def score(first: Tensor, second: Tensor) -> list[float]:
        best = (first @ second.T).topk(min(10, len(ids))).indices.tolist()
        discount = 1 / np.log2(np.arange(2, 12))
        values = []
        for query, order in zip(asked, best, strict=True):
            found = np.array([gains[query].get(ids[i], 0.0) for i in order])
            ideal = np.array(sorted(gains[query].values(), reverse=True)[:10])
            values.append(
                float(
                    (found * discount[: len(found)]).sum() / (ideal * discount[: len(ideal)]).sum()
                )
            )
        return values

    return Task(name, list(asked.values()), list(texts.values()), False, score, mean)


if __name__ == "__main__":
    main()
