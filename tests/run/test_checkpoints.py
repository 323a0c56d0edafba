"""Checkpoints of a real TRL trainer: whole or unseen, resumed exactly, stopped, killed any time."""

from __future__ import annotations

import atexit
import json
import logging
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from grace_rl.errors import UserError
from grace_rl.rollout.store import read_rollouts
from grace_rl.run.checkpoints import (
    is_complete,
    last_complete_checkpoint,
    list_checkpoints,
    mark_complete,
    remove_incomplete_checkpoints,
    rotate_checkpoints,
)
from grace_rl.run.directory import RunDirectory
from grace_rl.run.processes import part_processes
from grace_rl.run.records import read_metrics, read_status
from grace_rl.train.callbacks import follow
from grace_rl.train.checkpointed import check_shares

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "train" / "tiny_training.py"


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def start(
    run: RunDirectory, *flags: str, launcher: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launcher, str(SCRIPT), str(run.path), *flags]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def make(folder: Path, *steps: int) -> list[Path]:
    made = [folder / f"checkpoint-{step}" for step in steps]
    for path in made:
        path.mkdir(parents=True)
        (path / "model.safetensors").write_text("weights")
        mark_complete(path)
    return made


# -- folders ---------------------------------


def test_half_written_and_half_deleted_checkpoints_do_not_count(tmp_path: Path) -> None:
    nine, ten, eleven, twelve = make(tmp_path, 9, 10, 11, 12)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == twelve
    (twelve / "COMPLETE").unlink()
    (eleven / "model.safetensors").unlink()
    assert last_complete_checkpoint(tmp_path) == ten
    (ten / "model.safetensors").write_text("cut")
    assert last_complete_checkpoint(tmp_path) == nine
    (nine / "COMPLETE").write_text('{"files"')
    assert last_complete_checkpoint(tmp_path) is None
    mark_complete(nine)
    remove_incomplete_checkpoints(tmp_path)
    assert list_checkpoints(tmp_path) == [nine]
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    one, two, three, four, five = make(tmp_path, 1, 2, 3, 10, 20)
    rotate_checkpoints(tmp_path, None)
    rotate_checkpoints(tmp_path, 0)
    assert len(list_checkpoints(tmp_path)) == 5
    rotate_checkpoints(tmp_path, 3, best=str(one))
    assert list_checkpoints(tmp_path) == [one, four, five]
    rotate_checkpoints(tmp_path, 1, best=str(one))
    assert list_checkpoints(tmp_path) == [one, five]
    rotate_checkpoints(tmp_path, 1)
    assert list_checkpoints(tmp_path) == [five]


# -- a real trainer ---------------------------------


def test_interrupted_and_resumed_it_ends_with_the_same_weights(
    tmp_path: Path, tiny: dict[str, Any], quiet: Console
) -> None:
    weights = {}
    cases: dict[str, list[int | None]] = {"whole": [None], "stopped": [3, 7, None]}
    for name, interruptions in cases.items():
        run = RunDirectory(tmp_path / name)
        for interrupt_at in interruptions:
            opened = run.open({})
            trainer = tiny["tiny_trainer"](run, lr_scheduler_type="constant")
            trainer.add_callback(tiny["EachStep"](run, interrupt_at=interrupt_at))
            handler = signal.getsignal(signal.SIGINT)
            with follow(trainer, run, console=quiet) as stop:
                trainer.train(resume_from_checkpoint=opened.checkpoint)
            assert signal.getsignal(signal.SIGINT) is handler
            assert stop.interrupted == (interrupt_at is not None)
            assert trainer.loaded == (f"step {opened.step}" if opened.checkpoint else None)
            last = last_complete_checkpoint(run.checkpoints)
            assert last is not None and last.name == f"checkpoint-{interrupt_at or 8}"
            assert len(list_checkpoints(run.checkpoints)) == 2
            run.close()
        assert [line["step"] for line in read_metrics(run.path)] == list(range(1, 9))
        weights[name] = load_file(run.checkpoints / "checkpoint-8" / "model.safetensors")
    for name, tensor in weights["whole"].items():
        assert torch.equal(tensor, weights["stopped"][name]), name


