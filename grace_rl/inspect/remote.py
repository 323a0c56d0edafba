"""Runs elsewhere: what is looked at of a run at an address of fsspec (`s3://`, `sftp://`, ...) is
copied to a temporary folder, and again when it changes. Nothing is written there, models stay.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grace_rl.data.files import file_system, is_address
from grace_rl.errors import UserError, first_line
from grace_rl.inspect.run import Run
from grace_rl.rollout.store import rollout_files
from grace_rl.run.records import read_status

RECORDS = ("status.json", "recipe.yaml", "metrics.jsonl", "evaluation.json", "soft_tokens.jsonl")
FOLDERS = ("rollouts", "panel", "replays")
NAME = re.compile(r"[\w.-]+\.parquet")
LOOK_AGAIN = 10.0  # seconds between looks at a remote folder


class RemoteRun(Run):
    """A run at an address of fsspec, read only.

    Args:
        address: Such as `s3://bucket/runs/quickstart`. Credentials are those of fsspec's own ways.

    Raises:
        UserError: It cannot be reached, or holds no run.
    """

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        self._folder = tempfile.TemporaryDirectory(prefix="grace-rl-")
        self._known: dict[str, Any] = {}
        self._copying = threading.Lock()
        self._copied = -LOOK_AGAIN
        self._copy()
        super().__init__(Path(self._folder.name))
        self.name = self._address.rpartition("/")[2]

    @property
    def beside(self) -> Path:
        """What looking leaves: in the working directory, since the run is only read."""
        return Path.cwd() / f"{self.name}.inspect"

    def stamp(self) -> tuple[float, int]:
        with contextlib.suppress(UserError):  # what was copied is still shown
            self._copy()
        return super().stamp()

    def _copy(self) -> None:
        with self._copying:
            if time.monotonic() - self._copied < LOOK_AGAIN:
                return
            self._copied = time.monotonic()
            system, root = file_system(self._address)
            try:
                found = dict(_found(system, root))
                for name, (path, version) in found.items():
                    if self._known.get(name) != version:
                        self._fetch(system, path, name)
                        self._known[name] = version
                for name in set(self._known) - set(found):
                    (Path(self._folder.name) / name).unlink(missing_ok=True)
                    del self._known[name]
            except Exception as error:  # each file system has its own kinds
                problem = f"{self._address}: cannot be read: {first_line(error)[:200]}"
                raise UserError(problem) from error

    def _fetch(self, system: Any, path: str, name: str) -> None:
        target = Path(self._folder.name) / name
        target.parent.mkdir(exist_ok=True)
        unfinished = target.with_name(f".{target.name}")
        system.get_file(path, str(unfinished))
        os.replace(unfinished, target)


def open_runs(paths: Sequence[str]) -> list[Run]:
    """Runs, those in folders of runs, and those at addresses, in this order.

    Raises:
        UserError: There is no run, all such paths together; or one is given twice.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for path in paths:
        try:
            runs += [RemoteRun(path)] if is_address(path) else map(Run, _inside(Path(path)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    _distinct_names(runs)
    return runs


def _distinct_names(runs: Sequence[Run]) -> None:
    """Tell runs of one folder name apart by their paths.

    Raises:
        UserError: The same run twice.
    """
    paths = [run.path.resolve() for run in runs]
    if twice := {str(path) for path in paths if paths.count(path) > 1}:
        raise UserError([f"{path}: given twice" for path in sorted(twice)])
    for parts in range(2, max(len(path.parts) for path in paths) + 1):
        names = [run.name for run in runs]
        for run, path in zip(runs, paths, strict=True):
            if names.count(run.name) > 1:
                run.name = str(Path(*path.parts[-parts:]))


def _inside(path: Path) -> list[Path]:
    """The path itself, or the runs in it, the one that was written last first."""
    if not path.is_dir() or _is_run(path):
        return [path]
    found = [folder for folder in path.iterdir() if folder.is_dir() and _is_run(folder)]
    return sorted(found, key=lambda folder: -folder.stat().st_mtime) or [path]


def _is_run(path: Path) -> bool:
    return read_status(path) is not None or bool(rollout_files(path))


def _found(system: Any, root: str) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Each file that is looked at: its name in the run -> its path, and what changes with it."""
    system.invalidate_cache()
    for folder in ("", *FOLDERS):
        try:
            listed = system.ls(f"{root}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            if folder:
                continue
            raise
        for entry in listed:
            name = str(entry["name"]).rpartition("/")[2]
            if name in RECORDS if not folder else NAME.fullmatch(name):
                times = [entry.get(key) for key in ("ETag", "mtime", "created", "LastModified")]
                version = (entry.get("size"), *map(str, times))
                yield (f"{folder}/{name}" if folder else name), (entry["name"], version)
