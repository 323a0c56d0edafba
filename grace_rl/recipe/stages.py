"""A recipe of several stages, each starting from the model that the one before it left.

    stages:
      - {method: reconstruction, max_steps: 200}
      - sft
      - {method: grpo, rewards: [{name: contrastive}, {name: reconstruction}]}

Keys beside `stages` hold for every stage whose method knows them; a stage's own keys go before. A
stage `{curate: recipe.yaml}` makes the rows that the stages after it read. In a stage's rewards,
`stage:reconstruction` stands for the model that an earlier stage will have left.

All stages are checked together before anything starts. What does not exist yet is stood in for: the
model by the one that the first stage starts from, curated rows by those they are made of.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError
from grace_rl.recipe.curation import CurationRecipe, load_curation
from grace_rl.recipe.methods import METHODS
from grace_rl.recipe.recipe import (
    Draft,
    Recipe,
    RecipeError,
    default_name,
    load_recipe,
    recipe_keys,
    recipe_of,
)
from grace_rl.recipe.schema import KeyPath, shown, unknown_recipe_key
from grace_rl.recipe.source import RecipeSource, read_source

REFERENCE = "stage:"
CURATE = "curate"
NOT_SHARED = ("rewards", "roles")  # at the top they are for the stages that roll out


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: `curate`, or the method.
        folder: Its run directory, `<output_dir>/stages/<number>-<name>`.
        recipe: What it runs; its model and rows may be those that an earlier stage will leave.
        stand_in: The same with what exists now in the place of what does not, to be checked.
        made: Keys of the recipe that earlier stages decide.
        curation: Of a stage that curates, in place of the recipes.
    """

    name: str
    folder: Path
    recipe: Recipe | None = None
    stand_in: Recipe | None = None
    made: dict[str, Any] = field(default_factory=dict)
    curation: CurationRecipe | None = None

    def resolved(self) -> dict[str, Any]:
        """Its mapping in `stages`, every key given."""
        if self.recipe is None:
            return {CURATE: str(self.curation.path) if self.curation else ""}
        tree = self.recipe.resolved()
        tree |= {key: value for key, value in self.made.items() if key == "rewards"}
        gone = {"output_dir", *self.made} - {"rewards"}
        return {key: value for key, value in tree.items() if key not in gone}


@dataclass(frozen=True)
class Chain:
    """A validated recipe of stages.

    Attributes:
        stages: At least one.
        output_dir: The run directory of all.
        path: The file.
    """

    stages: list[Stage]
    output_dir: Path
    path: Path

    @property
    def recipes(self) -> list[Recipe]:
        """What is trained, one recipe a stage."""
        return [stage.recipe for stage in self.stages if stage.recipe is not None]

    def resolved(self) -> dict[str, Any]:
        """What `--dry-run` prints and the run directory keeps; it loads to an equal chain."""
        stages = [stage.resolved() for stage in self.stages]
        return {"output_dir": str(self.output_dir), "stages": stages}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | Chain:
    """A recipe, or a chain where the file (or an override) names `stages`.

    Raises:
        UserError: With every mistake of every stage.
    """
    source = read_source(path, overrides)
    return load_recipe(path, overrides) if "stages" not in source.tree else chain_of(source)


def recipes_of(loaded: Recipe | Chain) -> list[Recipe]:
    """One recipe, or those of a chain."""
    return loaded.recipes if isinstance(loaded, Chain) else [loaded]


def chain_of(source: RecipeSource) -> Chain:
    """A chain from what was read.

    Raises:
        UserError: With every mistake of every stage.
    """
    problems = list(source.problems)
    items = _items(source, problems)
    if problems:
        raise UserError(problems)
    output = Path(str(source.tree.get("output_dir") or f"runs/{default_name(source.path)}"))
    reader = _Stages(source, output, items)
    for number in range(len(items)):
        reader.add(number)
    _check_shared(source, items, reader.problems)
    _check_anchors(source, reader)
    if reader.problems:
        raise RecipeError(list(dict.fromkeys(reader.problems)), reader.drafts)
    return Chain(reader.stages, output, source.path)


