"""The run directory: what a run leaves on the disk, and when it may start, resume or overwrite.

    status.json         starting, running or finished; the summary of the training
    recipe.yaml         the resolved recipe
    inputs.json         digests of what the run began with: rows, start weights, guides
    prompt.json         what stands before and after a text in each prompt of the run
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

import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from grace_rl.errors import UserError
from grace_rl.run.checkpoints import (
    checkpoint_step,
    last_complete_checkpoint,
    list_checkpoints,
    remove_incomplete_checkpoints,
)
from grace_rl.run.environment import describe_environment, now
from grace_rl.run.files import (
    folder_lock,
    plain_numbers,
    recover_folder,
    remove_unfinished,
    replace_folder,
    write_json,
    write_text,
)
from grace_rl.run.recipe_differences import differences, may_change
from grace_rl.run.records import (
    cut_metrics,
    cut_rollouts,
    read_prompts,
    read_recipe,
    read_record,
    read_status,
    rollout_files,
)
from grace_rl.run.secrets import masked
from grace_rl.run.versions import own_version


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
        self._lock: FileLock | None = None

    @property
    def is_main_process(self) -> bool:
        return self.processes is None or bool(self.processes.is_main_process)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs.json"

    @property
    def prompt(self) -> Path:
        return self.path / "prompt.json"

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
        self,
        recipe: Mapping[str, Any],
        *,
        inputs: Callable[[], Mapping[str, str]] = dict,
        overwrite: bool = False,
        seed: int | None = None,
    ) -> Opened:
        """Take the directory for this run, and say where the run begins.

        New or empty: start. Unfinished: resume, if the recipe is the same (but for
        `recipe_differences.MAY_CHANGE` and secrets, which are kept nowhere) and so are its inputs;
        what came after the last complete checkpoint is cut off. With `overwrite`: remove what an
        earlier run wrote and start.

        Args:
            recipe: The resolved recipe, in plain YAML types.
            inputs: Gives the digests of the run's inputs by key (`grace_rl.run.identity`); called
                on the main process only.
            overwrite: Whether an earlier run here, finished or not, may be removed. Files that no
                run wrote stay.
            seed: Goes into environment.json.

        Raises:
            UserError: The directory holds a finished run, a run of another recipe or of other
                inputs, something that is no run or damaged, or another process is training in it.
        """
        # Its YAML form: so that tuples and the like compare equal to what the file holds.
        plain = yaml.safe_load(_dump(masked(recipe)))
        return self.on_main(lambda: self._open(plain, dict(inputs()), overwrite, seed))

    def _open(
        self, recipe: dict[str, Any], inputs: dict[str, str], overwrite: bool, seed: int | None
    ) -> Opened:
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
                return self._start(recipe, inputs, seed)
            if kind == "finished":
                raise UserError(
                    f"{self.path}: holds a finished run; "
                    "choose another --output_dir, or give --overwrite to replace it"
                )
            return self._resume(recipe, inputs, seed)
        except BaseException:
            self.close()
            raise

    def _start(self, recipe: dict[str, Any], inputs: dict[str, str], seed: int | None) -> Opened:
        self._write_status({"status": "starting"})  # killed in here, the directory counts as empty
        self._remove_run()
        self.rollouts.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_text(self.recipe, _dump(recipe))
        write_json(self.inputs, inputs)
        write_json(self.environment, describe_environment(self._world_size, seed))
        self.metrics.touch()
        self._write_status({"status": "running"})
        return Opened("start", None, 0)

    def _resume(self, recipe: dict[str, Any], inputs: dict[str, str], seed: int | None) -> Opened:
        kept = read_recipe(self.path)
        advice = "repair it, or give --overwrite to begin anew"
        try:
            environment = read_record(self.environment, advice)
        except FileNotFoundError:  # only a record
            environment = {}
        try:
            began_with = read_record(self.inputs, advice)
        except FileNotFoundError as error:
            raise UserError(f"{self.inputs}: is missing; {advice}") from error
        different = differences(kept, recipe)
        different += [
            f"{key}: its content is not what the run began with"
            for key in began_with
            if began_with[key] != inputs.get(key)
            and not may_change(key)
            and kept.get(key) == recipe.get(key)
        ]
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
        resumed = environment.get("resumed")
        again = {"from_step": step, **describe_environment(self._world_size, seed)}
        environment["resumed"] = [*(resumed if isinstance(resumed, list) else ()), again]
        write_json(self.environment, environment)
        write_text(self.recipe, _dump(recipe))
        self._write_status(read_status(self.path) or {"status": "running"})  # with the new owner
        return Opened("resume", checkpoint, step)

    def _holds_other_things(self) -> bool:
        """Anything but what a run killed in its first moments leaves."""
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        return any(
            name != ".lock" and not fnmatchcase(name, ".status.json.*.writing") for name in names
        )

    def _recover(self) -> None:
        """Finish or undo what a killed process was doing."""
        recover_folder(self.model)
        for folder in (self.path, self.rollouts):
            remove_unfinished(folder)

    def _remove_run(self) -> None:
        records = (self.recipe, self.inputs, self.prompt, self.environment, self.metrics)
        for path in (*records, self.evaluation):
            path.unlink(missing_ok=True)
        for path in rollout_files(self.path).values():
            path.unlink()
        folders = [*list_checkpoints(self.checkpoints), self.model]
        for folder in [path for path in folders if path.is_dir()]:
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
        for path in self.path.glob("traceback-*.txt"):
            path.unlink()
        for name in ("completions", "runs"):  # log_completions, TensorBoard
            shutil.rmtree(self.checkpoints / name, ignore_errors=True)
        shutil.rmtree(self.path / "stages", ignore_errors=True)

    # -- the lock ---------------------------------

    def _take_lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        owner = (read_status(self.path) or {}).get("owner", "another process")
        lock = folder_lock(self.path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{self.path}: {owner} is training in this directory; choose another --output_dir"
            ) from None
        self._lock = lock

    def close(self) -> None:
        """Give the directory back; may be called more than once."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def saved(self) -> str:
        """What a run that ends now keeps, and how to go on; a sentence without its full stop."""
        last = last_complete_checkpoint(self.checkpoints)
        kept = f"{last.name} is saved" if last else "no checkpoint is saved yet"
        return f"{kept}; the same command goes on in {self.path}"

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
            recover_folder(self.model)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()

        def swap() -> None:
            replace_folder(unfinished, self.model)
            status = read_status(self.path) or {}
            self._write_status({**status, "status": "finished", "finished": now()})

        self.on_main(clear)
        write(unfinished)
        if self.processes is not None:
            self.processes.wait_for_everyone()
        self.on_main(swap)

    # -- within ---------------------------------

    def keep_prompts(self, now: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
        """What stands before and after a text, for each prompt: as the run began with it.

        A chat template may print the date, and a run that resumes tomorrow goes on as today.

        Args:
            now: Prompt -> as the template renders it now; kept by a run that begins.

        Raises:
            UserError: What was kept is damaged.
        """

        def kept() -> dict[str, tuple[str, str]]:
            try:
                return read_prompts(self.prompt, now, "give --overwrite to begin anew")
            except FileNotFoundError:
                write_json(self.prompt, now)
                return dict(now)

        pinned: dict[str, tuple[str, str]] = self.on_main(kept)
        return pinned

    @property
    def _world_size(self) -> int:
        return 1 if self.processes is None else int(self.processes.num_processes)

    def _write_status(self, status: Mapping[str, Any]) -> None:
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        kept = {**status, "grace_rl": own_version(), "owner": owner}
        write_json(self.path / "status.json", kept)

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
