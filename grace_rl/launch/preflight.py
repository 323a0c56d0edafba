"""What can be wrong with a run before its weights load: the same from `check`, `train --dry-run`
and `train`, all together.

A look is a function of a `Subject` that yields findings; a UserError of the rooms below is a
finding too. A new look is a function in `model_looks` or `machine_looks` and its name in the list
there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grace_rl.data.rows import read_rows
from grace_rl.errors import Finding, UserError
from grace_rl.launch import machine_looks, model_looks
from grace_rl.launch.alone import arguments_alone
from grace_rl.launch.lines import Launch
from grace_rl.launch.rehearsal import rehearse
from grace_rl.launch.subject import Subject, this_machine
from grace_rl.recipe.fields import View, Wrong
from grace_rl.recipe.methods import METHODS, named
from grace_rl.recipe.recipe import RecipeError, Refusal
from grace_rl.recipe.schema import split_key

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe
    from grace_rl.recipe.stages import Chain
    from grace_rl.rollout.prompts import PromptTemplate
    from grace_rl.train.start import Build

Look = Callable[[Subject], Iterator[Finding]]
KEY = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)*")


@dataclass(frozen=True)
class Preflight:
    """What was found, and what a run goes on with.

    Attributes:
        recipe, args, rows: Of the run.
        build: Makes its trainer; None where the method refuses rows or rewards.
        prompts: Of every text, under `""`, and of roles with their own; none without prompts.
        findings: In the order of a screen.
    """

    recipe: Recipe
    args: Any
    rows: list[dict[str, Any]]
    build: Build | None
    prompts: dict[str, PromptTemplate]
    findings: list[Finding]

    @property
    def problems(self) -> list[str]:
        """What is certainly wrong, each as `recipe.yaml:12: key: what to do`."""
        certain = [f for f in self.findings if f.level == "problem" and not f.estimate]
        return list(_placed(self.recipe, certain))


def preflight(
    recipe: Recipe,
    args: Any = None,
    rows: list[dict[str, Any]] | None = None,
    *,
    launch: Launch | None = None,
    processes: int = 1,
    rewards: bool = False,
) -> Preflight:
    """Look at everything that can be looked at without the weights.

    Args:
        recipe: Loaded for so many processes.
        args: The trainer's config; None builds that of one process which stands for all.
        rows: Of its data; None reads them.
        launch: How the run is to be started; None: without accelerate's file.
        processes: At least 1.
        rewards: Try the rewards on made-up rollouts, too.

    Raises:
        UserError: Rows that cannot be read, or a config that refuses its values.
    """
    recipe.model_config()
    rows = read_rows(recipe.data) if rows is None else rows
    findings: list[Finding] = []
    if args is None:
        args, findings = _arguments(recipe, processes)
    build = None
    try:
        build = named(METHODS[recipe.method].plan)(recipe, args, rows)
    except UserError as error:
        findings += [Finding("recipe", problem, "problem") for problem in error.problems]
    machine = this_machine(processes, bool(args.use_cpu))
    subject = Subject(recipe, args, rows, launch, processes, machine)
    findings += looked(subject)
    if rewards and recipe.rewards and build is not None:
        findings.append(rehearse(recipe, args, rows))
    wrong = any(finding.level == "problem" and not finding.estimate for finding in findings)
    return Preflight(recipe, args, rows, build, {} if wrong else subject.prompts, findings)


def _placed(recipe: Recipe, findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        whole = finding.name == "recipe"
        text = finding.message if whole else f"{finding.name}: {finding.message}"
        yield recipe.source.problem(*split_key(text))


@contextmanager
def all_together(processes: int = 1) -> Iterator[None]:
    """Inside, a recipe is loaded: mistakes are told with those of rows and model, of all stages.

    Whatever would have to read a wrong value has no say.

    Args:
        processes: At least 1.

    Raises:
        UserError: In place of the loader's, with more problems.
    """
    try:
        yield
    except RecipeError as error:
        problems = list(error.problems)
        for draft in error.drafts:
            found = _found_also(draft.recipe, draft.wrong, processes)
            problems += [draft.told(one) for one in found if one not in problems]
        raise UserError(list(dict.fromkeys(problems))) from error


def _found_also(recipe: Recipe, wrong: set[str], processes: int) -> list[str]:
    args: Any = View(recipe.config, wrong)
    found: list[str] = []
    try:
        if not wrong & {"bf16", "fp16", "use_cpu"}:
            found += _placed(recipe, _arguments(recipe, processes)[1])
    except Refusal as error:
        found += error.problems
    except UserError:  # rules of ours, that have been told
        pass
    if any(key.startswith("dataset_") for key in wrong):
        return found
    try:
        rows = read_rows(recipe.data)
    except UserError as error:
        return [*found, *error.problems]
    try:
        if "rewards" not in wrong:
            named(METHODS[recipe.method].plan)(recipe, args, rows)
    except UserError as error:
        found += recipe.problems(error.problems)
    except Wrong:
        pass
    if "model_name_or_path" in wrong:
        return found
    subject = Subject(recipe, args, rows, None, processes, this_machine(processes, use_cpu=True))
    looks = _looked(subject, model_looks.LOOKS)
    return [*found, *_placed(recipe, [one for one in looks if one.level == "problem"])]


def check_stages(
    chain: Chain, arguments: Callable[[Recipe], Any] | None = None, **how: Any
) -> list[int | None]:
    """Look at every stage, as far as its rows exist, before the first one starts.

    Args:
        chain: The stages.
        arguments: Builds a stage's training arguments; None: those of one process alone.
        **how: Of `preflight`.

    Returns:
        Rows of each stage; None for a stage whose rows an earlier one makes, or that curates.

    Raises:
        UserError: What is wrong with the settings, rows and rewards of all stages.
    """
    problems: list[str] = []
    counts: list[int | None] = []
    read: list[Preflight] = []  # stages mostly share their rows
    for number, stage in enumerate(chain.stages, start=1):
        counts.append(None)
        recipe = stage.stand_in
        if recipe is None:
            continue
        try:
            args = arguments(recipe) if arguments is not None else None
            rows = next((one.rows for one in read if one.recipe.data == recipe.data), None)
            flight = preflight(recipe, args, rows, **how)
        except UserError as error:
            problems += [f"stage {number} ({stage.name}): {one}" for one in error.problems]
            continue
        read.append(flight)
        problems += [f"stage {number} ({stage.name}): {one}" for one in flight.problems]
        if "dataset_name" not in stage.made:
            counts[-1] = len(flight.rows)
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return counts


def refuse(flights: Sequence[Preflight]) -> None:
    """Raise UserError with all that is certainly wrong."""
    problems = [problem for flight in flights for problem in flight.problems]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


def looked(subject: Subject) -> list[Finding]:
    """The findings of every look, those that fail alike once."""
    first, *others = machine_looks.LOOKS
    return _looked(subject, (first, *model_looks.LOOKS, *others))


def _looked(subject: Subject, looks: Sequence[Look]) -> list[Finding]:
    findings: list[Finding] = []
    for look in looks:
        try:
            findings += look(subject)
        except UserError as error:
            findings += _as_findings(error)
        except Wrong:
            continue
    kept = {(finding.name, finding.message): finding for finding in findings}
    return list(kept.values())


def _as_findings(error: UserError) -> Iterator[Finding]:
    for problem in error.problems:
        key, _, rest = problem.partition(": ")
        if rest and KEY.fullmatch(key):
            yield Finding(key, rest, "problem")
        else:
            yield Finding("model_name_or_path", problem, "problem")


def _arguments(recipe: Recipe, processes: int) -> tuple[Any, list[Finding]]:
    try:
        return arguments_alone(recipe, processes), []
    except UserError as error:
        reason = " ".join(error.problems).rpartition("says: ")[2]
        try:  # as on the machine that the recipe is meant for
            args = arguments_alone(recipe, processes, bf16=False, fp16=False, use_cpu=True)
        except UserError:
            raise error from None
        advice = ["on this machine: --bf16 false --use_cpu true --dtype float32"]
        return args, [Finding("precision", reason, "problem", advice)]
