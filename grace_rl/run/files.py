"""Files that appear whole or not at all: write beside, fsync, rename.

Names that start with a dot and end with `.writing` are unfinished; readers ignore them. What a
killed process left of a file goes when that file is written again, and all that is left in a folder
may be removed by whoever holds it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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
    host = socket.gethostname()
    for left in path.parent.glob(f".{escape(path.name)}.{escape(host)}-*.writing"):
        if not _is_alive(left.name.removesuffix(".writing").rpartition("-")[2]):
            left.unlink(missing_ok=True)
    unfinished = path.with_name(f".{path.name}.{host}-{os.getpid()}.writing")
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
    lock = folder_lock(folder)
    try:
        lock.acquire(blocking=wait)
    except Timeout as error:
        raise UserError(f"{folder}: another process is working on this output") from error
    try:
        yield
    finally:
        lock.release()


def folder_lock(folder: Path) -> FileLock:
    """The lock of a folder, `.lock`: of the operating system, so that it ends with its process."""
    return FileLock(folder / ".lock", thread_local=False)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of the files and folders that they were writing.

    Only for whoever holds the folder.
    """
    for left in folder.glob(UNFINISHED):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def replace_folder(unfinished: Path, folder: Path) -> None:
    """Put a written folder where another may lie, which goes.

    After a kill within `recover_folder` gives back one of the two.
    """
    sync_tree(unfinished)
    if folder.exists():
        folder.rename(_replaced(folder))
    unfinished.rename(folder)
    sync(folder.parent)
    shutil.rmtree(_replaced(folder), ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Finish or undo a `replace_folder` that was killed."""
    if _replaced(folder).exists() and not folder.exists():
        _replaced(folder).rename(folder)
    elif _replaced(folder).exists():
        shutil.rmtree(_replaced(folder))


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text` (UTF-8), whole."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, whole; numbers that JSON does not have become null."""
    write_text(
        path, json.dumps(plain_numbers(content), indent=2, ensure_ascii=False, default=str) + "\n"
    )


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


def _is_alive(process: str) -> bool:
    """Whether this machine runs a process of that number; a number that is none is none of ours."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


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
