"""What something is, by its content: the one mechanism wherever work is continued or compared.

A path, a size or a date does not tell whether an input is still the one that a run began with; its
bytes do. Nothing is remembered between calls: a digest is always of what lies there now.

Training keeps the digests of its inputs in `inputs.json`; `embed`, `curate`, `compare` and
`evaluate` keep them with their own notes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ABSENT = "absent"
CODE = (".py",)
"""Endings of files that are code: a run may go on with a mended reward."""


def digest(content: Any) -> str:
    """16 hexadecimal digits that stand for plain data; the order of a mapping's keys is no part.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    told = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def rows_digest(rows: Iterable[Any]) -> str:
    """32 hexadecimal digits for rows (plain data) in their order; constant memory.

    >>> rows_digest([{"text": "a"}, {"text": "b"}]) == rows_digest([{"text": "b"}, {"text": "a"}])
    False
    """
    whole = hashlib.blake2b(digest_size=16)
    for row in rows:
        told = json.dumps(row, sort_keys=True, default=str).encode()
        whole.update(len(told).to_bytes(8, "big") + told)
    return whole.hexdigest()


def file_digest(path: str | Path) -> str:
    """32 hexadecimal digits for a file's bytes.

    Raises:
        OSError: There is no such file, or it cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, _hash).hexdigest()


def folder_digest(path: str | Path, patterns: Sequence[str] = ("**/*",)) -> str:
    """32 hexadecimal digits for the names and bytes of a folder's files.

    Args:
        path: The folder.
        patterns: Which files count (globs below the folder). Hidden ones never do: locks,
            unfinished files and what a file manager leaves.

    Raises:
        OSError: A file cannot be read.
    """
    folder = Path(path)
    files = {found for pattern in patterns for found in folder.glob(pattern) if found.is_file()}
    whole = _hash()
    for file in sorted(files):
        name = file.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            whole.update(name.as_posix().encode("utf-8", "surrogateescape") + b"\0")
            whole.update(file_digest(file).encode())
    return whole.hexdigest()


def path_digest(path: str | Path) -> str:
    """`file_digest`, `folder_digest`, or `absent` where nothing lies."""
    path = Path(path)
    if path.is_dir():
        return folder_digest(path)
    return file_digest(path) if path.is_file() else ABSENT


def input_digests(
    recipe: Mapping[str, Any], skip: Callable[[str], bool] = lambda key: False
) -> dict[str, str]:
    """Key -> digest for each value of a recipe that names a local file or model folder.

    Code (`file.py:Name`) is no input. A folder counts if it holds a model.

    Args:
        recipe: In plain YAML types, at any depth.
        skip: Whether a dotted key names no input, such as `output_dir`.
    """
    return {
        key: path_digest(value)
        for key, value in _leaves(recipe)
        if isinstance(value, str) and not skip(key) and _is_input(value)
    }


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names that are not the same in two mappings of digests, in the order of the first."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _is_input(value: str) -> bool:
    path = Path(value)
    try:
        if path.is_dir():
            return any((path / name).is_file() for name in ("config.json", "modules.json"))
        return path.suffix not in CODE and path.is_file()
    except (OSError, ValueError):  # longer than a name may be, or with a zero byte in it
        return False


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree, start=1)
    else:
        yield prefix, tree
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
