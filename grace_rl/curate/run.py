"""From a curation recipe to rows that `train` reads:

    generate -> rate -> filter -> guide

Each step reads what the one before it wrote, chunk by chunk, and leaves out the chunks that are
there. `generate` and `rate` are work of `run.workers`: of this process, or of a Ray cluster's. They
can be shared out over processes too (`--shard i/n`); whoever finds all chunks rated filters them.

What differs from MultiCSR as released: several candidates a side and large batches in place of one
greedy candidate at a time; clean-up; ratings that need no parsing; and thresholds that can be moved
without rating again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console
from rich.table import Table

from grace_rl.curate.candidates import (
    Row,
    first_text,
    given_candidates,
    rate_candidates,
    write_candidates,
)
from grace_rl.curate.chunks import Chunks, rows_of, write_rows
from grace_rl.curate.cleaning import words
from grace_rl.curate.filtering import Choice, choose
from grace_rl.curate.judges import load_judge, own_judge
from grace_rl.curate.models import Models
from grace_rl.curate.prompts import SidePrompts
from grace_rl.curate.report import Report
from grace_rl.data.guide import build_guide, named_digest, text_key
from grace_rl.data.rows import stream_rows
from grace_rl.data.texts import InOrder
from grace_rl.errors import UserError
from grace_rl.recipe.curation import CurationRecipe, FilterStep, GenerateStep, GuideStep, RateStep
from grace_rl.run.files import held, remove_unfinished, write_json, write_text
from grace_rl.run.identity import rows_digest
from grace_rl.run.screen import Screen, bar
from grace_rl.run.workers import Cluster, Item, Work, run_all

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


def curate(
    recipe: CurationRecipe,
    shard: Shard = Shard(),  # noqa: B008  # frozen
    overwrite: bool = False,
    console: Console | None = None,
    cluster: Cluster | None = None,
) -> Report | None:
    """Run the steps of a recipe that are not done yet.

    Args:
        recipe: A loaded recipe.
        shard: Which chunks are this process's.
        overwrite: Throw away finished chunks whose settings or inputs have changed.
        console: Where progress and the report are printed.
        cluster: Whose workers generate and rate; None: this process does.

    Returns:
        What the filter reports; None without a filter, or while other shards are at work.

    Raises:
        UserError: The rows, a model or a setting is wrong.
    """
    if recipe.rate is not None and recipe.rate.is_own:
        own_judge(recipe.rate)  # a mistake in it is told before anything is generated
    curation = _Curation(recipe, shard, overwrite, console or Screen(), cluster)
    if recipe.generate is not None:
        curation.generate()
    if recipe.rate is not None:
        curation.rate()
    if recipe.filter is not None and (missing := curation.missing()):
        curation.console.print(
            f"{missing} of {curation.chunks} chunks are not rated yet: when the other shards "
            "are done, run the same command without --shard to filter"
        )
        return None
    report = None
    # Two shards may end together, and both find all chunks rated.
    with held(recipe.output_dir, wait=True):
        if recipe.filter is not None:
            report = curation.filter(recipe.filter)
        if recipe.guide is not None:
            curation.guide(recipe.guide)
    return report


class _Curation:
    """A recipe's folder and source, and one method for each step.

    Raises:
        UserError: The rows do not fit the steps, or the folder holds what other settings or other
            inputs gave.
    """

    def __init__(
        self,
        recipe: CurationRecipe,
        shard: Shard,
        overwrite: bool,
        console: Console,
        cluster: Cluster | None,
    ) -> None:
        self.recipe, self.shard, self.console, self.cluster = recipe, shard, console, cluster
        self.folder = recipe.output_dir
        self.models = Models()
        self.rows = 0
        content = rows_digest(self._counted(stream_rows(recipe.data)))
        self.chunks = -(-self.rows // recipe.chunk_rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        made = {"rows": content, "chunk_rows": recipe.chunk_rows}
        with held(self.folder, wait=True):  # another shard may be about to throw away, too
            if recipe.generate is not None:
                made |= {"seed": recipe.seed, **_settings(recipe.generate)}
                self.generated = Chunks(self.folder / "generated", made, overwrite)
            if recipe.rate is not None:
                made |= _settings(recipe.rate)
                self.rated = Chunks(self.folder / "rated", made, overwrite)

    def _counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, once they are known to suit the steps."""
        step = self.recipe.generate
        column = None if step is None else step.opposite_column
        for row in rows:
            if step is None and "text" in row:
                raise UserError(
                    f"{self.recipe.path}: the rows have text alone; add a generate step, or give "
                    "query, positive and negative"
                )
            if column is not None and not first_text(row.get(column)):
                raise UserError(
                    f"{self.recipe.path}: generate.opposite_column: row {self.rows} has no text "
                    f"in {column!r}"
                )
            self.rows += 1
            yield row

    def generate(self) -> None:
        """Candidates of both sides for every text."""
        todo = [n for n in self._mine() if not self.generated.has(n)]
        self._do("generate", todo, partial(_Generator, self.recipe, self.models, self.generated))

    def rate(self) -> None:
        """A rating for every candidate."""
        generated = None if self.recipe.generate is None else self.generated
        todo = [n for n in self._mine() if not self.rated.has(n)]
        if generated is not None:
            todo = [n for n in todo if generated.has(n)]
        self._do("rate", todo, partial(_Rater, self.recipe, self.models, self.rated, generated))

    def _do(self, name: str, todo: Sequence[int], make: Callable[[], Work]) -> None:
        """Have chunks made. To a cluster `models` goes as it is here: without any."""
        if todo:
            with bar(self.console, name, self._count(todo)) as advance:
                for made in run_all([{"chunk": n} for n in todo], make, self.cluster):
                    advance(made["rows"])

    def missing(self) -> int:
        """Chunks that nobody has rated yet."""
        return sum(not self.rated.has(number) for number in range(self.chunks))

    def filter(self, step: FilterStep) -> Report:
        """rows.jsonl from all rated chunks, and the report."""
        for name in (".", "generated", "rated"):  # all chunks are there: nobody writes any more
            remove_unfinished(self.folder / name)
        report = Report(step)
        write_rows(self.folder / ROWS_FILE, self._kept(step, report))
        write_json(self.folder / "report.json", report.as_dict())
        write_text(self.folder / "histogram.svg", report.picture())
        self._show(report)
        return report

    def _kept(self, step: FilterStep, report: Report) -> Iterator[Row]:
        """The rows that stay; the report takes note of all."""
        seen: set[int] = set()
        for row in (row for number in range(self.chunks) for row in self.rated.read(number)):
            choice = choose(row, step)
            key = self._same(row, choice)
            if choice.reason is None and key in seen:
                choice = replace(choice, reason="duplicate")
            report.add(row, choice)
            if choice.reason is None and choice.positive and choice.negative:
                seen.add(key)
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

    def _same(self, row: Row, choice: Choice) -> int:
        """A key of what makes a row a duplicate: its text, or all three of a given triplet."""
        texts = [row["query"]]
        if self.recipe.generate is None:
            texts += [side["text"] for side in (choice.positive, choice.negative) if side]
        return text_key("\n".join(" ".join(words(text)) or text for text in texts))

    def _show(self, report: Report) -> None:
        self.console.print(
            f"kept {report.kept} of {report.rows} rows ({report.kept_share:.1%}), "
            f"{report.swapped} with their sides swapped -> {self.folder / ROWS_FILE}"
        )
        for title, counts in (
            ("rows dropped", report.reasons),
            ("candidates dropped in clean-up", report.dropped_candidates),
        ):
            if counts:
                named = ", ".join(f"{name} {number}" for name, number in counts.most_common())
                self.console.print(f"{title}: {named}")
        truth = report.truth()
        if truth:
            table = Table("precision by the world's truth", "before", "after")
            for side in ("positives", "negatives"):
                shares = [truth.get(f"{side}/{when}") for when in ("before", "after")]
                table.add_row(side, *("-" if s is None else f"{s:.3f}" for s in shares))
            self.console.print(table)
        for warning in report.warnings():
            self.console.print(f"warning: {warning}", style="yellow")

    def guide(self, step: GuideStep) -> None:
        """Every text of the result, embedded; sigma, printed and stored."""
        filtered = self.recipe.filter is not None

        def rows() -> Iterable[Row]:
            return rows_of(self.folder / ROWS_FILE) if filtered else stream_rows(self.recipe.data)

        folder = self.folder / "guide"
        with bar(self.console, "guide", None, unit="texts") as advance:
            guide = build_guide(folder, rows, step.model_name_or_path, progress=advance)
        sigma = "none (no positives)" if guide.sigma is None else f"{guide.sigma:.4f}"
        self.console.print(f"guide: {len(guide)} texts, sigma {sigma} -> {folder}")

    def _mine(self) -> list[int]:
        return [number for number in range(self.chunks) if self.shard.holds(number)]

    def _count(self, chunks: Sequence[int]) -> int:
        """Rows of some chunks; the last one may be short."""
        whole = len(chunks) * self.recipe.chunk_rows
        short = self.chunks * self.recipe.chunk_rows - self.rows
        return whole - short if self.chunks - 1 in chunks else whole


