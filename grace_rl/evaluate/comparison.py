"""What `grace-rl compare` compares: a YAML file -> checked rows, and the cells they come to.

    output_dir: runs/compare-scenes
    seeds: [0, 1, 2]
    labels: [32, 512]              # dataset_rows of every recipe
    budget_seconds: 600            # of training, for every run; or budget_tokens
    jobs: 2                        # processes at once
    score: {dataset_splits: [test, transfer], rows: 200}     # scenes; or {tasks: tasks.yaml}
    rows:
      - {name: no rationale, recipe: recipes/quickstart.yaml, train: false, rationale: none}
      - {name: untrained rationale, recipe: recipes/quickstart.yaml, train: false}
      - name: InfoNCE
        recipe: recipes/scenes/infonce.yaml
        grid: [{learning_rate: 1e-3}, {learning_rate: 3e-3}]    # the best on validation rows
      - {name: GRPO, recipe: recipes/quickstart.yaml}
      - {name: MiniLM, model: path/to/a/sentence-transformers/model}

A row of `method: infonce` must be there: without it nobody knows what rationales are worth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from grace_rl.errors import UserError, missing
from grace_rl.evaluate.tasks import load_tasks, tasks_digest
from grace_rl.recipe import Recipe, load_recipe
from grace_rl.recipe.schema import FilePath, Items, Section, validated
from grace_rl.recipe.source import RecipeSource, read_source
from grace_rl.run.identity import digest, input_digests, path_digest

NO_BASELINE = (
    "no row is plain InfoNCE, and without it nobody knows what rationales are worth; add a row "
    "with a recipe of method: infonce, such as recipes/scenes/infonce.yaml"
)


class ComparedRow(Section):
    """One row of the table.

    Args:
        name: As shown.
        recipe: Path of its recipe, for all but finished models.
        model: A sentence-transformers model that is only scored.
        set: Keys of the recipe and the values to set.
        grid: Further changes to choose among, on validation rows with the first seed.
        choose: The metric of metrics.jsonl that chooses, higher is better; ties go to the lower
            `eval_loss`.
        train: Whether the recipe's policy is trained, or scored as it is.
        labels: Whether the number of labelled rows is set; False leaves the recipe's own rows.
        rationale: `none` has the text read in the rationale's place.
    """

    name: str
    recipe: str | None = None
    model: FilePath | None = None
    set: dict[str, Any] = {}
    grid: Items[dict[str, Any]] = ()
    choose: Literal["eval_recall_at_1", "eval_triplet_accuracy"] = "eval_recall_at_1"
    train: bool = True
    labels: bool = True
    rationale: Literal["greedy", "none"] = "greedy"

    @model_validator(mode="after")
    def _rules(self) -> Self:
        problems = []
        if not folder_name(self.name):
            problems.append("name: has no letter that a folder could be called by")
        if (self.recipe is None) == (self.model is None):
            problems.append("give a recipe, or a finished model to score; one of the two")
        elif self.model is not None:
            told = self.model_fields_set & {"set", "grid", "choose", "train", "labels"}
            if told:
                keys = ", ".join(sorted(told))
                problems.append(f"model: a finished model is only scored; leave out {keys}")
            if not self.model.is_dir():
                problems.append(f"model: {missing(f'folder {self.model}')}")
        if problems:
            raise UserError(problems)
        return self

    def changes(self, choice: int | None, labels: int | None) -> dict[str, Any]:
        """Keys of the recipe and their values: of one setting of the grid, with so many rows."""
        changes = self.set if choice is None else self.set | self.grid[choice]
        return changes if labels is None else changes | {"dataset_rows": labels}

    def choices(self) -> Sequence[int | None]:
        """The numbers of the grid's settings; None where there is no grid."""
        return range(len(self.grid)) if self.grid else [None]


class Score(Section):
    """What every row is scored on: splits of scenes, or tasks.

    Args:
        dataset_splits: Of scenes.
        rows: Of each split, at least 2.
        tasks: A task file (docs/evaluation.md).
    """

    dataset_splits: Items[Literal["train", "validation", "test", "transfer"]] = ()
    rows: int = Field(200, ge=2)
    tasks: FilePath | None = None

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if bool(self.dataset_splits) == (self.tasks is not None):
            raise UserError("give {dataset_splits: [test, transfer], rows: 200} or {tasks: FILE}")
        return self


