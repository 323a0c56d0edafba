"""The run directory: what a run leaves on the disk, and when it may start, resume or overwrite.

    status.json         starting, running or finished; the summary of the training
    recipe.yaml         the resolved recipe
    environment.json    versions, machine, code, command; under `resumed`, one entry per resumption
    metrics.jsonl       one object per logged step
    rollouts/           step-000010.parquet, ... (grace_rl.rollout.store)
    checkpoints/        checkpoint-100/, ... (grace_rl.run.checkpoints)
    model/              the trained policy, once the run is finished
    evaluation.json

Files appear whole or not at all, metrics line by line. A kill at any moment loses the work since
the last complete checkpoint and nothing else: everything logged after that checkpoint is cut off
when the run resumes, and made again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from grace_rl.errors import UserError
from grace_rl.rollout.store import cut_rollouts, rollout_files
from grace_rl.run.checkpoints import (
    checkpoint_step,
    last_complete_checkpoint,
    list_checkpoints,
    remove_incomplete_checkpoints,
)
from grace_rl.run.environment import describe_environment, now, version
from grace_rl.run.files import UNFINISHED, plain_numbers, sync, sync_tree, write_json, write_text
from grace_rl.run.recipe_differences import differences
from grace_rl.run.records import cut_metrics, read_status


@dataclass(frozen=True)
class Opened:
    """How a run begins.

    Attributes:
        action: `start` from the model that the recipe names, or `resume`.
        checkpoint: What to resume from; `None` on a start, or when the run was cut off before its
            first checkpoint.
        step: Optimizer steps already done.
    """

    action: Literal["start", "resume"]
    checkpoint: Path | None
    step: int


class RunDirectory:
    """One run's directory.

    Only the main process reads and writes here; with several processes every method must be called
    by all of them, and the others wait and get the main process's answer, or its error.

    Args:
        path: The directory; it need not exist.
        processes: `accelerate.PartialState()` (or an accelerator's `state`) when there may be
            several processes.
    """

    def __init__(self, path: str | Path, processes: Any = None) -> None:
        self.path = Path(path)
        self.processes = processes
        self._lock: int | None = None

    @property
    def is_main_process(self) -> bool:
        return self.processes is None or bool(self.processes.is_main_process)

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """The trainer's `output_dir`."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    # -- opening ---------------------------------

    def open(
        self, recipe: Mapping[str, Any], *, overwrite: bool = False, seed: int | None = None
    ) -> Opened:
        """Take the directory for this run, and say where the run begins.

        New or empty: start. Unfinished: resume, if the recipe is the same (but for
        `recipe_differences.MAY_CHANGE`); what came after the last complete checkpoint is cut off.
        With `overwrite`: remove what an earlier run wrote and start.

        Args:
            recipe: The resolved recipe, in plain YAML types.
            overwrite: Whether an earlier run here, finished or not, may be removed. Files that no
                run wrote stay.
            seed: Goes into environment.json.

        Raises:
            UserError: The directory holds a finished run, a run of another recipe, something that
                is no run, or another process is training in it.
        """
        # Its YAML form: so that tuples and the like compare equal to what the file holds.
        plain = yaml.safe_load(_dump(recipe))
        return self.on_main(lambda: self._open(plain, overwrite, seed))

    def _open(self, recipe: dict[str, Any], overwrite: bool, seed: int | None) -> Opened:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; give --output_dir a new directory")
        status = read_status(self.path)
        if status is None and self._holds_other_things():
            raise UserError(
                f"{self.path}: the directory is not empty and holds no run of grace-rl; "
                "give --output_dir a new one"
            )
        self._take_lock()
        try:
            self._recover()
            # Read again: another process may have finished while this one came here.
            status = read_status(self.path)
            kind = status and status["status"]
            if overwrite or kind in (None, "starting"):
                return self._start(recipe, seed)
            if kind == "finished":
                raise UserError(
                    f"{self.path}: holds a finished run; "
                    "choose another --output_dir, or give --overwrite to replace it"
                )
            return self._resume(recipe, seed)
        except BaseException:
            self.close()
            raise

    def _start(self, recipe: dict[str, Any], seed: int | None) -> Opened:
        self._write_status({"status": "starting"})  # killed in here, the directory counts as empty
        self._remove_run()
        self.rollouts.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_text(self.recipe, _dump(recipe))
        write_json(self.environment, describe_environment(self._world_size, seed))
        self.metrics.touch()
        self._write_status({"status": "running"})
        return Opened("start", None, 0)

    def _resume(self, recipe: dict[str, Any], seed: int | None) -> Opened:
        if not self.recipe.is_file():
            raise UserError(
                f"{self.path}: recipe.yaml is missing, so the run cannot be resumed; "
                "give --overwrite"
            )
        try:
            kept = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
            environment = json.loads(self.environment.read_text(encoding="utf-8"))
        except FileNotFoundError:
            environment = {}
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{self.path}: recipe.yaml or environment.json cannot be read, so the run cannot "
                f"be resumed ({str(error).splitlines()[0]}); repair it, or give --overwrite"
            ) from error
        different = differences(kept, recipe)
        if different:
            raise UserError(
                [
                    f"{self.path}: holds an unfinished run of another recipe; set these back to "
                    "resume it, choose another --output_dir, or give --overwrite to replace it:",
                    *different,
                ]
            )
        remove_incomplete_checkpoints(self.checkpoints)
        checkpoint = last_complete_checkpoint(self.checkpoints)
        step = checkpoint_step(checkpoint) if checkpoint else 0
        cut_metrics(self.metrics, step)
        cut_rollouts(self.path, step)
        environment.setdefault("resumed", []).append(
            {"from_step": step, **describe_environment(self._world_size, seed)}
        )
        write_json(self.environment, environment)
        write_text(self.recipe, _dump(recipe))
        return Opened("resume", checkpoint, step)

    def _holds_other_things(self) -> bool:
        """Anything but what a run killed in its first moments leaves."""
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        return any(
            name != ".lock" and not fnmatchcase(name, ".status.json.*.writing") for name in names
        )

    def _recover(self) -> None:
        """Finish or undo what a killed process was doing."""
        self._recover_model()
        for folder in (self.path, self.rollouts):
            for left in folder.glob(UNFINISHED):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _recover_model(self) -> None:
        replaced = self.path / ".model.replaced"
        if replaced.exists() and not self.model.exists():
            replaced.rename(self.model)
        elif replaced.exists():
            shutil.rmtree(replaced)

    def _remove_run(self) -> None:
        for path in (self.recipe, self.environment, self.metrics, self.evaluation):
            path.unlink(missing_ok=True)
        for path in rollout_files(self.path).values():
            path.unlink()
        folders = [*list_checkpoints(self.checkpoints), self.model]
        for folder in [path for path in folders if path.is_dir()]:
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
        (self.checkpoints / "README.md").unlink(missing_ok=True)  # TRL's model card
        for name in ("completions", "runs"):  # log_completions, TensorBoard
            shutil.rmtree(self.checkpoints / name, ignore_errors=True)
        shutil.rmtree(self.path / "stages", ignore_errors=True)

    # -- the lock ---------------------------------

    def _take_lock(self) -> None:
        """A record lock: it ends with the process, however that dies; forks do not inherit it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(lock, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(lock)
            raise UserError(
                f"{self.path}: {owner} is training in this directory; choose another --output_dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock = lock

    def close(self) -> None:
        """Give the directory back; may be called more than once."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- ending ---------------------------------

    def record_summary(self, summary: Mapping[str, Any]) -> None:
        """Main process: keep transformers' closing figures (`train_loss`, ...) in status.json."""
        status = read_status(self.path) or {"status": "running"}
        self._write_status({**status, "summary": plain_numbers(summary)})

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Write evaluation.json."""
        self.on_main(lambda: write_json(self.evaluation, evaluation))

    def publish_model(self, write: Callable[[Path], None]) -> None:
        """Write the trained policy to `model/`, whole, and mark the run finished.

        Args:
            write: Called with a new folder on every process (ZeRO-3 gathers its shards), for
                example `lambda folder: trainer.save_model(str(folder))`.
        """
        unfinished = self.path / ".model.writing"

        def clear() -> None:
            self._recover_model()
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()

        def swap() -> None:
            sync_tree(unfinished)
            replaced = self.path / ".model.replaced"
            if self.model.exists():
                self.model.rename(replaced)
            unfinished.rename(self.model)
            sync(self.path)
            shutil.rmtree(replaced, ignore_errors=True)
            status = read_status(self.path) or {}
            self._write_status({**status, "status": "finished", "finished": now()})

        self.on_main(clear)
        write(unfinished)
        if self.processes is not None:
            self.processes.wait_for_everyone()
        self.on_main(swap)

    # -- within ---------------------------------

    @property
    def _world_size(self) -> int:
        return 1 if self.processes is None else int(self.processes.num_processes)

    def _write_status(self, status: Mapping[str, Any]) -> None:
        write_json(self.status_file, {"grace_rl": version("grace-rl"), **status})

    def on_main(self, action: Callable[[], Any]) -> Any:
        """What only the main process does, and every process gets: the result, or the `UserError`.

        Args:
            action: Called on the main process; its result must be picklable.
        """
        result, problems = None, None
        if self.is_main_process:
            try:
                result = action()
            except UserError as error:
                problems = error.problems
            except OSError as error:  # no permission, no space, ...
                problems = [str(error)]
        if self._world_size > 1:
            from accelerate.utils import broadcast_object_list

            result, problems = broadcast_object_list([result, problems])
        if problems:
            raise UserError(problems)
        return result


def _dump(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=120)
