"""What a run wrote down as it went: status.json and metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError
from grace_rl.run.files import write_text


def read_status(path: str | Path) -> dict[str, Any] | None:
    """The content of a run's status.json; `None` where there is no run."""
    try:
        status = json.loads((Path(path) / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(status, dict) and status.get("status") in ("starting", "running", "finished")
    return status if known and "grace_rl" in status else None


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The logged steps so far; a line that is still being written is left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: no metrics.jsonl; is this a run directory?")
    return [
        json.loads(line)
        for line in path.read_text(encoding="utf-8").splitlines(True)
        if line.endswith("\n")
    ]


def cut_metrics(path: Path, step: int) -> None:
    """Remove every line of a later step, and a half-written last line."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))
