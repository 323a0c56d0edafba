"""Checkpoints that a kill at any moment cannot spoil.

transformers writes `checkpoint-N/` in place and deletes old ones in the same call: killed there, a
run would resume from half a checkpoint. Here a checkpoint counts only with its `COMPLETE` marker,
written last, which lists every file and its size; older ones are deleted after that.

Nothing in a checkpoint is a pickle that runs code: optimizer, scheduler and random states are
loaded by transformers with `weights_only=True`, and its `training_args.bin` is taken out. DeepSpeed
loads its own shards without that guard.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from grace_rl.run.files import sync_tree, write_text

COMPLETE = "COMPLETE"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: Path) -> None:
    """Bring all files to the disk, then write the marker that lists them."""
    (folder / COMPLETE).unlink(missing_ok=True)
    sync_tree(folder)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_text(folder / COMPLETE, json.dumps({"files": files}, indent=1) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether the marker is there, and every file that it lists with its size."""
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def checkpoint_step(folder: Path) -> int:
    """The step in the folder's name.

    >>> checkpoint_step(Path("checkpoints/checkpoint-30"))
    30
    """
    match = _FOLDER.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder}: not a checkpoint's name")
    return int(match[1])


def list_checkpoints(folder: str | Path) -> list[Path]:
    """All `checkpoint-N` folders, complete or not, by rising step."""
    found = [
        path
        for path in Path(folder).glob("checkpoint-*")
        if _FOLDER.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=checkpoint_step)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the highest step; nothing is changed."""
    return next((path for path in reversed(list_checkpoints(folder)) if is_complete(path)), None)


def remove_incomplete_checkpoints(folder: str | Path) -> None:
    """Delete what a killed process left half written or half deleted.

    Only for the one process that owns the folder.
    """
    for path in list_checkpoints(folder):
        if not is_complete(path):
            shutil.rmtree(path)


def rotate_checkpoints(folder: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest complete checkpoints until `limit` are left; `None` or 0 keeps all.

    The newest and the best one always stay.
    """
    complete = [path for path in list_checkpoints(folder) if is_complete(path)]
    left = len(complete)
    for path in complete[:-1]:
        if not limit or left <= limit:
            return
        if best is None or path.name != Path(best).name:
            shutil.rmtree(path)
            left -= 1