def _items(source: RecipeSource, problems: list[str]) -> list[dict[str, Any]]:
    """The stages as mappings; `sft` is `{method: sft}`."""
    given = source.tree["stages"]
    items: list[dict[str, Any]] = []
    if not isinstance(given, list) or not given:
        message = "must be a list of methods or mappings, such as [reconstruction, {method: grpo}]"
        problems.append(source.problem(("stages",), message))
        return items
    known = ", ".join([*METHODS, CURATE])
    for i, item in enumerate(given):
        item = {"method": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            problems.append(source.problem(("stages", i), f"must be a mapping, not {shown(item)}"))
        elif CURATE in item and len(item) > 1:
            message = f"{CURATE} takes a recipe's file and no other keys; put them there"
            problems.append(source.problem(("stages", i), message))
        elif CURATE not in item and item.get("method") not in list(METHODS):
            message = f"method must be one of {known}, not {shown(item.get('method'))}"
            problems.append(source.problem(("stages", i), message))
        elif "output_dir" in item:
            message = "is set by the recipe's own output_dir: <output_dir>/stages/<number>-<method>"
            problems.append(source.problem(("stages", i, "output_dir"), message))
        else:
            items.append(item)
    if "method" in source.tree:
        problems.append(source.problem(("method",), "each stage has its own; remove it"))
    return items


class _Stages:
    """Reads one stage after the other."""

    def __init__(self, source: RecipeSource, output: Path, items: list[dict[str, Any]]) -> None:
        self.source, self.output, self.items = source, output, items
        self.stages: list[Stage] = []
        self.problems: list[str] = []
        self.drafts: list[Draft] = []
        self.first_model = next(
            (
                model
                for tree in (*items, source.tree)
                if (model := tree.get("model_name_or_path")) is not None
            ),
            None,
        )

    def add(self, number: int) -> None:
        item = self.items[number]
        name = CURATE if CURATE in item else item["method"]
        folder = self.output / "stages" / f"{number + 1}-{name}"
        try:
            if name == CURATE:
                self.stages.append(self._curation(item[CURATE], folder))
            else:
                self.stages.append(self._trained(number, name, item, folder))
        except UserError as error:
            told = functools.partial(self._told, number, name)
            self.problems += map(told, error.problems)
            drafts = error.drafts if isinstance(error, RecipeError) else []
            self.drafts += [dataclasses.replace(draft, told=told) for draft in drafts]
            self.stages.append(Stage(name, folder))
            return
        if (whole := self.stages[-1].stand_in) is not None:
            self.drafts.append(Draft(whole, set(), functools.partial(self._told, number, name)))

    def _told(self, number: int, name: str, problem: str) -> str:
        """A stage's problem, with its number unless it was written beside `stages`."""
        shared = {place for key, place in self.source.places.items() if key[0] != "stages"}
        at_top = any(problem.startswith(f"{place}:") for place in shared)
        return problem if at_top else f"stage {number + 1} ({name}): {problem}"

    def _curation(self, file: Any, folder: Path) -> Stage:
        recipe = load_curation(str(file), ["--output_dir", str(folder)])
        return Stage(CURATE, folder, curation=recipe)

    def _trained(self, number: int, method: str, item: dict[str, Any], folder: Path) -> Stage:
        source, models = self._source(number, method, item), self._models()
        before = [stage for stage in self.stages if stage.name != CURATE]
        curated = [stage for stage in self.stages if stage.name == CURATE]
        made: dict[str, Any] = {}
        if before and "model_name_or_path" not in item:
            made["model_name_or_path"] = str(before[-1].folder / "model")
            source.tree["model_name_or_path"] = self.first_model
        if curated and "dataset_name" not in item:
            made |= {"dataset_name": str(curated[-1].folder / "rows.jsonl")}
            self._stand_in_rows(source, curated[-1])
        references = list(self._references(source, models))
        if references:
            made["rewards"] = [dict(entry) for entry in item.get("rewards", source.tree["rewards"])]
            source.tree["rewards"] = [dict(entry) for entry in source.tree["rewards"]]
        for i, key, _ in references:
            source.tree["rewards"][i][key] = None
        source.tree["output_dir"] = str(folder)
        stand_in = recipe_of(source)
        rewards = list(stand_in.rewards)
        for i, key, model in references:
            keywords = rewards[i].keywords | {key: model}
            rewards[i] = rewards[i].changed(keywords=keywords)
        model_keys = {k: v for k, v in made.items() if k == "model_name_or_path"}
        data = stand_in.data
        if "dataset_name" in made:
            data = data.model_copy(update={"dataset_name": made["dataset_name"]})
        recipe = dataclasses.replace(
            stand_in, model=stand_in.model | model_keys, data=data, rewards=rewards
        )
        return Stage(method, folder, recipe, stand_in, made)

    def _source(self, number: int, method: str, item: dict[str, Any]) -> RecipeSource:
        """The stage as if it were a recipe of its own; places are those of the file."""
        known = recipe_keys(method)
        shared = {key: value for key, value in self.source.tree.items() if key in known}
        if not METHODS[method].rollouts:
            shared = {key: value for key, value in shared.items() if key not in NOT_SHARED}
        places: dict[KeyPath, str] = {}
        for path, place in self.source.places.items():
            if path[:2] == ("stages", number) and len(path) > 2:
                places[path[2:]] = place
            elif path[0] not in item and path[0] != "stages":
                places[path] = place
        tree = copy.deepcopy(shared | item)  # checking fills in values
        return RecipeSource(self.source.path, tree, places)

    def _models(self) -> dict[str, str]:
        """What `stage:` may name, methods and numbers of earlier stages: their models."""
        found = {}
        for number, stage in enumerate(self.stages, start=1):
            if stage.name != CURATE:
                found[stage.name] = found[str(number)] = str(stage.folder / "model")
        return found

    def _references(
        self, source: RecipeSource, models: dict[str, str]
    ) -> Iterator[tuple[int, str, str]]:
        """(number of the reward, its argument, the model that it will find)."""
        rewards = source.tree.get("rewards") or []
        for i, entry in enumerate(rewards if isinstance(rewards, list) else []):
            for key, value in entry.items() if isinstance(entry, dict) else ():
                if not isinstance(value, str) or not value.startswith(REFERENCE):
                    continue
                wanted = value.removeprefix(REFERENCE).strip()
                if wanted in models:
                    yield i, key, models[wanted]
                    continue
                earlier = ", ".join(models) or "none"
                message = f"no earlier stage is called {wanted!r}; there are: {earlier}"
                source.problems.append(source.problem(("rewards", i, key), message))

    def _stand_in_rows(self, source: RecipeSource, curated: Stage) -> None:
        for key in [key for key in source.tree if key.startswith("dataset_")]:
            if key not in ("dataset_rows",):
                del source.tree[key]
        source.tree["dataset_name"] = "scenes"
        if curated.curation is not None:
            source.tree["dataset_name"] = curated.curation.data.dataset_name


def _check_shared(source: RecipeSource, items: list[dict[str, Any]], problems: list[str]) -> None:
    """A key at the top must be known to some stage."""
    known = {"stages": None, "output_dir": None}
    for item in items:
        if "method" in item:
            known |= dict.fromkeys(recipe_keys(item["method"]))
    for key in source.tree:
        if key not in known:
            message = unknown_recipe_key(key, list(known)).replace("key", "key to every stage", 1)
            problems.append(source.problem((key,), message))


def _check_anchors(source: RecipeSource, reader: _Stages) -> None:
    """What reconstruction trains must be what the stages after it read."""
    trained: Any = None
    for number, stage in enumerate(reader.stages, start=1):
        if stage.stand_in is None or "reader" not in stage.stand_in.training:
            continue
        config = stage.stand_in.training["reader"]
        if stage.name == "reconstruction":
            trained = config
        elif trained is not None and METHODS[stage.name].rollouts:
            for name in ("span", "layers", "pool"):
                ours, theirs = getattr(trained, name), getattr(config, name)
                if ours != theirs:
                    reader.problems.append(
                        f"{source.path}: stage {number} ({stage.name}): reader.{name}: "
                        f"is {theirs}, but reconstruction trains vectors with {name} {ours}; "
                        "give both the same reader, best as one key beside stages"
                    )
