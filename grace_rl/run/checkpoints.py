"""Checkpoints that a kill at any moment cannot spoil.

transformers writes `checkpoint-N/` in place and deletes old ones in the same call: killed there, a
run would resume from half a checkpoint. Here a checkpoint counts only with its `COMPLETE` marker,
written last, which lists every file and its size; older ones are deleted after that.

Optimizer, scheduler and random states are loaded by transformers with `weights_only=True`, so a
checkpoint from elsewhere cannot run code. DeepSpeed loads its own shards without that guard.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError
from grace_rl.run.files import sync_tree, write_text

COMPLETE = "COMPLETE"
GATHER_ON_SAVE = "stage3_gather_16bit_weights_on_model_save"
_FOLDER = re.compile(r"checkpoint-(\d+)")


class CheckpointMixin:
    """Goes before a TRL trainer: `class MyTrainer(CheckpointMixin, GRPOTrainer)`.

    `save_extra_state` and `load_extra_state` let the trainer keep more than transformers does.
    """

    args: Any
    state: Any
    control: Any
    accelerator: Any
    _saved_step = -1

    def create_accelerator_and_postprocess(self) -> None:
        from grace_rl.run.processes import part_at_exit  # here: it needs torch

        part_at_exit()  # a trainer in a program of the user's own has not been through `train`
        plugin = getattr(self.args, "deepspeed_plugin", None)
        if plugin is not None:  # else ZeRO-3 writes its shards where a model is wanted
            plugin.deepspeed_config["zero_optimization"][GATHER_ON_SAVE] = True
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def save_extra_state(self, folder: Path) -> None:
        """Write further files into a checkpoint; called on the main process only."""

    def load_extra_state(self, folder: Path) -> None:
        """Read them again on resuming.

        Called on every process, after the model and before the first step.
        """

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As in transformers; `True` resumes from the last complete checkpoint.

        Raises:
            UserError: The checkpoint to resume from is incomplete, or there is none.
        """
        folder = resume_from_checkpoint or None
        if folder is True:
            folder = last_complete_checkpoint(self.args.output_dir)
            if folder is None:
                raise UserError(f"{self.args.output_dir}: no complete checkpoint to resume from")
        elif folder is not None and not is_complete(Path(folder)):
            raise UserError(
                f"{folder}: the checkpoint is incomplete "
                f"(its {COMPLETE} marker does not match its files)"
            )
        folder = folder and str(folder)
        return super().train(folder, trial, ignore_keys_for_eval)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        # Stopping at the end of an epoch asks twice; the second writing could only spoil the first.
        if self._saved_step == step:
            return
        limit = self.args.save_total_limit
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        # Complete only once every process has written its random state and shards.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.save_extra_state(folder)
            mark_complete(folder)
            rotate_checkpoints(folder.parent, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self._saved_step = step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step of all: transformers would train one more before it looked.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        import torch  # here, since whoever only looks at runs needs none

        if self.args.device == torch.device("cpu", 0):
            # Several processes on the CPU: transformers hands this device to torch.load, which only
            # knows plain "cpu".
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self.load_extra_state(Path(checkpoint))


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
