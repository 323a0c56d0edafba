"""Scores of a policy before and after training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from grace_rl.errors import UserError
from grace_rl.evaluate.scenes import example_rationales, score_policy
from grace_rl.evaluate.tables import rationale_table, score_table
from grace_rl.recipe.methods import METHODS
from grace_rl.run.directory import RunDirectory
from grace_rl.run.records import read_record
from grace_rl.run.zero import whole_policy

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe


class Report:
    """Scores of the policy before and after training, in evaluation.json and on the screen.

    Without `evaluation` in the recipe it does nothing. The scores from before are kept when a run
    is resumed. One process scores, the others wait for its answer.

    Args:
        recipe: The run's recipe.
        run: Its directory.
        trainer: Its trainer.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, trainer: Any) -> None:
        self.recipe = recipe
        self.run = run
        self.trainer = trainer
        self.encoder = trainer.encoder()
        self.content: dict[str, Any] = {}

    def before(self) -> None:
        if self.recipe.evaluation is None:
            return
        if self.run.evaluation.exists():
            self.content = self.run.on_main(self._kept)
            return
        self.content = {"model": str(self.run.model), "rows": [], "examples": {}}
        rollouts = METHODS[self.recipe.method].rollouts
        self._add("cold_start" if rollouts else "untrained", "none")
        if rollouts:
            self._add("cold_start", "greedy")
        self.run.write_evaluation(self.content)

    def _kept(self) -> dict[str, Any]:
        advice = "remove it, and the scores from before are lost"
        kept = read_record(self.run.evaluation, advice)
        rows, examples = kept.get("rows"), kept.setdefault("examples", {})
        parts = [*rows, *examples.values()] if isinstance(rows, list) else [None]
        if not all(isinstance(part, (dict, list)) for part in parts):
            raise UserError(f"{self.run.evaluation}: is damaged: it has no rows; {advice}")
        return kept

    def after(self) -> None:
        if self.recipe.evaluation is not None:
            self._add(self.recipe.method, "greedy" if self.encoder.writes_rationales else "none")
            self.run.write_evaluation(self.content)

    def _add(self, name: str, rationale: Any) -> None:
        evaluation = self.recipe.evaluation
        with whole_policy(self.trainer):
            scores, examples = self.run.on_main(lambda: self._score(rationale, evaluation))
        row = {"name": name, "rationale": rationale, "scores": scores}
        same = [r for r in self.content["rows"] if (r["name"], r["rationale"]) != (name, rationale)]
        self.content["rows"] = [*same, row]
        if rationale != "none":
            self.content["examples"][name] = examples

    def _score(
        self, rationale: Any, evaluation: Any
    ) -> tuple[dict[str, float], list[dict[str, str]]]:
        scores = score_policy(self.encoder, evaluation.dataset_splits, evaluation.rows, rationale)
        return scores, [] if rationale == "none" else example_rationales(self.encoder)

    def show(self, console: Console) -> None:
        """Print the table of scores and three rationales before and after."""
        if self.content:
            console.print(score_table(self.content["rows"]))
            if self.content["examples"]:
                console.print(rationale_table(self.content["examples"]))