class ComparisonFile(Section):
    """What the file says beside its rows; see the module's text.

    Args:
        output_dir: None is `runs/<name of the file>`.
        seeds: Of every training.
        labels: Numbers of labelled rows.
        budget_seconds, budget_tokens: That every training may take; one of the two at least.
        jobs: Processes at once.
        score: See `Score`.
        held_out: A file of texts whose perplexity is measured.
    """

    output_dir: FilePath | None = None
    seeds: Items[Annotated[int, Field(ge=0)]] = Field((0, 1, 2), min_length=1)
    labels: Items[Annotated[int, Field(ge=1)]] = ()
    budget_seconds: float | None = Field(None, gt=0)
    budget_tokens: int | None = Field(None, ge=1)
    jobs: int = Field(1, ge=1)
    score: Score
    held_out: FilePath | None = None

    @model_validator(mode="after")
    def _rules(self) -> Self:
        problems = [
            f"{key}: a number is there twice: {list(values)}"
            for key, values in (("seeds", self.seeds), ("labels", self.labels))
            if len(frozenset(values)) < len(values)
        ]
        if not self.budget():
            problems.append(
                "budget_seconds: is missing; give the seconds (or budget_tokens) that every "
                "training may take"
            )
        if self.held_out is not None and not self.held_out.is_file():
            problems.append(f"held_out: {missing(f'file {self.held_out}')}")
        if problems:
            raise UserError(problems)
        return self

    def budget(self) -> dict[str, float]:
        """Keywords of `grace_rl.train.stop.Budget`."""
        limits = {"seconds": self.budget_seconds, "tokens": self.budget_tokens}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Comparison:
    """A checked comparison.

    Attributes:
        file: What the file says.
        rows: Its rows.
        output_dir: Where everything goes.
        contents: Name of a row -> for each setting of its grid (or once) a digest of what its
            recipe says and of the files that it names, or of the model's files.
        score_content: A digest of the files that rows are scored on.
    """

    file: ComparisonFile
    rows: Sequence[ComparedRow]
    output_dir: Path
    contents: Mapping[str, Sequence[str]]
    score_content: str


@dataclass(frozen=True)
class Cell:
    """One run and its scores.

    Attributes:
        row: Name of its row.
        labels: Number of labelled rows; None where none are set.
        seed: Of the run; None for what is not trained.
        choice: Number of the grid's setting; None where there is no grid.
        spec: All that the work depends on, as JSON has it.
    """

    row: str
    labels: int | None
    seed: int | None
    choice: int | None
    spec: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its folder's name."""
        words = [folder_name(self.row)]
        for word, value in (("labels", self.labels), ("choice", self.choice), ("seed", self.seed)):
            words += [] if value is None else [f"{word}{value}"]
        return "_".join(words)


def folder_name(row: str) -> str:
    """A row's name in lower case, without what folders may not like.

    >>> folder_name("GRACE, as published (2,000)"), folder_name("Ours: größer")
    ('grace-as-published-2-000', 'ours-größer')
    """
    return re.sub(r"[\W_]+", "-", row.lower()).strip("-")


def load_comparison(path: str | Path) -> Comparison:
    """Read and check a comparison's file, its recipes too.

    Raises:
        UserError: With every mistake: where, the key, what to do.
    """
    source = read_source(path)
    entries = source.tree.pop("rows", None)
    file = validated(ComparisonFile, source.tree, source)
    score_content = ""
    if file is not None and file.score.tasks is not None:
        score_content = tasks_digest(_collected(source, load_tasks, file.score.tasks) or [])
    if not isinstance(entries, list) or not entries:
        source.problems.append(source.problem(("rows",), "give a list of rows"))
        entries = []
    labels = () if file is None else file.labels
    rows: list[ComparedRow] = []
    contents: dict[str, list[str]] = {}
    baseline = not entries
    for i, entry in enumerate(entries):
        row = validated(ComparedRow, entry, source, ("rows", i))
        if row is None:
            continue
        for other in rows:
            if folder_name(other.name) == folder_name(row.name):
                message = f"there are two rows {row.name!r}; give each a name of its own"
                if other.name != row.name:
                    message = f"{row.name!r} and {other.name!r} would share a folder; change one"
                source.problems.append(source.problem(("rows", i, "name"), message))
        rows.append(row)
        if row.model is not None:
            contents[row.name] = [path_digest(row.model)]
            continue
        counts = labels if row.train and row.labels else ()
        recipes = [_recipes(source, row, choice, counts) for choice in row.choices()]
        # Where one cannot be read, nobody knows what the row will be.
        broken = any(None in some for some in recipes)
        baseline |= broken or (row.train and recipes[0][0].method == "infonce")
        if not broken:
            problems = _row_problems(row, [one for some in recipes for one in some])
            source.problems += [source.problem(("rows", i, key), m) for key, m in problems]
            contents[row.name] = [_content(some[0], bool(counts)) for some in recipes]
    if not baseline and len(rows) == len(entries):
        source.problems.append(source.problem(("rows",), NO_BASELINE))
    file = source.settled(file)
    output_dir = file.output_dir or Path("runs") / Path(path).stem
    if file.held_out is not None:
        score_content += path_digest(file.held_out)
    return Comparison(file, rows, output_dir, contents, score_content)


