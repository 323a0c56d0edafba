"""From a curation recipe to rows that `train` reads:

    generate -> rate -> filter -> guide

Each step reads what the one before it wrote, chunk by chunk, and leaves out the chunks that are
there. `generate` and `rate` can be shared out over processes (`--shard i/n`); whoever finds all
chunks rated filters them.

What differs from MultiCSR as released: several candidates a side and large batches in place of one
greedy candidate at a time; clean-up; ratings that need no parsing; and thresholds that can be moved
without rating again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from grace_rl.curate.chunks import Chunks, rows_of, write_rows
from grace_rl.curate.cleaning import reason_to_drop, stripped, words
from grace_rl.curate.filtering import Choice, choose
from grace_rl.curate.judges import Judge, checked, load_judge
from grace_rl.curate.models import LanguageModel, Models, Sampling
from grace_rl.curate.prompts import SIDES, SidePrompts
from grace_rl.curate.report import Report
from grace_rl.data.guide import build_guide, text_key
from grace_rl.data.rows import stream_rows
from grace_rl.errors import UserError
from grace_rl.recipe.curation import CurationRecipe, GenerateStep
from grace_rl.run.files import held, write_text

Row = dict[str, Any]
ROWS_FILE = "rows.jsonl"


@dataclass(frozen=True)
class Shard:
    """This process's share of the chunks: every n-th, from number i (counted from 1) on.

    >>> [number for number in range(5) if Shard(2, 2).holds(number)]
    [1, 3]
    """

    number: int = 1
    of: int = 1

    def holds(self, chunk: int) -> bool:
        return chunk % self.of == self.number - 1


class Speed(ProgressColumn):
    """Rows per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} rows/s" if task.speed else "")


def curate(
    recipe: CurationRecipe,
    shard: Shard = Shard(),  # noqa: B008  # frozen
    overwrite: bool = False,
    console: Console | None = None,
) -> Report | None:
    """Run the steps of a recipe that are not done yet.

    Args:
        recipe: A loaded recipe.
        shard: Which chunks are this process's.
        overwrite: Throw away finished chunks whose settings have changed.
        console: Where progress and the report are printed.

    Returns:
        What the filter reports; None without a filter, or while other shards are at work.

    Raises:
        UserError: The rows, a model or a setting is wrong.
    """
    curation = _Curation(recipe, shard, overwrite, console or Console())
    if recipe.generate is not None:
        curation.generate()
    if recipe.rate is not None:
        curation.rate()
    report = None
    if recipe.filter is not None and (missing := curation.missing()):
        curation.say(
            f"{missing} of {curation.chunks} chunks are not rated yet: when the other shards "
            "are done, run the same command without --shard to filter"
        )
        return None
    # Two shards may end together, and both find all chunks rated.
    with held(recipe.output_dir, wait=True):
        if recipe.filter is not None:
            report = curation.filter()
        if recipe.guide is not None:
            curation.guide()
    return report


