"""`grace-rl evaluate`: a model's scores on tasks, their cost, how sure they are; its diagnostics.

mteb computes every score. The same form as a run's evaluation.json, with more in it.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from grace_rl.embed.diagnostics import describe_encoder
from grace_rl.errors import UserError
from grace_rl.evaluate.bootstrap import task_interval
from grace_rl.evaluate.local_tasks import mteb_task
from grace_rl.evaluate.mteb_encoder import MtebEncoder, Usage
from grace_rl.evaluate.tasks import LocalTask, Task, tasks_digest
from grace_rl.run.files import plain_numbers, write_text
from grace_rl.run.identity import digest
from grace_rl.run.versions import installed_versions

UNFINISHED = "unfinished"  # key of a file that is not: a digest of what it is of
BATCH = 512  # texts that mteb hands over at once; encoders sort and cut them themselves


def evaluate_tasks(
    encoder: MtebEncoder,
    tasks: Sequence[Task],
    seed: int = 42,
    console: Console | None = None,
    finished: Mapping[str, Any] | None = None,
    on_task: Any = None,
) -> list[dict[str, Any]]:
    """Score an encoder on tasks.

    Args:
        encoder: The encoder; its `usage` is set to zero before each task.
        tasks: From `grace_rl.evaluate.tasks.load_tasks`.
        seed: Of mteb's draws and of the intervals'.
        console: Where progress is shown; None shows none.
        finished: Name -> result of tasks that need no second run.
        on_task: Called with all results after each task.

    Returns:
        For each task `name`, `main_metric`, `score`, `interval` (95%, or None), `metrics` (all of
        mteb's numbers), `seconds`, `encode_seconds`, `texts`, `texts_per_second` and
        `rationale_tokens`, the mean length of what was written.

    Raises:
        UserError: The data of one of mteb's tasks cannot be loaded.
    """
    results: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(compact=True), console=console, disable=console is None
    ) as progress:
        bar = progress.add_task("tasks", total=len(tasks))
        for task in tasks:
            name = task if isinstance(task, str) else task.name
            progress.update(bar, description=name)
            known = (finished or {}).get(name)
            results.append(known if known is not None else _evaluate_one(encoder, task, seed))
            if console is not None:
                progress.console.print(_line(results[-1]), highlight=False, soft_wrap=True)
            if on_task is not None:
                on_task(results)
            progress.advance(bar)
    return results


def _evaluate_one(encoder: MtebEncoder, task: Task, seed: int) -> dict[str, Any]:
    import mteb

    logging.getLogger("mteb").setLevel(logging.WARNING)
    local = isinstance(task, LocalTask)
    made = mteb_task(task, seed) if isinstance(task, LocalTask) else mteb.get_task(task)
    if not made.data_loaded:
        try:
            made.load_data()
        except (OSError, ValueError) as error:
            raise UserError(f"{task}: its data cannot be loaded from the hub: {error}") from error
    encoder.usage = Usage()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mteb.evaluate(
            encoder,  # type: ignore[arg-type]  # the protocol's __init__ is that of mteb's command
            [made],
            cache=None,
            co2_tracker=False,
            encode_kwargs={"batch_size": BATCH},
            prediction_folder=folder,
            show_progress_bar=False,
        )
        result = found.task_results[0]
        interval = None
        if isinstance(task, LocalTask):
            saved = json.loads((Path(folder) / made.prediction_file_name).read_text("utf-8"))
            interval = task_interval(task, saved["default"]["test"], seed)
    usage = encoder.usage
    seconds = time.perf_counter() - started
    splits = [scores for split in result.scores.values() for scores in split]
    return {
        "name": task.name if isinstance(task, LocalTask) else task,
        "kind": task.kind if isinstance(task, LocalTask) else str(made.metadata.type),
        "main_metric": made.metadata.main_score,
        "score": float(result.get_score()),
        "interval": interval,
        "metrics": _numbers(splits[0]) if local or len(splits) == 1 else {},
        "seconds": seconds,
        "encode_seconds": usage.seconds,
        "texts": usage.texts,
        "texts_per_second": usage.texts / max(usage.seconds, 1e-9),
        "rationale_tokens": usage.rationale_tokens / max(usage.texts, 1),
        "rationale": encoder.rationale,
    }


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in scores.items()
        if isinstance(value, (int, float)) and name != "main_score"
    }


def _line(result: Mapping[str, Any]) -> str:
    low_high = result["interval"]
    sure = f" ({low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
    speed = f"{result['texts']:,} texts, {result['texts_per_second']:,.0f}/s"
    return f"{result['name']}: {result['main_metric']} {result['score']:.4f}{sure}, {speed}"


def evaluate_model(
    encoder: MtebEncoder,
    model: str,
    tasks: Sequence[Task],
    output: Path,
    *,
    seed: int = 42,
    without_rationale: bool = True,
    diagnostics: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score, describe and write the output file, again after every task: a kill loses one task.

    Tasks that an unfinished file has already are not run again, if model, tasks and seed are what
    they were; a finished file is made anew.

    Args:
        encoder: The encoder.
        model: What the file calls the model.
        tasks: From `load_tasks`.
        output: The file.
        seed: See `evaluate_tasks`.
        without_rationale: Also score the text in the rationale's place, where rationales are
            written.
        diagnostics: Also describe the vectors and the rationales, on texts of the local tasks.
        console: Where progress is shown.

    Returns:
        What was written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    job = digest([model, encoder.revision, tasks_digest(tasks), seed])
    finished = _finished(output, job)
    content: dict[str, Any] = {"model": model, "seed": seed, "rows": [], "tasks": []}
    versions = installed_versions() | {"python": platform.python_version()}
    content |= {UNFINISHED: job, "versions": versions}
    ways = [encoder.rationale]
    if without_rationale and encoder.rationale != "none":
        ways.append("none")
    own = encoder.rationale
    for way in ways:
        encoder.rationale = way
        evaluate_tasks(
            encoder,
            tasks,
            seed,
            console,
            {name: result for (name, rationale), result in finished.items() if rationale == way},
            partial(_keep, output, content, way),
        )
    encoder.rationale = own
    if diagnostics:
        texts = sample_texts(tasks)
        content["diagnostics"] = describe_encoder(encoder.encoder, own, texts, graded_pairs(tasks))
        content["batch_invariance"] = batch_invariance(encoder, texts)
    del content[UNFINISHED]
    _write(output, content)
    return content


def _keep(
    output: Path, content: dict[str, Any], way: str, results: Sequence[dict[str, Any]]
) -> None:
    """Write the results of one way so far, in the place of earlier ones."""
    others = [task for task in content["tasks"] if task["rationale"] != way]
    content["tasks"] = [*others, *results]
    kept = [row for row in content["rows"] if row["rationale"] != way]
    scores = {f"{task['name']}/{task['main_metric']}": task["score"] for task in results}
    content["rows"] = [*kept, {"name": "model", "rationale": way, "scores": scores}]
    _write(output, content)


def _write(output: Path, content: Mapping[str, Any]) -> None:
    write_text(output, json.dumps(plain_numbers(content), indent=1, ensure_ascii=False) + "\n")


def _finished(output: Path, job: str) -> dict[tuple[str, str], Any]:
    """Results of an earlier, interrupted run, by task and rationale."""
    try:
        content = json.loads(output.read_text(encoding="utf-8"))
        if content[UNFINISHED] != job:
            return {}
        return {(task["name"], task["rationale"]): task for task in content["tasks"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def graded_pairs(tasks: Sequence[Task], most: int = 300) -> list[tuple[str, str, float]]:
    """Pairs of the first local STS task with their gold similarity, 0 to 1."""
    for task in tasks:
        if isinstance(task, LocalTask) and task.kind == "sts":
            rows = task.parts[""][:most]
            highest = max(row["score"] for row in task.parts[""]) or 1
            return [(r["sentence1"], r["sentence2"], r["score"] / highest) for r in rows]
    return []


def sample_texts(tasks: Sequence[Task], most: int = 500) -> list[str]:
    """Different texts of the local tasks, as many of each."""
    local = [task for task in tasks if isinstance(task, LocalTask)]
    found: dict[str, None] = {}
    for task in local:
        names = ("text", "sentence1", "sentence2", "sentence")
        own = (row[n] for rows in task.parts.values() for row in rows for n in names if n in row)
        some = dict.fromkeys(text for text in own if text.strip())
        found |= dict.fromkeys(list(some)[: max(1, most // len(local))])
    return list(found)


def batch_invariance(encoder: MtebEncoder, texts: Sequence[str], count: int = 24) -> dict[str, Any]:
    """Cosine of a text's vector alone with its vector in a batch of all the texts.

    Returns:
        `lowest` and `mean` cosine and the number of `texts`; 1 where the batch changes nothing.
    """
    chosen = list(texts)[:: max(1, len(texts) // count)][:count]
    if not chosen:
        return {"texts": 0}
    together = encoder.encoder.encode(list(texts), encoder.rationale).vectors
    place = {text: i for i, text in enumerate(texts)}
    cosines = []
    for text in chosen:
        alone = encoder.encoder.encode([text], encoder.rationale).vectors[0]
        cosines.append(float(torch.dot(alone.double(), together[place[text]].double())))
    return {"texts": len(chosen), "lowest": min(cosines), "mean": sum(cosines) / len(cosines)}


def result_table(content: Mapping[str, Any]) -> Table:
    """A line for each task, with and without the rationale."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("task", "metric", "rationale"):
        table.add_column(head, no_wrap=True)
    for head in ("score", "95%", "texts/s", "tokens"):
        table.add_column(head, justify="right", no_wrap=True)
    for task in content["tasks"]:
        low_high = task["interval"] or ()
        table.add_row(
            task["name"],
            task["main_metric"],
            task["rationale"],
            f"{task['score']:.4f}",
            " to ".join(f"{value:.2f}" for value in low_high),
            f"{task['texts_per_second']:,.0f}",
            f"{task['rationale_tokens']:.1f}" if task["rationale_tokens"] else "",
        )
    return table
