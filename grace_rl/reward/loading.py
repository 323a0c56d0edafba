"""From what a recipe names to callable rewards, with every mistake reported at once.

A name is an entry point of the group `grace_rl.rewards`, `package.module:Name`, or
`path/to/file.py:Name` relative to the recipe. It leads to a class (built with the recipe's
keywords) or a function (the keywords are bound to it). What is called with one argument gets the
RewardBatch; what has a parameter named prompts, completions or completion_ids is a plain TRL reward
function and is called as TRL calls it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import math
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grace_rl.errors import UserError
from grace_rl.reward.batch import RewardBatch
from grace_rl.run.zero import outside_zero3

ENTRY_POINT_GROUP = "grace_rl.rewards"
TRL_PARAMETERS = frozenset({"prompts", "completions", "completion_ids"})


@dataclass(frozen=True)
class RewardSpec:
    """One entry of a recipe's `rewards`.

    Args:
        name: an entry point's name, `package.module:Name` or `path/to/file.py:Name`.
        weight: factor in the total; 0 only logs the reward (and switches its gate off).
        on_error: `raise` ends the run; `abstain` leaves the rows unscored by this reward.
        label: the name in metrics; the default is the name's last part.
        keywords: arguments of the class or function.
    """

    name: str
    weight: float = 1.0
    on_error: Literal["raise", "abstain"] = "raise"
    label: str | None = None
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedReward:
    """A reward ready to be called by the runtime.

    Args:
        name: what the recipe called it.
        label: unique name in metrics.
        weight: factor in the total.
        on_error: `raise` or `abstain`.
        function: the built object or the function with its keywords bound.
        gates: True where it may return a gate (the attribute `gates = True`).
        steps: True where it returns steps (the attribute `steps = True`).
        trl_parameters: None for a reward called with a RewardBatch. Else the names that the plain
            TRL function takes, where "**" stands for any.
        source: the file that defines it, to name the line of an error.
    """

    name: str
    label: str
    weight: float
    on_error: Literal["raise", "abstain"]
    function: Callable[..., Any]
    gates: bool = False
    steps: bool = False
    trl_parameters: frozenset[str] | None = None
    source: str | None = None

    def __call__(self, batch: RewardBatch, trainer_arguments: Mapping[str, Any]) -> Any:
        """Call it as its signature asks for: with the batch, or as TRL would.

        Args:
            batch: what to score.
            trainer_arguments: what only plain TRL functions get (trainer_state, log_metric, ...).
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
        missing = _required(inspect.signature(self.function)) - set(keywords)
        if missing:
            raise ValueError(
                f"it needs the columns {', '.join(sorted(missing))}; "
                f"the rows have: {', '.join(sorted(batch.columns)) or 'none'}"
            )
        return self.function(**keywords)


@outside_zero3()
def load_rewards(
    specs: Sequence[RewardSpec | str | LoadedReward | Callable[..., Any]], base_dir: str | Path
) -> list[LoadedReward]:
    """Find, check and build every reward before anything expensive happens.

    Args:
        specs: the recipe's rewards; from Python also plain names, functions and built objects.
        base_dir: where `path/to/file.py` starts (the recipe's folder).

    Returns:
        One LoadedReward each, in order, with unique labels.

    Raises:
        UserError: all problems of all specs: unknown name, keyword that is unknown, missing or of
            the wrong type, wrong signature, duplicate label, an error while importing or building.
    """
    problems: list[str] = []
    wanted = [RewardSpec(spec) if isinstance(spec, str) else spec for spec in specs]
    files: dict[Path, types.ModuleType] = {}
    found: dict[int, Any] = {}
    for i, spec in enumerate(wanted):
        if not isinstance(spec, RewardSpec):
            continue
        try:
            target = _find(spec.name, Path(base_dir), files)
            found[i] = target
            issues = _spec_problems(spec) + _keyword_problems(target, spec.keywords)
        except UserError as error:
            issues = _spec_problems(spec) + error.problems
        problems += [f"rewards[{i}] ({spec.name}): {issue}" for issue in issues]
    labels = _labels(wanted, problems)
    if problems:
        raise UserError(problems)

    loaded = []
    for i, spec in enumerate(wanted):
        name = spec.name if isinstance(spec, RewardSpec | LoadedReward) else labels[i]
        try:
            loaded.append(_load(spec, found.get(i), labels[i]))
        except UserError as error:
            problems += [f"rewards[{i}] ({name}): {issue}" for issue in error.problems]
    if problems:
        raise UserError(problems)
    return loaded


