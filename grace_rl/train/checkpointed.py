"""Trainers whose checkpoints a kill at any moment cannot spoil (`grace_rl.run.checkpoints`)."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError

from grace_rl.errors import UserError, first_line
from grace_rl.run.checkpoints import (
    COMPLETE,
    is_complete,
    last_complete_checkpoint,
    mark_complete,
    rotate_checkpoints,
)
from grace_rl.run.processes import agree, part_at_exit
from grace_rl.run.secrets import remember

TRAINING_ARGS = "training_args.bin"
TRAINER_STATE = "trainer_state.json"
FAILED_WRITES = (OSError, SafetensorError, RuntimeError)
# What json, safetensors and torch say of files that end too early, or hold something else.
UNREADABLE = (*FAILED_WRITES, ValueError, TypeError, LookupError, EOFError)
GATHER_ON_SAVE = "stage3_gather_16bit_weights_on_model_save"
_TORCH_WRITES = re.compile("PytorchStreamWriter|file write|unexpected pos")  # of a full disk


class CheckpointMixin:
    """Goes before a TRL trainer: `class MyTrainer(CheckpointMixin, GRPOTrainer)`.

    `save_extra_state` and `load_extra_state` let the trainer keep more than transformers does.
    """

    args: Any
    model: Any
    state: Any
    control: Any
    accelerator: Any
    _saved_step = -1

    def create_accelerator_and_postprocess(self) -> None:
        part_at_exit()  # a trainer in a program of the user's own has not been through `train`
        take_token_out(self.args)
        plugin = getattr(self.args, "deepspeed_plugin", None)
        if plugin is not None:  # else ZeRO-3 writes its shards where a model is wanted
            plugin.deepspeed_config["zero_optimization"][GATHER_ON_SAVE] = True
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint has none: `grace-rl push` writes one of the whole run. TRL's would be made
        at every save, from a file that a locale without UTF-8 cannot read."""

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
            UserError: The checkpoint to resume from is incomplete, there is none, or it is of
                another number of processes and cannot be shared anew.
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
        if folder is not None:
            zero = bool(getattr(self, "is_deepspeed_enabled", False))
            check_shares(Path(folder), zero, self.accelerator.num_processes)
            with _readable(folder):
                state = (Path(folder) / TRAINER_STATE).read_text(encoding="utf-8")
                int(json.loads(state)["global_step"])
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
        problem = None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            if self.args.should_save:
                self.save_extra_state(folder)
        except FAILED_WRITES as error:
            if isinstance(error, RuntimeError) and not _TORCH_WRITES.search(str(error)):
                raise
            problem = self._not_written(folder, error)
        finally:
            self.args.save_total_limit = limit
        # Complete only once every process has written its random state and shards.
        agree(problem, self.accelerator.num_processes)
        if self.args.should_save:
            try:
                (folder / TRAINING_ARGS).unlink(missing_ok=True)
                mark_complete(folder)
                rotate_checkpoints(folder.parent, limit, self.state.best_model_checkpoint)
            except OSError as error:
                problem = self._not_written(folder, error)
        agree(problem, self.accelerator.num_processes)
        self._saved_step = step

    def _not_written(self, folder: Path, error: Exception) -> str:
        """Why, and what is left; frees what the half of it takes."""
        shutil.rmtree(folder, ignore_errors=True)
        last = last_complete_checkpoint(folder.parent)
        left = f"{last.name} is the last one" if last else "there is no earlier one"
        reason = first_line(error)
        return (
            f"{folder}: the checkpoint could not be written ({reason}); {left}: make room, and "
            "start again with the same command"
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step of all: transformers would train one more before it looked.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device == torch.device("cpu", 0):
            # Several processes on the CPU: transformers hands this device to torch.load, which only
            # knows plain "cpu".
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(None)  # type: ignore[misc]
            return
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            self.load_extra_state(Path(checkpoint))
        if self.args.should_save:  # a kill within the last rotation left one too many
            folder, best = Path(checkpoint).parent, self.state.best_model_checkpoint
            rotate_checkpoints(folder, self.args.save_total_limit, best)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        with _readable(checkpoint):
            super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _issue_warnings_after_load(self, result: Any) -> None:
        # A tied head is saved once, under its other name: nothing is missing.
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [key for key in result.missing_keys if key not in tied]
        if len(missing) < len(result.missing_keys):
            self.model.tie_weights()
        result = SimpleNamespace(missing_keys=missing, unexpected_keys=result.unexpected_keys)
        super()._issue_warnings_after_load(result)  # type: ignore[misc]


def check_shares(folder: Path, zero: bool, processes: int) -> None:
    """Whether so many processes can go on from a checkpoint.

    Without DeepSpeed there is one copy of weights and optimizer, for any number of processes;
    DeepSpeed writes a share for each process and reads as many.

    Args:
        folder: The checkpoint.
        zero: Whether DeepSpeed reads it.
        processes: How many there are now.

    Raises:
        UserError: It was shared among another number, or is not DeepSpeed's.
    """
    shares = len([*folder.glob("global_step*/*_optim_states.pt")])
    if shares and (shares != processes or not zero):
        now = f"{processes} with DeepSpeed" if zero else f"{processes} without"
        raise UserError(
            f"{folder}: DeepSpeed shared the optimizer among {shares} processes, now there are "
            f"{now}; start {shares} in the same way, or begin a run from its weights "
            "(model_name_or_path)"
        )


def take_token_out(args: Any) -> None:
    """Move `hub_token` to the environment, where the hub's client looks for it.

    transformers pickles the arguments into every checkpoint, and into what it pushes to the hub.
    """
    if getattr(args, "hub_token", None):
        remember(args.hub_token)
        os.environ["HF_TOKEN"] = args.hub_token
        args.hub_token = None


@contextmanager
def _readable(checkpoint: str | Path | None) -> Iterator[None]:
    """Turns what fails inside into a mistake of the user's: the checkpoint is damaged."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{checkpoint}: holds more than numbers, which may be code, and is not read; remove "
            "this folder to go on from the checkpoint before it"
        ) from error
    except UNREADABLE as error:
        reason = first_line(error)
        raise UserError(
            f"{checkpoint}: is damaged and cannot be read ({reason}); remove this folder to go on "
            "from the checkpoint before it"
        ) from error
