"""Files that appear whole or not at all: write beside, fsync, rename.

Names that start with a dot and end with `.writing` are unfinished; readers ignore them, and what a
killed process left of them may be removed by whoever holds the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError

UNFINISHED = ".*.writing"  # glob pattern


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends, and goes if the block raises.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "scores.txt"
    >>> with whole_file(target) as unfinished:
    ...     _ = unfinished.write_text("0.4")
    ...     target.exists()
    False
    >>> target.read_text()
    '0.4'
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def held(folder: Path, wait: bool = False) -> Iterator[None]:
    """Only one process at a time works in the folder; the lock goes with the process.

    Raises:
        UserError: Another process works there, and we do not `wait` for its end.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is working on this output") from error
        yield


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text` (UTF-8), whole."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, whole; numbers that JSON does not have become null."""
    write_text(
        path, json.dumps(plain_numbers(content), indent=2, ensure_ascii=False, default=str) + "\n"
    )


def digest(content: Any) -> str:
    """16 hexadecimal digits that stand for plain data.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    told = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def plain_numbers(value: Any) -> Any:
    """Tensor and numpy scalars as Python numbers, NaN and infinities as None, at any depth.

    >>> plain_numbers({"loss": float("nan"), "reward": [0.5, float("inf")]})
    {'loss': None, 'reward': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and numpy
        return plain_numbers(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for a folder and everything in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))
