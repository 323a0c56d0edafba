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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace_rl.embed.cache import ENCODER_FILES, model_fingerprint
from grace_rl.errors import UserError
from grace_rl.recipe import Recipe, load_recipe
from grace_rl.recipe.keys import nearest
from grace_rl.recipe.source import RecipeSource, read_source
from grace_rl.run.identity import digest

CHOOSE = ("eval_recall_at_1", "eval_triplet_accuracy")
BUDGETS = {"budget_seconds": "seconds", "budget_tokens": "tokens"}
KEYS = ("output_dir", "seeds", "labels", *BUDGETS, "jobs", "score", "held_out", "rows")
ROW_KEYS = ("name", "recipe", "model", "set", "grid", "choose", "train", "labels", "rationale")
OF_RECIPES = ("set", "grid", "choose", "train", "labels")


@dataclass(frozen=True)
class ComparedRow:
    """One row of the table.

    Attributes:
        name: As shown.
        recipe: Path of its recipe; None for a finished model.
        model: A sentence-transformers model that is only scored.
        changes: Keys of the recipe and the values to set.
        grid: Further changes to choose among, on validation rows with the first seed.
        choose: The metric of metrics.jsonl that chooses, higher is better; ties go to the lower
            `eval_loss`.
        train: Whether the recipe's policy is trained, or scored as it is.
        labels: Whether the number of labelled rows is set; False leaves the recipe's own rows.
        rationale: `greedy` or `none`.
        content: A digest of what the recipe says, or of the model's files.
    """

    name: str
    recipe: str | None = None
    model: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    grid: Sequence[Mapping[str, Any]] = ()
    choose: str = "eval_recall_at_1"
    train: bool = True
    labels: bool = True
    rationale: str = "greedy"
    content: str = ""


@dataclass(frozen=True)
class Comparison:
    """A checked comparison; see the module's text for the keys of the file.

    `budget` are keywords of `grace_rl.train.callbacks.Budget`; `score_content` is a digest of the
    tasks' files.
    """

    output_dir: Path
    rows: list[ComparedRow]
    seeds: list[int]
    labels: list[int]
    budget: Mapping[str, float]
    jobs: int
    score: Mapping[str, Any]
    held_out: str | None
    score_content: str = ""


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
        words = [_folder_name(self.row)]
        for word, value in (("labels", self.labels), ("choice", self.choice), ("seed", self.seed)):
            words += [] if value is None else [f"{word}{value}"]
        return "_".join(words)


def _folder_name(row: str) -> str:
    """A row's name in lower case, without what folders may not like.

    >>> _folder_name("GRACE, as published (2,000)"), _folder_name("Ours: größer")
    ('grace-as-published-2-000', 'ours-größer')
    """
    return re.sub(r"[\W_]+", "-", row.lower()).strip("-")


