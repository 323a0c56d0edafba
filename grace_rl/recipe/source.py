"""The text of a recipe: a YAML file and `--key value` overrides, and where every value was written.

YAML is read with the scalars of YAML 1.2: `1e-4` is a number, and only `true` and `false` are
booleans (`eval_strategy: no` stays the text that TRL expects). Twice the same key is a mistake, and
so is a number that is not finite or would be rounded. A text that begins with `~/` is a path in the
home directory. A file can be neither too long nor too deep, and its aliases cannot multiply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import yaml

from grace_rl.errors import UserError, first_line
from grace_rl.recipe.schema import KeyPath, dotted, exact, shown, split_key
from grace_rl.run.secrets import masked_keys

T = TypeVar("T")

MOST_BYTES = 256 * 1024
MOST_VALUES = 20_000
DEEPEST = 32


class _Yaml12(yaml.SafeLoader):
    """PyYAML's safe loader with the core scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Yaml12.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """A decimal number also with leading zeros, which YAML 1.1 read as octal."""
    if len(node.value) > 100:  # int() is slow, and refuses beyond 4,300 digits
        raise ValueError(f"must be at most 2^53 in size, not a number of {len(node.value)} digits")
    return int(exact(int(node.value)))


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    value = float(loader.construct_yaml_float(node))
    vanished = value == 0 and re.search("[1-9]", re.split("[eE]", node.value)[0])
    if not math.isfinite(value) or vanished:
        raise ValueError(f"must be a finite number that a float can hold, not {node.value}")
    return value


_Yaml12.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Yaml12.add_constructor("tag:yaml.org,2002:float", _number)


@dataclass
class RecipeSource:
    """A recipe as it was written.

    Attributes:
        path: The file.
        tree: Its content with the overrides applied.
        places: Where a key was written, by its path: `recipe.yaml:12`, or `--key` for an override.
        problems: What could not be read, and what is wrong.
        unreadable: Paths of values that could not be read; nothing more is said about them.
        reported: The outermost keys of what is wrong.
    """

    path: Path
    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unreadable: set[KeyPath] = field(default_factory=set)
    reported: set[str] = field(default_factory=set)

    def problem(self, path: KeyPath, message: str) -> str:
        """`place: key: message`, with the place of the nearest enclosing key that was written."""
        key = dotted(path)
        for length in range(len(path), 0, -1):
            place = self.places.get(path[:length])
            if place is not None:
                return (
                    f"{place}: {message}" if place == f"--{key}" else f"{place}: {key}: {message}"
                )
        return f"{self.path}: {key}: {message}" if key else f"{self.path}: {message}"

    def add(self, path: KeyPath, message: str) -> None:
        """One more problem, unless the value could not be read: one mistake, one message."""
        if not any(path[:length] in self.unreadable for length in range(1, len(path) + 1)):
            self.problems.append(self.problem(path, message))
        if path:
            self.reported.add(str(path[0]))

    def take(self, problems: Iterable[str]) -> None:
        """More problems, each beginning with a dotted key."""
        for problem in problems:
            self.add(*split_key(problem))

    def missing(self, key: str, advice: str) -> None:
        """A key without a usable value is a problem, unless what was written is one already."""
        if not self.tree.get(key):
            self.add((key,), f"is missing; {advice}")

    def settled(self, part: T | None) -> T:
        """What was read; UserError with all problems, each once, where there are any."""
        if self.problems or part is None:
            raise UserError(list(dict.fromkeys(self.problems)))
        return part

    def collect(self, check: Callable[[], Any]) -> Any:
        """Run a check whose problems begin with a dotted key, and say where that key was written.

        Returns:
            What the check returns; None where it raised UserError.
        """
        try:
            return check()
        except UserError as error:
            self.take(error.problems)
            return None


def read_source(path: str | Path, overrides: Sequence[str] = ()) -> RecipeSource:
    """Read a recipe's file and apply overrides.

    Args:
        path: A YAML file.
        overrides: `--key value`, `--key=value` or `--flag`. Dots go deeper: `--reader.span
            context`, `--rewards.0.temperature 0.05`, `--rewards.contrastive.temperature 0.05`.

    Raises:
        UserError: The file is missing or is no YAML mapping.
    """
    source = RecipeSource(Path(path))
    node = _parse(source.path)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is lines of 'key: value', and this file has none")
    source.tree = _plain(node, source)
    for key, text in _split_overrides(overrides, source.problems):
        _override(source, key, text)
    for place in masked_keys(source.tree):
        told = "is masked, as a run keeps it; give the secret again, or take the key out"
        source.problems.append(source.problem(place, told))
    return source


def read_list(path: str | Path) -> tuple[list[Any], RecipeSource]:
    """Read a file that is a YAML list; `source.problem((i, key), ...)` names a line of item i.

    Raises:
        UserError: The file is missing or is no YAML list.
    """
    source = RecipeSource(Path(path))
    node = _parse(source.path)
    if not isinstance(node, yaml.SequenceNode):
        raise UserError(f"{path}: must be a list, an item a line that begins with '- '")
    return _plain(node, source), source


def _parse(path: Path) -> yaml.Node | None:
    if not path.exists():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; in that folder: {', '.join(near)}" if near else ""
        raise UserError(f"{path}: there is no such recipe{hint}")
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: is not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return _compose(text, str(path))


