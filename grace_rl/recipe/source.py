"""The text of a recipe: a YAML file and `--key value` overrides, and where every value was written.

YAML is read with the scalars of YAML 1.2: `1e-4` is a number, and only `true` and `false` are
booleans (`eval_strategy: no` stays the text that TRL expects). Twice the same key is a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grace_rl.errors import UserError

KeyPath = tuple[str | int, ...]


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
# A decimal number also with leading zeros, which YAML 1.1 read as octal.
_Yaml12.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


@dataclass
class RecipeSource:
    """A recipe as it was written.

    Attributes:
        path: The file.
        tree: Its content with the overrides applied.
        places: Where a key was written, by its path: `recipe.yaml:12`, or `--key` for an override.
        problems: What could not be read.
    """

    path: Path
    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def problem(self, path: KeyPath, message: str) -> str:
        """`place: key: message`, with the place of the nearest enclosing key that was written."""
        key = ".".join(str(part) for part in path)
        for length in range(len(path), 0, -1):
            place = self.places.get(path[:length])
            if place is not None:
                return (
                    f"{place}: {message}" if place == f"--{key}" else f"{place}: {key}: {message}"
                )
        return f"{self.path}: {key}: {message}" if key else f"{self.path}: {message}"

    def missing(self, key: str, advice: str) -> None:
        """A key without a usable value is a problem, unless what was written is one already."""
        if not self.tree.get(key):
            self.problems.append(self.problem((key,), f"is missing; {advice}"))

    def collect(self, check: Callable[[], Any]) -> Any:
        """Run a check whose problems begin with a dotted key, and say where that key was written.

        Returns:
            What the check returns; None where it raised UserError.
        """
        try:
            return check()
        except UserError as error:
            for problem in error.problems:
                key, colon, message = problem.partition(": ")
                self.problems.append(
                    self.problem(_path(key), message) if colon else f"{self.path}: {problem}"
                )
            return None


def _path(key: str) -> KeyPath:
    """`roles.query` and `rewards[0] (length)` as paths."""
    words = key.partition(" ")[0].replace("[", ".").replace("]", "").split(".")
    return tuple(int(word) if word.isdigit() else word for word in words)


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
    node = _compose(source.path)
    try:
        source.tree = _plain(node, (), source)
    except RecursionError as error:
        raise UserError(f"{path}: an alias (*name) contains itself") from error
    for key, text in _split_overrides(overrides, source.problems):
        _override(source, key, text)
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
    try:
        return _plain(node, (), source), source
    except RecursionError as error:
        raise UserError(f"{path}: an alias (*name) contains itself") from error


def _compose(path: Path) -> yaml.MappingNode:
    node = _parse(path)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is lines of 'key: value', and this file has none")
    return node


def _parse(path: Path) -> yaml.Node | None:
    if not path.exists():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; in that folder: {', '.join(near)}" if near else ""
        raise UserError(f"{path}: there is no such recipe{hint}")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: is not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return yaml.compose(text, Loader=_Yaml12)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{path}:{line}: is not valid YAML: {reason}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {str(error).splitlines()[0]}") from error


def _plain(node: yaml.Node, path: KeyPath, source: RecipeSource) -> Any:
    """The node's value; notes the place of every key and item."""
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{source.path}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
                source.problems.append(f"{place}: a key must be a word")
                continue
            key = key_node.value
            if key in found:
                first = source.places[(*path, key)]
                source.problems.append(
                    f"{place}: {key}: is written twice (first in {first}); keep one"
                )
                continue
            source.places[(*path, key)] = place
            found[key] = _plain(value_node, (*path, key), source)
        return found
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, item in enumerate(node.value):
            source.places[(*path, i)] = f"{source.path}:{item.start_mark.line + 1}"
            items.append(_plain(item, (*path, i), source))
        return items
    return _scalar(node, path, source)


def _scalar(node: yaml.Node, path: KeyPath, source: RecipeSource) -> Any:
    try:
        return _Yaml12("").construct_object(node)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        source.problems.append(source.problem(path, f"cannot be read: {reason}"))
        return None


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
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        step: str | int | None = part
        if isinstance(container, list):
            step = _item(container, part)
            if step is None:
                entries = (
                    ", ".join(_entry(i, item) for i, item in enumerate(container)) or "nothing"
                )
                source.problems.append(f"--{key}: there is no entry {part!r}; there is: {entries}")
                return
        elif not isinstance(container, dict):
            source.problems.append(
                f"--{key}: {'.'.join(parts[:depth])} is {container!r} and holds no keys"
            )
            return
        assert step is not None
        path = (*path, step)
        if last:
            for stale in [place for place in source.places if place[: len(path)] == path]:
                del source.places[stale]
            source.places[path] = f"--{key}"
            container[step] = _override_value(source, path, text)
        else:
            if isinstance(container, dict) and container.get(part) is None:
                container[part] = {}
                source.places[path] = f"--{key}"
            container = container[step]


def _item(items: list[Any], part: str) -> int | None:
    """The index that a number, a reward's label or name, or a stage's method means."""
    if part.isdigit():
        return int(part) if int(part) < len(items) else None
    for key in ("label", "name", "method"):
        found = [
            i for i, item in enumerate(items) if isinstance(item, dict) and item.get(key) == part
        ]
        if len(found) == 1:
            return found[0]
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
        node = yaml.compose(text, Loader=_Yaml12)
    except yaml.YAMLError as error:
        if text.startswith(("[", "{")):
            source.problems.append(
                source.problem(path, f"{text!r} is not valid YAML: {error}".splitlines()[0])
            )
        return text
    if isinstance(node, yaml.CollectionNode) and node.flow_style:
        inner = RecipeSource(source.path)
        value = _plain(node, (), inner)
        source.problems += inner.problems
        return value
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value == text:
        return _scalar(node, path, source)
    if isinstance(node, yaml.ScalarNode) and node.style in ("'", '"'):
        return node.value
    return text