def load_comparison(path: str | Path) -> Comparison:
    """Read and check a comparison's file, its recipes too.

    Raises:
        UserError: With every mistake: where, the key, what to do.
    """
    source = read_source(path)
    tree, problems = source.tree, source.problems

    def problem(key: str, message: str) -> None:
        problems.append(source.problem((key,), message))

    for key in tree:
        if key not in KEYS:
            problem(key, f"unknown key{nearest(key, KEYS)}; there are {', '.join(KEYS)}")
    seeds, labels = tree.get("seeds", [0, 1, 2]), tree.get("labels", [])
    for key, values, least in (("seeds", seeds, 0), ("labels", labels, 1)):
        if not _wholes(values, least):
            problem(key, f"must be a list of whole numbers from {least} on, not {values!r}")
        elif len(set(values)) < len(values):
            problem(key, f"a number is there twice: {values}")
    if not seeds:
        problem("seeds", "give at least one, better three")
    jobs = tree.get("jobs", 1)
    if not _whole(jobs, 1):
        problem("jobs", f"must be a whole number from 1 on, not {jobs!r}")
    budget = {word: tree[key] for key, word in BUDGETS.items() if key in tree}
    for word, value in budget.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            problem(f"budget_{word}", f"must be a number above 0, not {value!r}")
    if not budget:
        message = "is missing; give the seconds (or budget_tokens) that every training may take"
        problem("budget_seconds", message)
    output, held_out = tree.get("output_dir", f"runs/{Path(path).stem}"), tree.get("held_out")
    if not isinstance(output, str):
        problem("output_dir", f"must be a folder, not {output!r}")
    if held_out is not None and not (isinstance(held_out, str) and Path(held_out).is_file()):
        problem("held_out", f"there is no file {held_out}; paths start at {Path.cwd()}")
    score, score_content = tree.get("score"), ""
    if not isinstance(score, dict) or not (_of_tasks(score) or _of_scenes(score)):
        problem("score", "give {dataset_splits: [test, transfer], rows: 200} or {tasks: FILE}")
    elif "tasks" in score:
        from grace_rl.evaluate.tasks import load_tasks, tasks_digest

        tasks = _collected(problems, load_tasks, score["tasks"]) or []
        score_content = tasks_digest(tasks)
    rows = _rows(source, tree.get("rows"), labels if _wholes(labels, 1) else [])
    if problems:
        raise UserError(problems)
    assert score is not None  # or it was a problem
    return Comparison(
        Path(output), rows, seeds, labels, budget, jobs, score, held_out, score_content
    )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _wholes(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(_whole(value, least) for value in values)


def _of_tasks(score: Mapping[str, Any]) -> bool:
    return set(score) == {"tasks"} and isinstance(score["tasks"], str)


def _of_scenes(score: Mapping[str, Any]) -> bool:
    from grace_rl.recipe.rows import SCENES_SPLITS

    splits = score.get("dataset_splits")
    return (
        set(score) <= {"dataset_splits", "rows"}
        and isinstance(splits, list)
        and bool(splits)
        and all(split in SCENES_SPLITS for split in splits)
        and _whole(score.get("rows", 200), 2)
    )


def _rows(source: RecipeSource, entries: Any, labels: Sequence[int]) -> list[ComparedRow]:
    """The checked rows; what is wrong goes to `source.problems`."""
    found: list[ComparedRow] = []
    baseline = False
    if not isinstance(entries, list) or not entries:
        source.problems.append(source.problem(("rows",), "give a list of rows"))
        return found
    for i, entry in enumerate(entries):

        def problem(message: str, *key: str, i: int = i) -> None:
            source.problems.append(source.problem(("rows", i, *key), message))

        if not isinstance(entry, dict):
            problem("must be a mapping with name and recipe")
            continue
        for key in entry:
            if key not in ROW_KEYS:
                message = f"unknown key{nearest(key, ROW_KEYS)}; there are {', '.join(ROW_KEYS)}"
                problem(message, key)
        name = entry.get("name")
        if not isinstance(name, str) or not _folder_name(name):
            problem("has no name")
        elif name in [row.name for row in found]:
            problem(f"there are two rows {name!r}; give each a name of its own")
        elif other := [r.name for r in found if _folder_name(r.name) == _folder_name(name)]:
            problem(f"{name!r} and {other[0]!r} would share a folder; change a letter", "name")
        if ("recipe" in entry) == ("model" in entry):
            problem("give a recipe, or a finished model to score; one of the two")
            continue
        what = "recipe" if "recipe" in entry else "model"
        if not isinstance(entry[what], str):
            problem(f"must be a path, not {entry[what]!r}", what)
            continue
        if entry.get("rationale", "greedy") not in ("greedy", "none"):
            problem("must be greedy or none", "rationale")
        for key in ("train", "labels"):
            if not isinstance(entry.get(key, True), bool):
                problem(f"must be true or false, not {entry[key]!r}", key)
        if entry.get("choose", CHOOSE[0]) not in CHOOSE:
            problem(f"must be one of {', '.join(CHOOSE)}", "choose")
        grid = entry.get("grid", [])
        if not isinstance(grid, list) or not all(isinstance(one, dict) for one in grid):
            problem("must be a list of mappings, each some keys and values of the recipe", "grid")
            continue
        changes = entry.get("set", {})
        if not isinstance(changes, dict):
            problem("must be a mapping of keys and values of the recipe", "set")
            continue
        known = {key: entry[key] for key in ROW_KEYS if key in entry and key != "set"}
        known |= {"name": str(name), "changes": changes}
        if what == "model":
            if told := [key for key in OF_RECIPES if key in entry]:
                problem(f"a finished model is only scored; leave out {', '.join(told)}")
            if Path(entry["model"]).is_dir():
                known["content"] = model_fingerprint(Path(entry["model"]), ENCODER_FILES)
            else:
                problem(f"there is no folder {entry['model']}", "model")
            found.append(ComparedRow(**known))
            continue
        trains = entry.get("train", True)
        counts = labels if trains and entry.get("labels", True) else []
        rows = [{"dataset_rows": count} for count in counts] or [{}]
        recipes: list[Recipe | None] = [
            _collected(
                source.problems, load_recipe, entry["recipe"], overriding(changes | one | some)
            )
            for one in grid or [{}]
            for some in rows
        ]
        baseline |= not all(recipes)  # nobody knows what the row will be
        if all(recipes) and (recipe := recipes[0]) is not None:
            baseline |= trains and recipe.method == "infonce"
            known["content"] = digest(recipe.resolved())
            if not trains and "reader" not in recipe.training:
                problem(f"method {recipe.method} has no policy to score untrained", "train")
            if grid and any(one and one.training.get("validation") is None for one in recipes):
                problem("is chosen on validation rows; the recipe needs validation: {...}", "grid")
        found.append(ComparedRow(**known))
    if not baseline:
        message = (
            "no row is plain InfoNCE, and without it nobody knows what rationales are worth; add "
            "a row with a recipe of method: infonce, such as recipes/scenes/infonce.yaml"
        )
        source.problems.append(source.problem(("rows",), message))
    return found


def _collected(problems: list[str], load: Any, *arguments: Any) -> Any:
    try:
        return load(*arguments)
    except UserError as error:
        problems += [problem for problem in error.problems if problem not in problems]
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
    trains = row.recipe is not None and row.train
    if not trains:
        return [_cell(comparison, row, None, None, None)]
    counts: list[int | None] = list(comparison.labels) if row.labels else []
    cells = []
    for labels in counts or [None]:
        if not row.grid:
            cells += [_cell(comparison, row, labels, seed, None) for seed in comparison.seeds]
            continue
        first, *others = comparison.seeds
        cells += [_cell(comparison, row, labels, first, i) for i in range(len(row.grid))]
        if (labels or 0) in chosen:
            i = chosen[labels or 0]
            cells += [_cell(comparison, row, labels, seed, i) for seed in others]
    return cells


def _cell(
    comparison: Comparison,
    row: ComparedRow,
    labels: int | None,
    seed: int | None,
    choice: int | None,
) -> Cell:
    changes = dict(row.changes)
    if choice is not None:
        changes |= row.grid[choice]
    if labels is not None:
        changes["dataset_rows"] = labels
    if seed is not None:
        changes["seed"] = seed
    spec = {
        "recipe": row.recipe,
        "model": row.model,
        "content": [row.content, comparison.score_content],
        "changes": changes,
        "train": row.train,
        "rationale": row.rationale,
        "score": dict(comparison.score),
        "budget": dict(comparison.budget),
        "held_out": comparison.held_out,
    }
    return Cell(row.name, labels, seed, choice, spec)
