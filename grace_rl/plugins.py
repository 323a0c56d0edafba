"""A name -> an object: the rewards, judges, encoders and guides that a user names.

A name is an entry point of a group, `package.module:Name`, or `path/to/file.py:Name`. It leads to
a class or a function. Keywords are checked against its signature, and by a class's own static
method `check(**arguments)`, where there is one beside `__init__` (it raises ValueError, a line for
each mistake). Nothing is built for that: a class is built when `Plugin.object` is first asked for,
once.

Importing this module is cheap, and so is asking what is installed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from grace_rl.errors import UserError, describe_error
from grace_rl.recipe.schema import CHECKS, exact, mistakes, nearest
from grace_rl.run.secrets import is_secret, remember

REWARDS = "grace_rl.rewards"
"""The entry-point group of rewards."""


@dataclass(frozen=True, eq=False)
class Plugin:
    """What a name led to, with the keywords that it is to get.

    Args:
        name: What the user called it.
        target: A class, a function, or an object that was built already.
        keywords: Arguments of the class, or bound to the function.
    """

    name: str
    target: Any
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def object(self) -> Any:
        """The built object, or the function with its keywords.

        Raises:
            UserError: It cannot be built.
        """
        if not isinstance(self.target, type):
            bound = functools.partial(self.target, **self.keywords)
            return bound if self.keywords else self.target
        try:
            return self.target(**self.keywords)
        except (Exception, SystemExit) as error:
            raise UserError(f"cannot be built: {describe_error(error, self.source)}") from error

    @cached_property
    def source(self) -> str | None:
        """The file that defines it, to name the line of an error."""
        target = self.target
        target = inspect.unwrap(target.func if isinstance(target, functools.partial) else target)
        if not isinstance(target, type) and not inspect.isroutine(target):
            target = type(target)
        try:
            return inspect.getsourcefile(target)
        except TypeError:
            return None


def installed(group: str) -> dict[str, str]:
    """The entry points of a group: name -> `package.module:Name`. Imports nothing."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group=group)}


def docstring(place: str) -> str:
    """The docstring of `package.module:Name`, read from the source where that is possible.

    Importing a reward may take seconds (torch, a service's client), reading it does not.

    Raises:
        UserError: There is no such module or name, or it cannot be imported.
    """
    module, _, name = place.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(str(spec and spec.origin)).read_bytes())
    except (ImportError, ValueError, OSError, SyntaxError):
        tree = ast.Module([], [])
    for node in tree.body:
        kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and node.name == name:
            return ast.get_docstring(node) or ""
    return inspect.getdoc(find(place, Path())) or ""


def find(name: str, base_dir: Path, group: str = "") -> Any:
    """The class or function that a name means, not built.

    Args:
        name: See the module.
        base_dir: Where `path/to/file.py` starts.
        group: The entry-point group in which a name without a colon is looked up.

    Raises:
        UserError: There is none, or its module cannot be imported.
    """
    if ":" not in name and name.endswith(".py"):
        names = public_names(_load_file(base_dir / name))
        there = f"; it has {', '.join(names)}" if names else "; it has none"
        raise UserError(f"say which class or function of the file: {name}:Name{there}")
    if ":" not in name:
        name = _entry_point_value(name, group)
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise UserError("write it as package.module:Name or path/to/file.py:Name")
    module = _load_file(base_dir / place) if place.endswith(".py") else _import(place)
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
            raise UserError(f"{place} has no {attribute!r}{nearest(part, names)}")
        target = getattr(target, part)
    if not callable(target):
        raise UserError(f"{attribute!r} is a {type(target).__name__}, not a class or a function")
    return target