def _recipes(
    source: RecipeSource, row: ComparedRow, choice: int | None, labels: Sequence[int]
) -> list[Any]:
    """The row's recipe with one setting of its grid, for every number of labels; None if broken."""
    changes = [row.changes(choice, count) for count in labels] or [row.changes(choice, None)]
    return [_collected(source, load_recipe, row.recipe, overriding(one)) for one in changes]


def _row_problems(row: ComparedRow, recipes: Sequence[Recipe]) -> list[tuple[str, str]]:
    """What would fail, or silently do something else, after hours: (key, message)."""
    problems = []
    if not row.train and "reader" not in recipes[0].training:
        problems.append(("train", f"method {recipes[0].method} has no policy to score untrained"))
    if row.grid and any(one.training.get("validation") is None for one in recipes):
        message = "is chosen on validation rows; the recipe needs validation: {...}"
        problems.append(("grid", message))
    return problems


def _content(recipe: Recipe, labelled: bool) -> str:
    """What a recipe says, and what lies in the files that it names.

    Where the number of labels is set, it is a cell's own and no part of this.
    """
    resolved = recipe.resolved()
    if labelled:
        resolved.pop("dataset_rows", None)
    inputs = input_digests(resolved, lambda key: key == "output_dir")
    return digest([resolved, inputs])


def _collected(source: RecipeSource, load: Any, *arguments: Any) -> Any:
    try:
        return load(*arguments)
    except UserError as error:
        new = [problem for problem in error.problems if problem not in source.problems]
        source.problems += new
        return None


def overriding(changes: Mapping[str, Any]) -> list[str]:
    """Keys and values as a recipe's overrides.

    >>> overriding({"learning_rate": 0.001, "validation.rows": 50})
    ['--learning_rate=0.001', '--validation.rows=50']
    """
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in changes.items()
    ]


def cells_of(comparison: Comparison, row: ComparedRow, chosen: Mapping[int, int]) -> list[Cell]:
    """The cells of a row that can be run now.

    Args:
        comparison: The comparison.
        row: One of its rows.
        chosen: Number of labels (0 for none) -> the setting of the row's grid that was chosen.
            Without an answer yet, the cells are those that find it: every setting, first seed.
    """
    if row.recipe is None or not row.train:
        return [_cell(comparison, row, None, None, None)]
    first, *others = comparison.file.seeds
    cells = []
    for labels in (comparison.file.labels if row.labels else ()) or [None]:
        cells += [_cell(comparison, row, labels, first, choice) for choice in row.choices()]
        decided = chosen.get(labels or 0) if row.grid else None
        if decided is not None or not row.grid:
            cells += [_cell(comparison, row, labels, seed, decided) for seed in others]
    return cells


def _cell(
    comparison: Comparison,
    row: ComparedRow,
    labels: int | None,
    seed: int | None,
    choice: int | None,
) -> Cell:
    file = comparison.file
    spec = {
        "recipe": row.recipe,
        "model": row.model and str(row.model),
        "content": [comparison.contents[row.name][choice or 0], comparison.score_content],
        "changes": row.changes(choice, labels) | ({} if seed is None else {"seed": seed}),
        "train": row.train,
        "rationale": row.rationale,
        "score": file.score.given(),
        "budget": file.budget(),
        "held_out": file.held_out and str(file.held_out),
    }
    return Cell(row.name, labels, seed, choice, spec)