def _settings(step: GenerateStep | RateStep) -> Row:
    """What a step's rows depend on: its settings, its model's files, its own judge's code."""
    settings: Row = step.model_dump(mode="json")
    judge = step.judge if isinstance(step, RateStep) else None
    for key, name in (("model_content", step.model_name_or_path), ("judge_content", judge)):
        if digest := named_digest(name or ""):
            settings[key] = digest
    return {f"{step.recipe_key}.{key}": value for key, value in settings.items()}


class _Generator:
    """What a worker does: a chunk of the source -> its candidates, on the disk."""

    def __init__(self, recipe: CurationRecipe, models: Models, made: Chunks) -> None:
        if (step := recipe.generate) is None:
            raise RuntimeError("recipe.generate must be there")
        self.recipe, self.step, self.made = recipe, step, made
        self.source = _source(recipe)
        self.model = models.load(step.model_name_or_path, step.engine, step.dtype, step.batch_size)
        self.prompts = SidePrompts(
            self.model.tokenizer, step.prompts, step.max_text_tokens, step.chat_template_kwargs
        )

    def __call__(self, item: Item) -> Item:
        number, size = item["chunk"], self.recipe.chunk_rows
        rows = self.source.read(number * size, size)
        if not self.made.has(number):  # a worker that died may have made it
            written = write_candidates(rows, self.model, self.prompts, self.step, self.recipe.seed)
            self.made.write(number, written)
        return {"rows": len(rows)}