def available_rewards() -> dict[str, str]:
    """The entry points of the group `grace_rl.rewards`: name -> `package.module:Name`."""
    return {
        point.name: point.value
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    }


def find_reward(name: str, base_dir: str | Path) -> Any:
    """The class or function that a name means, not built.

    Raises:
        UserError: There is none, or its file cannot be imported.
    """
    return _find(name, Path(base_dir), {})


def _load(spec: Any, target: Any, label: str) -> LoadedReward:
    if isinstance(spec, LoadedReward):
        return spec
    if isinstance(spec, RewardSpec):
        name, weight, on_error, keywords = spec.name, spec.weight, spec.on_error, spec.keywords
    else:  # a function or a built object, given from Python
        name, weight, on_error, keywords, target = label, 1.0, "raise", {}, spec
        if isinstance(target, type):
            raise UserError(f"{target.__name__} is a class; give an object: {target.__name__}(...)")
    function = target
    if isinstance(target, type):
        try:
            function = target(**keywords)
        except (Exception, SystemExit) as error:
            raise UserError(f"cannot be built: {describe_error(error, _source(target))}") from error
    elif keywords:
        function = functools.partial(target, **keywords)
    return LoadedReward(
        name=name,
        label=label,
        weight=float(weight),
        on_error=on_error,
        function=function,
        gates=bool(getattr(target, "gates", False)),
        steps=bool(getattr(target, "steps", False)),
        trl_parameters=_trl_parameters(function),
        source=_source(target),
    )


def _find(name: str, base_dir: Path, files: dict[Path, types.ModuleType]) -> Any:
    """The class or function that a name means."""
    if ":" not in name:
        if name.endswith(".py"):
            raise UserError(f"say which class or function of the file: {name}:Name")
        name = _entry_point_value(name)
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise UserError("write it as package.module:Name or path/to/file.py:Name")
    module = _load_file(base_dir / place, files) if place.endswith(".py") else _import(place)
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
            raise UserError(f"{place} has no {attribute!r}{_nearest(part, names)}")
        target = getattr(target, part)
    if not callable(target):
        raise UserError(f"{attribute!r} is a {type(target).__name__}, not a class or a function")
    return target


def _entry_point_value(name: str) -> str:
    """`package.module:Name` of an installed reward."""
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    if not points:
        raise UserError(
            f"no reward is installed under the entry-point group {ENTRY_POINT_GROUP!r}, not even "
            "those that ship with grace-rl; install the project: pip install -e ."
        )
    values = sorted({f"{p.module}:{p.attr}" for p in points if p.name == name})
    if not values:
        known = sorted(points.names)
        raise UserError(
            f"no installed reward has this name{_nearest(name, known)}; "
            f"installed: {', '.join(known)}; or write package.module:Name or path/to/file.py:Name"
        )
    if len(values) > 1:
        raise UserError(f"{len(values)} packages use this name; write one of {', '.join(values)}")
    return values[0]


