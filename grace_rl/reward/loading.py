"""From what a recipe names to rewards that can be called, with every mistake reported at once.

`load_rewards` finds and checks them without building any; `build_rewards` builds, once in a run.
What is called with one argument gets the RewardBatch; what has a parameter named prompts,
completions or completion_ids is a plain TRL reward function and is called as TRL calls it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError
from grace_rl.plugins import REWARDS, Plugin, argument_problems, find
from grace_rl.recipe.rewards import RewardSpec
from grace_rl.reward.batch import RewardBatch
from grace_rl.run.zero import outside_zero3

TRL_PARAMETERS = frozenset({"prompts", "completions", "completion_ids"})


@dataclass(frozen=True)
class LoadedReward:
    """A reward that was found and checked; it is built when `function` is first asked for.

    Args:
        label: Unique name in metrics.
        plugin: What the recipe's name led to.
        weight, on_error, timeout: See `RewardSpec`.
        gates: True where it may return a gate (the attribute `gates = True`).
        steps: True where it returns steps (the attribute `steps = True`).
        trained_roles: The sets of trained roles that it can score (the attribute of that name, such
            as `(("positive",), ("text",))`); empty for any.
        trl_parameters: None for a reward called with a RewardBatch. Else the names that the plain
            TRL function takes, where "**" stands for any.
    """

    label: str
    plugin: Plugin
    weight: float = 1.0
    on_error: str = "raise"
    timeout: float | None = None
    gates: bool = False
    steps: bool = False
    trained_roles: tuple[tuple[str, ...], ...] = ()
    trl_parameters: frozenset[str] | None = None

    @property
    def name(self) -> str:
        """What the recipe called it."""
        return self.plugin.name

    @property
    def function(self) -> Callable[..., Any]:
        """The built object, or the function with its keywords bound."""
        function: Callable[..., Any] = self.plugin.object
        return function

    @property
    def asks_a_model(self) -> bool:
        """Whether it starts from the policy or waits for an answer from elsewhere: one call of it
        may cost more than a whole batch of the others."""
        call = getattr(self.plugin.target, "__call__", None)  # noqa: B004  # of a class or an object
        waits = map(inspect.iscoroutinefunction, (self.plugin.target, call))
        return hasattr(self.plugin.target, "start_from") or any(waits)

    def __call__(self, batch: RewardBatch, trainer_arguments: Mapping[str, Any]) -> Any:
        """Call it as its signature asks for: with the batch, or as TRL would.

        Args:
            batch: What to score.
            trainer_arguments: What only plain TRL functions get (trainer_state, log_metric, ...).
        """
        if self.trl_parameters is None:
            return self.function(batch)
        offered = {
            **batch.columns,
            **trainer_arguments,
            "prompts": batch.prompts,
            "completions": batch.rationales,
            "completion_ids": batch.token_ids,
        }
        bound = self.function.keywords if isinstance(self.function, functools.partial) else {}
        takes = set(offered) if "**" in self.trl_parameters else self.trl_parameters
        keywords = {name: offered[name] for name in offered if name in takes and name not in bound}
        missing = _required(inspect.signature(self.function).parameters.values()) - set(keywords)
        if missing:
            raise ValueError(
                f"it needs the columns {', '.join(sorted(missing))}; "
                f"the rows have: {', '.join(sorted(batch.columns)) or 'none'}"
            )
        return self.function(**keywords)


def load_rewards(
    specs: Sequence[RewardSpec | str | LoadedReward | Callable[..., Any]], base_dir: str | Path
) -> list[LoadedReward]:
    """Find and check every reward before anything expensive happens; builds none.

    Args:
        specs: The recipe's rewards; from Python also plain names, functions and built objects.
        base_dir: Where `path/to/file.py` starts (the recipe's folder).

    Returns:
        One LoadedReward each, in order, with unique labels.

    Raises:
        UserError: All problems of all specs: unknown name, keyword that is unknown, missing or of
            the wrong type or value, wrong signature, duplicate label, an error while importing.
    """
    problems: list[str] = []
    wanted = [RewardSpec(spec) if isinstance(spec, str) else spec for spec in specs]
    labels = _labels(wanted, problems)
    loaded = []
    for i, (spec, label) in enumerate(zip(wanted, labels, strict=True)):
        try:
            loaded.append(_load(spec, label, Path(base_dir), f"rewards[{i}]"))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return loaded


@outside_zero3()
def build_rewards(rewards: Sequence[LoadedReward]) -> None:
    """Build those that are not built yet.

    Raises:
        UserError: All that cannot be built.
    """
    problems: list[str] = []
    for i, reward in enumerate(rewards):
        try:
            reward.plugin.object  # noqa: B018  # it is built when it is asked for
        except UserError as error:
            problems += [f"rewards[{i}] ({reward.name}): {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)


def _load(spec: Any, label: str, base_dir: Path, place: str) -> LoadedReward:
    if isinstance(spec, LoadedReward):
        return spec
    named = isinstance(spec, RewardSpec)
    if not named:  # a function or a built object, given from Python
        spec, target = RewardSpec(label), spec
    found: list[tuple[str, str]] = []
    parameters: list[inspect.Parameter] = []
    try:
        if named:
            target = find(spec.name, base_dir, REWARDS)
        elif isinstance(target, type):
            raise UserError(f"it is a class; give an object: {target.__name__}(...)")
        parameters = _call_parameters(target)
        if named:
            trl = _is_plain_trl(parameters)
            filled_in = {"*", *TRL_PARAMETERS} if trl else None
            found += argument_problems(target, spec.keywords, filled_in)
        if not found:
            _check_call([p for p in parameters if p.name not in spec.keywords])
    except UserError as error:
        found += [("", problem) for problem in error.problems]
    if found:
        whole = f"{place} ({spec.name})"
        raise UserError([f"{f'{place}.{key}' if key else whole}: {text}" for key, text in found])
    names = frozenset("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)
    return LoadedReward(
        label=label,
        plugin=Plugin(spec.name, target, spec.keywords),
        weight=spec.weight,
        on_error=spec.on_error,
        timeout=spec.timeout,
        gates=bool(getattr(target, "gates", False)),
        steps=bool(getattr(target, "steps", False)),
        trained_roles=tuple(map(tuple, getattr(target, "trained_roles", ()))),
        trl_parameters=names if _is_plain_trl(parameters) else None,
    )


def _call_parameters(target: Any) -> list[inspect.Parameter]:
    """Parameters of what is called with a batch: an object of the class, or the function."""
    function = target
    if isinstance(target, type):
        if not any("__call__" in vars(base) for base in target.__mro__):
            raise UserError(f"{target.__name__} has no __call__ method")
        function = inspect.getattr_static(target, "__call__")
    elif not callable(target):
        raise UserError(f"{type(target).__name__} has no __call__ method")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError) as error:
        raise UserError(f"it has no readable signature: {error}") from error
    return parameters[1:] if isinstance(target, type) else parameters


def _is_plain_trl(parameters: Sequence[inspect.Parameter]) -> bool:
    only_any = bool(parameters) and all(p.kind is p.VAR_KEYWORD for p in parameters)
    return only_any or any(p.name in TRL_PARAMETERS for p in parameters)


def _check_call(parameters: Sequence[inspect.Parameter]) -> None:
    """That it can be called with a batch, or as TRL would."""
    if _is_plain_trl(parameters):
        return
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if positional and _required(parameters) <= {positional[0].name}:
        return
    takes = ", ".join(str(p) for p in parameters)
    if takes == "*args, **kwargs":
        raise UserError(
            "it is called with (*args, **kwargs), which does not say how; a decorator that uses "
            "functools.wraps keeps the parameters of its function"
        )
    raise UserError(
        f"it is called with ({takes}); a reward is called with one RewardBatch, or like a TRL "
        "reward function with prompts, completions, **columns"
    )


def _required(parameters: Iterable[inspect.Parameter]) -> set[str]:
    skip = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in parameters if p.default is p.empty and p.kind not in skip}


def _labels(wanted: Sequence[Any], problems: list[str]) -> list[str]:
    """One unique label each; only labels that the user gave twice are a problem."""
    given = [spec.label if isinstance(spec, RewardSpec | LoadedReward) else None for spec in wanted]
    for twice in sorted({label for label in given if label and given.count(label) > 1}):
        problems.append(f"rewards: the label {twice!r} is used {given.count(twice)} times")
    taken = {label for label in given if label}
    labels = []
    for spec, label in zip(wanted, given, strict=True):
        if label is None:
            base = spec.name if isinstance(spec, RewardSpec) else _callable_name(spec)
            base = base.rpartition(":")[2].replace("/", "_").replace(" ", "_")
            numbered = (f"{base}_{count}" for count in itertools.count(2))
            label = next(name for name in itertools.chain([base], numbered) if name not in taken)
            taken.add(label)
        labels.append(label)
    return labels


def _callable_name(function: Any) -> str:
    if isinstance(function, functools.partial):
        return _callable_name(function.func)
    return getattr(function, "__name__", type(function).__name__)