def test_resumed_after_its_last_step_it_trains_no_further(
    tmp_path: Path, tiny: dict[str, Any], quiet: Console
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.open({})
    tiny["tiny_trainer"](run, max_steps=3, lr_scheduler_type="constant").train()
    trainer = tiny["tiny_trainer"](run, max_steps=3, lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    saved = load_file(run.checkpoints / "checkpoint-3" / "model.safetensors")
    assert torch.equal(saved["model.norm.weight"], trainer.model.model.norm.weight)


def test_the_marker_is_last_and_lists_every_file(tmp_path: Path, tiny: dict[str, Any]) -> None:
    run = RunDirectory(tmp_path / "run")
    trainer = tiny["tiny_trainer"](run, max_steps=1, save_steps=1)
    trainer.train()
    folder = run.checkpoints / "checkpoint-1"
    listed = set(json.loads((folder / "COMPLETE").read_text())["files"])
    assert listed == {path.name for path in folder.iterdir()} - {"COMPLETE"}
    assert {
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "extra.txt",
    } <= listed
    marker = (folder / "COMPLETE").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= marker for path in folder.iterdir())


def test_an_incomplete_checkpoint_is_not_resumed(tmp_path: Path, tiny: dict[str, Any]) -> None:
    run = RunDirectory(tmp_path / "run")
    tiny["tiny_trainer"](run, max_steps=2, save_steps=1).train()
    (run.checkpoints / "checkpoint-2" / "optimizer.pt").unlink()
    trainer = tiny["tiny_trainer"](run, max_steps=2)
    with pytest.raises(UserError, match="incomplete"):
        trainer.train(resume_from_checkpoint=run.checkpoints / "checkpoint-2")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.loaded == "step 1"
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UserError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


class Attack:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code from a checkpoint ran')",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, tiny: dict[str, Any], name: str) -> None:
    run = RunDirectory(tmp_path / "run")
    tiny["tiny_trainer"](run, max_steps=1, save_steps=1).train()
    folder = run.checkpoints / "checkpoint-1"
    torch.save(Attack(), folder / name)
    mark_complete(folder)
    with pytest.raises(UserError, match="code"):
        tiny["tiny_trainer"](run, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", b"{"),
        ("trainer_state.json", b"[]"),
        ("model.safetensors", b"no weights"),
        ("optimizer.pt", b"PK no archive"),
        ("scheduler.pt", b""),
        ("rng_state.pth", b"\x80"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_with_its_folder(
    tmp_path: Path, tiny: dict[str, Any], name: str, content: bytes
) -> None:
    run = RunDirectory(tmp_path / "run")
    tiny["tiny_trainer"](run, max_steps=1, save_steps=1).train()
    folder = run.checkpoints / "checkpoint-1"
    (folder / name).write_bytes(content)
    mark_complete(folder)  # as if the disk had spoilt it later
    with pytest.raises(UserError) as caught:
        tiny["tiny_trainer"](run, max_steps=2).train(resume_from_checkpoint=True)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{folder}: ") and "\n" not in problem


@pytest.mark.parametrize("room", [3000, 9000, 20000])  # model, optimizer, state: each once
def test_a_full_disk_during_a_checkpoint_keeps_the_one_before(
    tmp_path: Path, tiny: dict[str, Any], room: int
) -> None:
    run = RunDirectory(tmp_path / "run")
    trainer = tiny["tiny_trainer"](run, max_steps=2, save_steps=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    trainer.add_callback(Full())
    try:
        with pytest.raises(UserError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (problem,) = caught.value.problems
    assert str(run.checkpoints / "checkpoint-2") in problem and "checkpoint-1" in problem
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["checkpoint-1"]
    again = tiny["tiny_trainer"](run, max_steps=2, save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.loaded == "step 1"


def test_no_secret_and_no_pickle_of_arguments_is_saved(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "an older one")
    run = RunDirectory(tmp_path / "run")
    secret = "hf_the_secret_of_this_test"
    trainer = tiny["tiny_trainer"](run, max_steps=1, save_steps=1, hub_token=secret)
    assert os.environ["HF_TOKEN"] == secret  # where the hub's client finds it
    written = []
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda what, *a, **k: (written.append(what), save(what, *a, **k))
    )
    trainer.train()
    assert written and not any(secret in repr(getattr(what, "__dict__", "")) for what in written)
    for path in run.path.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path
    assert not list(run.path.rglob("training_args.bin"))


def test_resuming_removes_what_a_killed_rotation_left(tmp_path: Path, tiny: dict[str, Any]) -> None:
    run = RunDirectory(tmp_path / "run")
    tiny["tiny_trainer"](run, max_steps=3, save_steps=1, save_total_limit=None).train()
    assert len(list_checkpoints(run.checkpoints)) == 3
    tiny["tiny_trainer"](run, max_steps=3, save_steps=1).train(resume_from_checkpoint=True)
    names = [path.name for path in list_checkpoints(run.checkpoints)]
    assert names == ["checkpoint-2", "checkpoint-3"]


def test_a_tied_head_is_not_missing(
    tmp_path: Path, tiny: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path / "run")
    config = {"tie_word_embeddings": True}
    tiny["tiny_trainer"](run, max_steps=1, save_steps=1, model=config).train()
    trainer = tiny["tiny_trainer"](run, max_steps=2, save_steps=1, model=config)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        trainer.train(resume_from_checkpoint=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert "missing keys" not in caplog.text
    head, words = trainer.model.lm_head.weight, trainer.model.model.embed_tokens.weight
    assert head.data_ptr() == words.data_ptr()


# -- other processes ---------------------------------


@pytest.mark.slow
def test_killed_at_any_moment_only_whole_things_are_visible(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    moments = random.Random(0)
    flags = ("--max_steps", "2000", "--save_steps", "1")
    reached = 0
    for _ in range(5):
        with start(run, *flags) as process:
            while not (
                (saved := last_complete_checkpoint(run.checkpoints))
                and int(saved.name[11:]) > reached
            ):
                assert process.poll() is None, process.stdout and process.stdout.read().decode()
                time.sleep(0.02)
            time.sleep(moments.uniform(0.0, 1.0))
            process.kill()
        last = last_complete_checkpoint(run.checkpoints)
        assert last is not None
        load_file(last / "model.safetensors")
        torch.load(last / "optimizer.pt", weights_only=True)
        assert json.loads((last / "trainer_state.json").read_text())["global_step"] == int(
            last.name[11:]
        )
        assert read_rollouts(run.path).num_rows > 0

        opened = run.open({"max_steps": 2000, "learning_rate": 1e-2})
        run.close()
        assert opened.checkpoint == last and opened.step > reached
        assert all(is_complete(path) for path in list_checkpoints(run.checkpoints))
        assert [line["step"] for line in read_metrics(run.path)] == list(range(1, opened.step + 1))
        steps = read_rollouts(run.path, columns=["step"])["step"].to_pylist()
        assert (
            sorted(set(steps)) == list(range(1, opened.step + 1)) and len(steps) == 4 * opened.step
        )
        assert not list(run.path.rglob("*.writing"))
        reached = opened.step


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume_and_the_same_command_finishes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with start(run, "--pause", "0.3") as process:
        while not (run.metrics.is_file() and read_metrics(run.path)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output = process.communicate()[0].decode()
    assert process.returncode == 130, output
    assert "Stopping after this step" in output and "To resume:\n  python " in output
    steps = [line["step"] for line in read_metrics(run.path)]
    last = last_complete_checkpoint(run.checkpoints)
    assert last is not None and last.name == f"checkpoint-{steps[-1]}"
    with start(run) as process:
        output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    assert [line["step"] for line in read_metrics(run.path)] == list(range(1, 9))
    status = read_status(run.path)
    assert (
        status is not None
        and status["status"] == "finished"
        and (run.model / "model.safetensors").is_file()
    )


def test_a_trainer_without_the_command_line_parts_from_the_others_at_its_end(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else gloo's threads abort about every sixth process that has done all its work."""
    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    tiny["tiny_trainer"](RunDirectory(tmp_path / "run"))
    assert at_exit.count(part_processes) == 1


@pytest.mark.slow
def test_one_process_is_told_and_all_stop_at_the_same_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    with start(run, "--interrupt_at", "3", launcher=launcher) as process:
        output = process.communicate(timeout=900)[0].decode()
    assert process.returncode and "exitcode  : 130" in output, output
    assert [line["step"] for line in read_metrics(run.path)] == [1, 2, 3]
    last = last_complete_checkpoint(run.checkpoints)
    assert last is not None and last.name == "checkpoint-3"
    assert (last / "rng_state_0.pth").is_file() and (last / "rng_state_1.pth").is_file()
    with start(run, launcher=launcher) as process:
        output = process.communicate(timeout=900)[0].decode()
    assert process.returncode == 0, output
    assert (run.model / "model.safetensors").is_file()
    assert [line["step"] for line in read_metrics(run.path)] == list(range(1, 9))


def test_shares_of_another_number_of_processes_are_refused(tmp_path: Path) -> None:
    check_shares(tmp_path, False, 3)  # one copy serves any number
    shares = tmp_path / "global_step4"
    shares.mkdir()
    for rank in range(2):
        (shares / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check_shares(tmp_path, True, 2)
    for zero, processes in ((True, 1), (True, 3), (False, 2)):
        with pytest.raises(UserError, match="among 2 processes"):
            check_shares(tmp_path, zero, processes)