def _import(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UserError(
                f"there is no module {module!r}; install its package, put its folder in "
                "PYTHONPATH, or write path/to/file.py:Name"
            ) from error
        raise UserError(f"importing {module} failed: {describe_error(error)}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"importing {module} failed: {describe_error(error)}") from error


def _load_file(path: Path, files: dict[Path, types.ModuleType]) -> types.ModuleType:
    path = path.resolve()
    if path in files:
        return files[path]
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    name = "grace_rl_plugin_" + "_".join(path.with_suffix("").parts[1:])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"importing {path} failed: {describe_error(error, str(path))}") from error
    files[path] = module
    return module


def _spec_problems(spec: RewardSpec) -> list[str]:
    problems = []
    number = isinstance(spec.weight, int | float) and not isinstance(spec.weight, bool)
    if not number or not math.isfinite(spec.weight):
        problems.append(f"weight must be a finite number, not {spec.weight!r}")
    if spec.on_error not in ("raise", "abstain"):
        problems.append(f"on_error must be 'raise' or 'abstain', not {spec.on_error!r}")
    if spec.label is not None and (not spec.label or set(spec.label) & set("/ ")):
        problems.append(f"label {spec.label!r} must not be empty or contain '/' or a space")
    return problems


def _keyword_problems(target: Any, keywords: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keywords of one class or function."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (ValueError, TypeError):  # some builtins; _trl_parameters says so
        return []
    builder = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(builder)
    except (NameError, TypeError, AttributeError):  # annotations of names that are not there
        hints = {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    plain_trl = _is_plain_trl(parameters)
    if not isinstance(target, type):
        if plain_trl:  # its **kwargs are the row's columns, so an unknown keyword is a mistake
            named, takes_any = [p for p in named if p.name not in TRL_PARAMETERS], False
        else:
            named = named[1:]  # the batch
    names = [p.name for p in named]
    problems = []
    for name, value in keywords.items():
        if name not in names:
            if not takes_any:
                takes = f"; it takes: {', '.join(names)}" if names else "; it takes none"
                problems.append(f"unknown argument {name!r}{_nearest(name, names)}{takes}")
        elif not _fits(value, hints.get(name, Any)):
            problems.append(f"{name} must be {_say(hints[name])}, not {value!r}")
    if isinstance(target, type) or not plain_trl:
        problems += [
            f"the argument {p.name!r} is missing"
            for p in named
            if p.default is p.empty and p.name not in keywords
        ]
    return problems


def _is_plain_trl(parameters: Sequence[inspect.Parameter]) -> bool:
    only_any = bool(parameters) and all(p.kind is p.VAR_KEYWORD for p in parameters)
    return only_any or any(p.name in TRL_PARAMETERS for p in parameters)


def _trl_parameters(function: Any) -> frozenset[str] | None:
    """LoadedReward.trl_parameters of a callable, by its signature."""
    if not callable(function):
        raise UserError(f"{type(function).__name__} has no __call__ method")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError) as error:
        raise UserError(f"it has no readable signature: {error}") from error
    if _is_plain_trl(parameters):
        return frozenset("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not positional or len(_required(inspect.signature(function)) - {positional[0].name}) > 0:
        raise UserError(
            f"it is called with ({', '.join(str(p) for p in parameters)}); a reward is called with "
            "one RewardBatch, or like a TRL reward function with prompts, completions, **columns"
        )
    return None


def _required(signature: inspect.Signature) -> set[str]:
    skip = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name
        for name, p in signature.parameters.items()
        if p.default is p.empty and p.kind not in skip
    }


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


def _source(target: Any) -> str | None:
    target = inspect.unwrap(target.func if isinstance(target, functools.partial) else target)
    if not isinstance(target, type) and not inspect.isroutine(target):
        target = type(target)
    try:
        return inspect.getsourcefile(target)
    except TypeError:
        return None


def describe_error(error: BaseException, source: str | None = None) -> str:
    """`ValueError: why (file.py:12)`, with the deepest line inside `source` where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if source is not None and frame.filename == source]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    if inside or (frames and source is None):
        frame = (inside or frames)[-1]
        return f"{text} ({frame.filename}:{frame.lineno})"
    return f"{text} ({source})" if source else text


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value from YAML can be meant; only plain literal types are judged."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool):
        return isinstance(value, annotation)
    if annotation in (list, tuple, Sequence) or origin in (list, tuple, Sequence):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(_fits(item, inner) for item in value)
    if annotation is dict or origin is dict:
        return isinstance(value, dict)
    return True


def _say(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_say(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if annotation is type(None):
        return "null"
    words = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    return words.get(annotation) or str(annotation).removeprefix("<class '").removesuffix("'>")
