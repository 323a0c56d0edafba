"""What a run wrote down: status.json, recipe.yaml, metrics.jsonl, and the steps of its rollouts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from grace_rl.errors import UserError, first_line
from grace_rl.run.files import write_text

_ROLLOUTS = re.compile(r"step-(\d+)\.parquet")


def read_status(path: str | Path) -> dict[str, Any] | None:
    """The content of a run's status.json; `None` where there is no run."""
    try:
        status = json.loads((Path(path) / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(status, dict) and status.get("status") in ("starting", "running", "finished")
    return status if known and "grace_rl" in status else None


def read_record(path: Path, advice: str) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Args:
        path: The file.
        advice: What to do if it is damaged.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: is damaged and cannot be read ({reason}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged: it holds no mapping; {advice}")
    return content


def read_prompts(path: Path, names: Iterable[str], advice: str) -> dict[str, tuple[str, str]]:
    """What stands before and after a text in each prompt that a run keeps.

    Args:
        path: The file.
        names: Of the prompts that are asked for.
        advice: What to do if it is damaged.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is damaged, or does not have one of them.
    """
    found = read_record(path, advice)
    prompts = {}
    for name in names:
        told = found.get(name)
        if not (isinstance(told, list) and [type(one) for one in told] == [str, str]):
            raise UserError(f"{path}: has no two texts for the prompt {name!r}; {advice}")
        prompts[name] = (told[0], told[1])
    return prompts


def read_recipe(run: str | Path) -> dict[str, Any]:
    """The resolved recipe that a run keeps, secrets masked; nothing is checked or built.

    Raises:
        UserError: It is missing or damaged.
    """
    path = Path(run) / "recipe.yaml"
    advice = "so the run cannot go on; repair it, or give --overwrite to begin anew"
    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing, {advice}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}), {advice}") from error
    if not isinstance(kept, dict):
        raise UserError(f"{path}: cannot be read (it holds no mapping), {advice}")
    return kept


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The logged steps so far; a line that is still being written is left out.

    Raises:
        UserError: There is no such file, or a line of it is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: no metrics.jsonl; is this a run directory?")
    return [logged for _, logged in _logged(path)]


def cut_metrics(path: Path, step: int) -> None:
    """Remove every line of a later step, and a half-written last line.

    Raises:
        UserError: A line is damaged.
    """
    lines = _logged(path) if path.is_file() else ()
    write_text(path, "".join(line for line, logged in lines if logged["step"] <= step))


def step_file(run: str | Path, step: int, kind: str = "rollouts") -> Path:
    """Where what belongs to a step lies, as `rollout_files` finds it.

    >>> step_file("run", 20).as_posix()
    'run/rollouts/step-000020.parquet'
    """
    return Path(run) / kind / f"step-{step:06d}.parquet"


def rollout_files(run: str | Path, kind: str = "rollouts") -> dict[int, Path]:
    """The complete files of a run's rollouts (or of its `panel`), by step in rising order.

    Raises:
        UserError: The run directory does not exist.
    """
    if not Path(run).is_dir():
        raise UserError(f"{run}: no such run directory")
    files = (
        (_ROLLOUTS.fullmatch(path.name), path) for path in (Path(run) / kind).glob("step-*.parquet")
    )
    return dict(sorted((int(match[1]), path) for match, path in files if match))


def cut_rollouts(run: str | Path, step: int) -> None:
    """Remove the files of all steps after `step`: a run that resumes there writes them again."""
    for kind in ("rollouts", "panel"):
        for number, path in rollout_files(run, kind).items():
            if number > step:
                path.unlink()


def _logged(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line with its content."""
    for number, raw in enumerate(path.read_bytes().splitlines(True), start=1):
        if not raw.endswith(b"\n"):
            return
        try:
            line = raw.decode("utf-8")
            logged = json.loads(line)
            numbers = [logged[name] for name in ("step", "seconds")]
            if any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
                raise TypeError("step and seconds must be numbers")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = first_line(error)
            message = f"{path}:{number}: the line is damaged ({reason}); repair or remove it"
            raise UserError(message) from error
        yield line, logged