def _compose(text: str, place: str) -> yaml.Node | None:
    """The text's nodes.

    Raises:
        UserError: It is no YAML, or so much that reading it would take long.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"{place}: is longer than {MOST_BYTES // 1024} KiB, as no recipe is")
    brackets = accumulate(1 if one in "[{" else -1 for one in re.findall(r"[\[\]{}]", text))
    too_deep = f"{place}: is nested deeper than {DEEPEST} levels"
    if max(brackets, default=0) > 10 * DEEPEST:  # slow in PyYAML; some may stand in quoted texts
        raise UserError(too_deep)
    try:
        return yaml.compose(text, Loader=_Yaml12)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and not place.startswith("--") else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{place}{line}: is not valid YAML: {reason}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{place}: is not valid YAML: {first_line(error)}") from error
    except RecursionError as error:
        raise UserError(too_deep) from error


def _plain(node: yaml.Node, source: RecipeSource, path: KeyPath = (), place: str = "") -> Any:
    """The node's value; notes the place of every key and item.

    Args:
        node: From `_compose`.
        source: Gets places and problems.
        path: Where the value stands.
        place: Of an override, which has no lines.

    Raises:
        UserError: It is too deep, or too much.
    """
    values = 0

    def at(node: yaml.Node) -> str:
        return place or f"{source.path}:{node.start_mark.line + 1}"

    def read(node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...]) -> Any:
        nonlocal values
        values += 1
        if any(node is one for one in above):
            raise UserError(f"{at(node)}: {dotted(path)}: an alias (*name) contains itself")
        if values > MOST_VALUES:
            raise UserError(f"{at(node)}: aliases (*name) make more than {MOST_VALUES} values")
        if len(above) > DEEPEST:
            raise UserError(f"{at(node)}: is nested deeper than {DEEPEST} levels")
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            return dict(_pairs(node, path, above))
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                source.places[(*path, i)] = at(item)
            return [read(item, (*path, i), above) for i, item in enumerate(node.value)]
        return _scalar(node, path, source)

    def _pairs(
        node: yaml.MappingNode, path: KeyPath, above: tuple[yaml.Node, ...]
    ) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not key:
                source.problems.append(f"{at(key_node)}: a key must be a word")
            elif key in seen:
                first = source.places[(*path, key)]
                source.problems.append(
                    f"{at(key_node)}: {key}: is written twice (first in {first}); keep one"
                )
            else:
                seen.add(key)
                source.places[(*path, key)] = at(key_node)
                yield key, read(value_node, (*path, key), above)

    return read(node, path, ())


def _scalar(node: yaml.Node, path: KeyPath, source: RecipeSource) -> Any:
    try:
        value = _Yaml12("").construct_object(node)  # type: ignore[no-untyped-call]
    except yaml.YAMLError as error:
        source.add(path, f"cannot be read: {getattr(error, 'problem', None) or error}")
        source.unreadable.add(path)
        return None
    except ValueError as error:
        source.add(path, str(error))
        source.unreadable.add(path)
        return None
    return str(Path(value).expanduser()) if str(value).startswith("~/") else value


def _split_overrides(tokens: Sequence[str], problems: list[str]) -> list[tuple[str, str | None]]:
    """`(key, text)` pairs; no text means a bare flag."""
    pairs: list[tuple[str, str | None]] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            problems.append(
                f"{token!r}: expected --key value (a key of the recipe after two dashes)"
            )
        elif equals:
            pairs.append((key, text))
        else:
            pairs.append((key, rest.pop(0) if rest and not rest[0].startswith("--") else None))
    return pairs


def _override(source: RecipeSource, key: str, text: str | None) -> None:
    """Set one dotted key; keys on the way are made where they are missing."""
    container: Any = source.tree
    path: KeyPath = ()
    parts = key.split(".")
    for depth, part in enumerate(parts, start=1):
        if isinstance(container, list):
            index = _item(container, part)
            if index is None:
                entries = ", ".join(map(_entry, range(len(container)), container)) or "nothing"
                source.problems.append(f"--{key}: there is no entry {part!r}; there is: {entries}")
                return
            path = (*path, index)
        elif isinstance(container, dict):
            path = (*path, part)
        else:
            holder = ".".join(parts[: depth - 1])
            source.problems.append(f"--{key}: {holder} is {shown(container)} and holds no keys")
            return
        if depth == len(parts):
            for stale in [place for place in source.places if place[: len(path)] == path]:
                del source.places[stale]
            source.places[path] = f"--{key}"
            container[path[-1]] = _override_value(source, path, text)
        elif isinstance(container, dict) and container.get(part) is None:
            source.places[path] = f"--{key}"
            container[part] = {}
        container = container[path[-1]]


def _item(items: list[Any], part: str) -> int | None:
    """The index that a number, a reward's label or name, or a stage's method means."""
    if part.isdecimal() and len(part) < 10:
        return int(part) if int(part) < len(items) else None
    for key in ("label", "name", "method"):
        matches = [
            i for i, item in enumerate(items) if isinstance(item, dict) and item.get(key) == part
        ]
        if len(matches) == 1:
            return matches[0]
    return None


def _entry(i: int, item: Any) -> str:
    keys = ("label", "name", "method") if isinstance(item, dict) else ()
    name = next((item[key] for key in keys if item.get(key)), None)
    return f"{i} ({name})" if name else str(i)


def _override_value(source: RecipeSource, path: KeyPath, text: str | None) -> Any:
    """An override's text as YAML (a scalar, a list or mapping in brackets), else as it is."""
    if text is None:
        return True
    try:
        node = _compose(text, source.places[path])
        if isinstance(node, yaml.CollectionNode) and node.flow_style:
            return _plain(node, source, path, source.places[path])
    except UserError as error:
        if text.startswith(("[", "{")):
            source.problems += error.problems
        return text
    if isinstance(node, yaml.ScalarNode) and (node.style or node.value == text):
        return _scalar(node, path, source) if node.style is None else node.value
    return text
