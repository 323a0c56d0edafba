"""The rooms of docs/architecture.md: arrows go down only, there is no circle, doors are listed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "grace_rl"
# A room may import from its own line and from those below; rooms of one line form no circle.
LAYERS = (
    ("__main__", "__init__", "cli", "commands"),
    ("train", "curate", "evaluate", "inspect", "launch"),
    ("credit", "reward", "embed"),
    ("rollout",),
    ("data",),
    ("recipe", "plugins", "run"),
    ("errors",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
LAZY_AT_MOST = 40  # outside the commands; each is a door: vLLM, DeepSpeed, an extra, a method


class Import(NamedTuple):
    importer: str  # module, without grace_rl
    module: str
    line: int
    lazy: bool


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    """Every import of ours in the package; those for type checkers only are none."""
    return tuple(_imports())


def _imports() -> Iterator[Import]:
    known = modules()
    for importer, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        types_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        lazy = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            names: list[str] = []
            if id(node) in types_only:
                continue
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [
                    name if name.removeprefix("grace_rl.") in known else node.module
                    for name in inside
                ]
            for name in dict.fromkeys(names):
                if name.startswith("grace_rl."):
                    module = name.removeprefix("grace_rl.")
                    yield Import(importer, module, node.lineno, id(node) in lazy)


def test_the_path_from_a_recipe_to_an_advantage_is_as_told() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    stops = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
    assert 0 < len(stops) <= 12
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", "\n".join(stops)):
        body = ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            (body,) = [n.body for n in body if part == getattr(n, "name", None)]


def room(module: str) -> str:
    return module.partition(".")[0]


def test_arrows_go_down() -> None:
    assert {room(name) for name in modules()} <= set(LEVEL)
    upward = [
        f"{one.importer}:{one.line} -> {one.module}"
        for one in imports()
        if LEVEL[room(one.module)] < LEVEL[room(one.importer)]
    ]
    assert upward == []


def test_no_circle_of_modules_or_of_rooms() -> None:
    """Lazy imports count as well."""
    for name_of in (str, room):
        graph: dict[str, set[str]] = {}
        for one in imports():
            importer, imported = name_of(one.importer), name_of(one.module)
            if importer != imported and LEVEL[room(one.importer)] > 0:
                graph.setdefault(importer, set()).add(imported)
        TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_lazy_imports_are_few() -> None:
    lazy = [
        f"{one.importer}:{one.line} -> {one.module}"
        for one in imports()
        if one.lazy and LEVEL[room(one.importer)] > 0
    ]
    assert len(lazy) <= LAZY_AT_MOST, lazy


def test_shipped_rewards_are_found_not_imported() -> None:
    for path in modules().values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_once = {ast.unparse(node) for node in tree.body}
        assert not any("grace_rl_rewards" in line for line in at_once if "import" in line[:7])


def test_names_for_type_checkers_are_used_by_them_only() -> None:
    """A linter takes such an import for the real one; at run time it is a NameError."""
    wrong = []
    for path in modules().values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        branches = [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n)]
        inside = {id(inner) for branch in branches for inner in ast.walk(branch)}
        imported = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
        known = {
            alias.asname or alias.name
            for node in imported
            if id(node) not in inside
            for alias in node.names
        }
        known |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        typed = {
            alias.asname or alias.name
            for node in imported
            if id(node) in inside
            for alias in node.names
        } - known
        hints = [getattr(n, "annotation", None) or getattr(n, "returns", None) for n in nodes]
        notes = {id(inner) for hint in hints if hint for inner in ast.walk(hint)}
        wrong += [
            f"{path.name}:{node.lineno}: {node.id}"
            for node in nodes
            if isinstance(node, ast.Name)
            and node.id in typed
            and id(node) not in notes
            and id(node) not in inside
        ]
    assert wrong == []