def public_names(module: types.ModuleType) -> list[str]:
    """The classes and functions that a module defines for others, in their order."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]


def argument_problems(
    target: Any, keywords: Mapping[str, Any], called_with: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """What is wrong with the keywords of a class or function.

    Args:
        target: See `find`.
        keywords: From the recipe.
        called_with: Parameters of a function that whoever calls it fills in; None is the first one.
            With "*" among them all that have no keyword, and then an unknown keyword is a mistake
            despite `**kwargs`.

    Returns:
        (the keyword, what to do); no keyword where it is none of those given.
    """
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):  # some builtins
        return []
    parameters = list(signature.parameters.values())
    if isinstance(target, type):
        called_with = ()
    elif called_with is None:
        called_with = [p.name for p in parameters[:1]]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters) and "*" not in called_with
    named = {
        p.name: p
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in called_with
    }
    hints = _hints(target)
    problems = []
    for name, value in keywords.items():
        if is_secret(str(name)):
            remember(str(value))  # so that no message shows it
        if name in named:
            problems += [
                (f"{name}{key}", problem) for key, problem in _type_problems(hints.get(name), value)
            ]
        elif not takes_any:
            takes = f"it takes {', '.join(named)}" if named else "it takes none"
            problems.append((str(name), f"unknown argument{nearest(name, named)}; {takes}"))
    if "*" not in called_with:
        problems += [
            ("", f"the argument {p.name!r} is missing")
            for p in named.values()
            if p.default is p.empty and p.name not in keywords
        ]
    if not problems and isinstance(target, type):
        bound = signature.bind_partial(**keywords)
        bound.apply_defaults()
        return [_with_key(problem, keywords) for problem in _checked(target, bound.arguments)]
    return problems


def _checked(target: type, arguments: Mapping[str, Any]) -> list[str]:
    """What a class's own `check` says of its arguments."""
    # A subclass with arguments of its own does not inherit the check of others.
    owner = next(base for base in target.__mro__ if {"check", "__init__"} & vars(base).keys())
    check = vars(owner).get("check")
    if not isinstance(check, staticmethod):
        return []
    try:
        check(**arguments)
    except UserError as error:
        return error.problems
    except (Exception, SystemExit) as error:
        told = str(error) if isinstance(error, ValueError) else ""
        return told.splitlines() or [describe_error(error)]
    return []


def _with_key(problem: str, keywords: Collection[str]) -> tuple[str, str]:
    """A problem that begins with the name of a keyword, parted from it."""
    match = re.match(r"((\w+)[\w.\[\]]*):? ", problem)
    if match is None or match[2] not in keywords:
        return "", problem
    return match[1], problem[match.end() :]


def _entry_point_value(name: str, group: str) -> str:
    """`package.module:Name` of an installed plugin."""
    points = importlib.metadata.entry_points(group=group)
    if not points:
        raise UserError(
            f"nothing is installed under the entry-point group {group!r}, not even what ships with "
            "grace-rl; install the project: pip install -e ."
        )
    values = sorted({f"{p.module}:{p.attr}" for p in points if p.name == name})
    if not values:
        known = sorted(points.names)
        raise UserError(
            f"nothing is installed under this name{nearest(name, known)}; installed: "
            f"{', '.join(known)}; or write package.module:Name or path/to/file.py:Name"
        )
    if len(values) > 1:
        raise UserError(f"{len(values)} packages use this name; write one of {', '.join(values)}")
    return values[0]


def _import(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{module}.".startswith(f"{absent}."):
            raise UserError(
                f"there is no module {module!r}; install its package, put its folder in "
                "PYTHONPATH, or write path/to/file.py:Name"
            ) from error
        raise UserError(f"importing {module} failed: {describe_error(error)}") from error


def _load_file(path: Path) -> types.ModuleType:
    """A file as a module; run once in a process, unless it changes."""
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    name = "grace_rl_plugin_" + "_".join(path.with_suffix("").parts[1:])
    stat = path.stat()
    state = (path, stat.st_mtime_ns, stat.st_size)
    module = sys.modules.get(name)
    if module is not None and getattr(module, "__grace_rl_state__", None) == state:
        return module
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    vars(module)["__grace_rl_state__"] = state
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"importing {path} failed: {describe_error(error, str(path))}") from error
    return module


def _hints(target: Any) -> dict[str, Any]:
    """Annotations of its parameters; none where one names something that is not there."""
    builder = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        return typing.get_type_hints(builder, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _type_problems(hint: Any, value: Any) -> list[tuple[str, str]]:
    """What is wrong with a value from YAML; types that YAML does not have are not judged."""
    try:
        adapter = TypeAdapter(hint if hint is not None else Any, config=CHECKS)
    except PydanticUserError:  # a type with a configuration of its own
        return []
    try:
        exact(value)
    except ValueError as error:
        return [("", str(error))]
    try:
        try:
            adapter.validate_json(json.dumps(value))  # YAML's lists are good for tuples and sets
        except (TypeError, ValueError) as error:
            if isinstance(error, ValidationError):
                raise
            adapter.validate_python(value)
    except ValidationError as error:
        foreign = ("needs_python_object", "is_instance_of")
        if any(one["type"] in foreign for one in error.errors()):
            return []
        return [
            ("".join(f".{part}" for part in path), said) for path, said in mistakes(error, value)
        ]
    return []