class _Rater:
    """What a worker does: a chunk of candidates, or of given triplets -> its ratings, on the disk.

    Args:
        generated: Where the candidates are; None: the source has triplets.
    """

    def __init__(
        self, recipe: CurationRecipe, models: Models, made: Chunks, generated: Chunks | None
    ) -> None:
        if (step := recipe.rate) is None:
            raise RuntimeError("recipe.rate must be there")
        self.recipe, self.step, self.made, self.generated = recipe, step, made, generated
        self.source = _source(recipe)
        generate = recipe.generate
        generator = None if generate is None else generate.model_name_or_path
        self.judge = load_judge(step, generator, models)

    def __call__(self, item: Item) -> Item:
        number, size = item["chunk"], self.recipe.chunk_rows
        if self.generated is not None:
            rows = self.generated.read(number)
        else:
            rows = [*map(given_candidates, self.source.read(number * size, size))]
        if not self.made.has(number):
            self.made.write(number, rate_candidates(rows, self.judge, self.step.judge))
        return {"rows": len(rows)}


def _source(recipe: CurationRecipe) -> InOrder:
    """The rows, each with an id."""
    return InOrder(partial(_with_ids, recipe))


def _with_ids(recipe: CurationRecipe) -> Iterator[Row]:
    for number, row in enumerate(stream_rows(recipe.data)):
        yield row | {"id": row.get("id", number)}