class _Curation:
    def __init__(
        self, recipe: CurationRecipe, shard: Shard, overwrite: bool, console: Console
    ) -> None:
        self.recipe, self.shard, self.console = recipe, shard, console
        self.folder = recipe.output_dir
        self.models = Models()
        self.rows, kinds = 0, set()
        for row in stream_rows(recipe.data):
            self.rows += 1
            kinds.add("text" if "text" in row else "query")
        self.chunks = -(-self.rows // recipe.chunk_rows)
        self._check_rows(kinds)
        self.folder.mkdir(parents=True, exist_ok=True)
        made: dict[str, Any] = {
            "dataset": json.loads(json.dumps(vars(recipe.data))),
            "rows": self.rows,
            "chunk_rows": recipe.chunk_rows,
        }
        with held(self.folder, wait=True):  # another shard may be about to throw away, too
            if recipe.generate is not None:
                made |= {"seed": recipe.seed, "generate": recipe.generate.model_dump(mode="json")}
                self.generated = Chunks(self.folder / "generated", made, overwrite)
            if recipe.rate is not None:
                made |= {"rate": recipe.rate.model_dump(mode="json")}
                self.rated = Chunks(self.folder / "rated", made, overwrite)

    def _check_rows(self, kinds: set[str]) -> None:
        generate = self.recipe.generate
        if generate is None and kinds == {"text"}:
            raise UserError(
                f"{self.recipe.path}: the rows have text alone; add a generate step, or give "
                "query, positive and negative"
            )
        column = generate.opposite_column if generate is not None else None
        if column is not None:
            for number, row in enumerate(stream_rows(self.recipe.data)):
                if not _first_text(row.get(column)):
                    raise UserError(
                        f"{self.recipe.path}: generate.opposite_column: row {number} has no text "
                        f"in {column!r}"
                    )

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(escape(text), style=style, highlight=False, soft_wrap=True)

    # -- generate ---------------------------------

    def generate(self) -> None:
        """Candidates of both sides for every text."""
        step = self.recipe.generate
        assert step is not None
        todo = [n for n in self._mine() if not self.generated.has(n)]
        if not todo:
            return
        model = self.models.load(step.model_name_or_path, step.engine, step.dtype, step.batch_size)
        prompts = SidePrompts(
            model.tokenizer, step.prompts, step.max_text_tokens, step.chat_template_kwargs
        )
        with self._progress("generate", todo) as advance:
            for number, rows in self._source(todo):
                self.generated.write(
                    number, write_candidates(rows, model, prompts, step, self.recipe.seed)
                )
                advance(len(rows))

    # -- rate ---------------------------------

    def rate(self) -> None:
        """A rating for every candidate."""
        step, generate = self.recipe.rate, self.recipe.generate
        assert step is not None
        todo = [n for n in self._mine() if not self.rated.has(n)]
        if generate is not None:
            todo = [n for n in todo if self.generated.has(n)]
        if not todo:
            return
        generator = None if generate is None else generate.model_name_or_path
        judge = load_judge(step, generator, self.models)
        if generate is None:
            chunks = ((n, [_given(row) for row in rows]) for n, rows in self._source(todo))
        else:
            chunks = ((n, self.generated.read(n)) for n in todo)
        with self._progress("rate", todo) as advance:
            for number, rows in chunks:
                self.rated.write(number, rate_candidates(rows, judge, step.judge))
                advance(len(rows))

    def missing(self) -> int:
        """Chunks that nobody has rated yet."""
        return sum(not self.rated.has(number) for number in range(self.chunks))

    # -- filter ---------------------------------

    def filter(self) -> Report:
        """rows.jsonl from all rated chunks, and the report."""
        step = self.recipe.filter
        assert step is not None
        report = Report(step.model_dump())
        seen: set[int] = set()

        def kept() -> Iterator[Row]:
            for number in range(self.chunks):
                for row in self.rated.read(number):
                    choice = choose(row, step)
                    key = self._same(row, choice)
                    if choice.reason is None and key in seen:
                        choice = type(choice)(
                            choice.positive, choice.negative, choice.swapped, "duplicate"
                        )
                    report.add(row, choice)
                    if choice.reason is not None:
                        continue
                    seen.add(key)
                    assert choice.positive is not None and choice.negative is not None
                    yield {
                        "id": row["id"],
                        "query": row["query"],
                        "positive": choice.positive["text"],
                        "negative": choice.negative["text"],
                        "score_positive": round(choice.positive["score"], 4),
                        "score_negative": round(choice.negative["score"], 4),
                        "swapped": choice.swapped,
                        **row["columns"],
                    }

        write_rows(self.folder / ROWS_FILE, kept())
        write_text(
            self.folder / "report.json",
            json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n",
        )
        write_text(self.folder / "histogram.svg", report.picture())
        self._show(report)
        return report

    def _same(self, row: Row, choice: Choice) -> int:
        """A key of what makes a row a duplicate: its text, or all three of a given triplet."""
        texts = [row["query"]]
        if self.recipe.generate is None:
            texts += [side["text"] for side in (choice.positive, choice.negative) if side]
        return text_key("\n".join(" ".join(words(text)) or text for text in texts))

    def _show(self, report: Report) -> None:
        self.say(
            f"kept {report.kept} of {report.rows} rows ({report.kept_share:.1%}), "
            f"{report.swapped} with their sides swapped -> {self.folder / ROWS_FILE}"
        )
        for title, counts in (
            ("rows dropped", report.reasons),
            ("candidates dropped in clean-up", report.dropped_candidates),
        ):
            if counts:
                named = ", ".join(f"{name} {number}" for name, number in counts.most_common())
                self.say(f"{title}: {named}")
        truth = report.truth()
        if truth:
            table = Table("precision by the world's truth", "before", "after")
            for side in ("positives", "negatives"):
                shares = [truth.get(f"{side}/{when}") for when in ("before", "after")]
                table.add_row(side, *("-" if s is None else f"{s:.3f}" for s in shares))
            self.console.print(table)
        for warning in report.warnings():
            self.say(f"warning: {warning}", style="yellow")

    # -- guide ---------------------------------

    def guide(self) -> None:
        """Every text of the result, embedded; sigma, printed and stored."""
        step = self.recipe.guide
        assert step is not None
        filtered = self.recipe.filter is not None

        def rows() -> Iterable[Row]:
            return rows_of(self.folder / ROWS_FILE) if filtered else stream_rows(self.recipe.data)

        folder = self.folder / "guide"
        with self._progress("guide", None) as advance:
            guide = build_guide(folder, rows, step.model_name_or_path, progress=advance)
        sigma = "none (no positives)" if guide.sigma is None else f"{guide.sigma:.4f}"
        self.say(f"guide: {len(guide)} texts, sigma {sigma} -> {folder}")

    # -- what the steps share ---------------------------------

    def _mine(self) -> list[int]:
        return [number for number in range(self.chunks) if self.shard.holds(number)]

    def _source(self, wanted: Sequence[int]) -> Iterator[tuple[int, list[Row]]]:
        """The wanted chunks of the source, which is read once and never held."""
        rows, chosen = enumerate(stream_rows(self.recipe.data)), set(wanted)
        for number in range(self.chunks):
            chunk = [
                row | {"id": row.get("id", i)} for i, row in islice(rows, self.recipe.chunk_rows)
            ]
            if number in chosen:
                yield number, chunk

    def _progress(self, name: str, todo: Sequence[int] | None) -> Any:
        total = None
        if todo is not None:
            last = self.chunks - 1
            total = sum(
                self.rows - last * self.recipe.chunk_rows if n == last else self.recipe.chunk_rows
                for n in todo
            )
        return _Bar(self.console, name, total)


class _Bar:
    """A progress bar; entering gives the function that moves it."""

    def __init__(self, console: Console, name: str, total: int | None) -> None:
        self._progress = Progress(
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            Speed(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda count: self._progress.advance(self._task, count)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def write_candidates(
    rows: Sequence[Row],
    model: LanguageModel,
    prompts: SidePrompts,
    step: GenerateStep,
    seed: int = 0,
) -> list[Row]:
    """Cleaned candidates of both sides for some rows, all prompts in one call.

    Args:
        rows: With `id` and `text` (or `query`).
        model: The language model.
        prompts: What it is asked.
        step: How.
        seed: Of the samples.

    Returns:
        `{id, query, positives, negatives, dropped, columns}`; a candidate is `{text, prompt}` with
        the number of its instruction, and `dropped` counts the reasons of those that are gone.
    """
    sampling = Sampling(
        samples=step.candidates,
        greedy=step.greedy,
        temperature=step.temperature,
        top_p=step.top_p,
        max_tokens=step.max_tokens,
        one_sentence=step.prompts == "completion",
        omega=step.omega,
        seed=seed,
    )
    texts = [row.get("text") or row["query"] for row in rows]
    numbers = [prompts.number(text) for text in texts]
    asked: dict[str, list[list[int]]] = {}
    for side in SIDES:
        shown = texts
        if side == "negative" and step.opposite_column is not None:
            shown = [_first_text(row[step.opposite_column]) for row in rows]
        asked[side] = [prompts.tokens(t, side, n) for t, n in zip(shown, numbers, strict=True)]
    both = asked["positive"] + asked["negative"]
    opposites = asked["negative"] + asked["positive"] if step.omega else None
    written = model.write(both, sampling, opposites)

    made = []
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        dropped: dict[str, int] = {}
        sides: dict[str, list[Row]] = {}
        for side, candidates in zip(SIDES, (written[i], written[len(rows) + i]), strict=True):
            kept: list[str] = []
            for candidate in candidates:
                cleaned = stripped(candidate.text)
                reason = "cut off" if not candidate.ended else None
                reason = reason or reason_to_drop(
                    cleaned,
                    text,
                    side,
                    kept,
                    step.length_ratio,
                    step.max_overlap,
                )
                if reason is None:
                    kept.append(cleaned)
                else:
                    dropped[reason] = dropped.get(reason, 0) + 1
            sides[side] = [{"text": t, "prompt": numbers[i]} for t in kept]
        made.append(
            {
                "id": row["id"],
                "query": text,
                "positives": sides["positive"],
                "negatives": sides["negative"],
                "dropped": dropped,
                "columns": _columns(row),
            }
        )
    return made


def rate_candidates(rows: Sequence[Row], judge: Judge, name: str) -> list[Row]:
    """The rows with `score` and `greedy` in every candidate, all pairs in one call.

    Args:
        rows: `{query, positives, negatives, ...}`.
        judge: See `grace_rl.curate.judges`.
        name: Of the judge, for messages.

    Raises:
        UserError: The judge's ratings are not ratings.
    """
    candidates = [
        (row["query"], candidate)
        for row in rows
        for side in ("positives", "negatives")
        for candidate in row[side]
    ]
    pairs = [(query, candidate["text"]) for query, candidate in candidates]
    ratings = iter(checked(judge(pairs) if pairs else [], len(pairs), name))
    rated = []
    for row in rows:
        sides = {
            side: [candidate | next(ratings)._asdict() for candidate in row[side]]
            for side in ("positives", "negatives")
        }
        rated.append(row | sides)
    return rated


def _given(row: Row) -> Row:
    """A triplet as if it had been generated."""
    return {
        "id": row["id"],
        "query": row["query"],
        "positives": [{"text": row["positive"]}],
        "negatives": [{"text": text} for text in row["negative"]],
        "dropped": {},
        "columns": _columns(row),
    }


def _columns(row: Row) -> Row:
    """The row's own other fields."""
    taken = ("id", "text", "query", "positive", "negative", "negative_positive")
    return {name: value for name, value in row.items() if name not in taken}


def _first_text(value: Any) -> str:
    found = value[0] if isinstance(value, list) and value else value
    return found if isinstance(found, str) else ""
