"""The run directory: when it may be opened, what is cut on resuming, and that no kill spoils it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grace_rl.errors import UserError
from grace_rl.rollout.store import rollout_files, write_rollouts
from grace_rl.run.checkpoints import mark_complete
from grace_rl.run.directory import Opened, RunDirectory
from grace_rl.run.records import read_metrics, read_status

ROOT = Path(__file__).parents[2]
RECIPE = {
    "method": "grpo",
    "learning_rate": 1e-5,
    "max_steps": 10,
    "roles": {"query": {"samples": 8}},
    "rewards": [{"name": "contrastive", "temperature": 0.1}],
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "mine")


def checkpoint(run: RunDirectory, step: int, complete: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights {step}")
    if complete:
        mark_complete(folder)
    return folder


def log(run: RunDirectory, *steps: int) -> None:
    with run.metrics.open("a") as file:
        file.writelines(json.dumps({"step": step, "seconds": float(step)}) + "\n" for step in steps)
    for step in steps:
        columns: dict[str, list[Any]] = dict.fromkeys(
            ("example", "group", "role", "text", "rationale", "token_ids", "truncated"), []
        )
        write_rollouts(run.path, step, columns)


def finish(run: RunDirectory, weights: str = "new") -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(weights)

    run.publish_model(write)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# -- opening ---------------------------------


def test_a_new_and_an_empty_directory_start(run: RunDirectory) -> None:
    assert run.open(RECIPE, seed=7) == Opened("start", None, 0)
    assert yaml.safe_load(run.recipe.read_text()) == RECIPE
    environment = json.loads(run.environment.read_text())
    assert environment["seed"] == 7 and environment["world_size"] == 1
    assert {"torch", "trl", "transformers", "grace-rl"} <= set(environment["versions"])
    empty = run.path.parent / "empty"
    empty.mkdir()
    assert RunDirectory(empty).open(RECIPE).action == "start"


def test_an_unfinished_run_resumes_from_its_last_complete_checkpoint(run: RunDirectory) -> None:
    run.open(RECIPE)
    log(run, 1, 2, 3, 4)
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "seco')
    complete = checkpoint(run, 2)
    checkpoint(run, 3, complete=False)
    checkpoint(run, 4)
    (run.checkpoints / "checkpoint-4" / "model.safetensors").write_text("half")
    run.close()

    assert run.open(RECIPE) == Opened("resume", complete, 2)
    assert [line["step"] for line in read_metrics(run.path)] == [1, 2]
    assert list(rollout_files(run.path)) == [1, 2]
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    assert json.loads(run.environment.read_text())["resumed"][0]["from_step"] == 2


def test_a_run_without_a_checkpoint_begins_again(run: RunDirectory) -> None:
    run.open(RECIPE)
    log(run, 1, 2)
    run.close()
    assert run.open(RECIPE) == Opened("resume", None, 0)
    assert read_metrics(run.path) == [] and not rollout_files(run.path)


def test_another_recipe_is_refused_with_the_keys_that_differ(run: RunDirectory) -> None:
    run.open(RECIPE)
    run.close()
    before = tree(run.path)
    changed: dict[str, Any] = {
        **RECIPE, "learning_rate": 2e-5, "roles": {"query": {"samples": 4}}, "beta": 0.1,
        "max_steps": 99,
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        run.open(changed)
    assert [line.split(":")[0] for line in caught.value.problems[1:]] == [
        "learning_rate",
        "roles.query.samples",
        "beta",
    ]
    assert "1e-05 in the run, now 2e-05" in str(caught.value)
    assert tree(run.path) == before


def test_length_logging_and_saving_may_change(run: RunDirectory) -> None:
    run.open(RECIPE)
    run.close()
    changed = {**RECIPE, "max_steps": 20, "save_steps": 5, "evaluation": {"rows": 3}, "beta": None}
    assert run.open(changed).action == "resume"
    assert yaml.safe_load(run.recipe.read_text())["max_steps"] == 20


def test_a_finished_run_needs_overwrite_and_only_the_run_is_removed(run: RunDirectory) -> None:
    run.open(RECIPE)
    log(run, 1)
    checkpoint(run, 1)
    finish(run)
    run.write_evaluation({"rows": []})
    run.close()
    (run.path / "notes.txt").write_text("mine")
    (run.checkpoints / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="finished run.*--overwrite"):
        run.open(RECIPE)
    assert run.open({**RECIPE, "beta": 1}, overwrite=True) == Opened("start", None, 0)
    started = {".lock", "status.json", "recipe.yaml", "inputs.json"}
    started |= {"environment.json", "metrics.jsonl"}
    assert tree(run.path) == started | {"notes.txt", "checkpoints/keep.txt"}
    assert run.metrics.read_text() == ""


def test_a_prompt_stays_as_the_run_began_with_it(run: RunDirectory) -> None:
    run.open(RECIPE)
    first, then = (
        {"": (f"{day} Nov: ", "!"), "query": (f"{day} Nov, a query: ", "!")} for day in (26, 27)
    )
    assert run.keep_prompts(first) == first
    run.close()
    run.open(RECIPE)
    assert run.keep_prompts(then) == first
    for damaged in ("[]", "{}", '{"": ["a", "b"]}', '{"": "ab", "query": ["a", 1]}'):
        run.prompt.write_text(damaged)
        with pytest.raises(UserError, match="prompt.json"):
            run.keep_prompts(then)
    run.close()
    run.open(RECIPE, overwrite=True)
    assert run.keep_prompts(then) == then


DAMAGED = [
    *(("recipe.yaml", content) for content in (b"", b"a: [1", b"[" * 5000, b"7\n", b"\xff\xfe\n")),
    *(("inputs.json", content) for content in (b"", b"{", b"[" * 5000, b"7\n", b"\xff\xfe\n")),
    *(("environment.json", content) for content in (b"", b"{", b"7\n", b"\xff\xfe\n")),
    *(("metrics.jsonl", content) for content in (b"x\n", b"7\n", b"[" * 5000 + b"\n", b"\xff\n")),
    *(
        ("metrics.jsonl", content)
        for content in (b'{"step": 1}\n', b'{"step": "1", "seconds": 2}\n')
    ),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_a_damaged_file_is_one_line_with_its_path(
    run: RunDirectory, name: str, content: bytes
) -> None:
    run.open(RECIPE)
    run.close()
    (run.path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        run.open(RECIPE)
    (problem,) = caught.value.problems
    assert problem.startswith(str(run.path / name)) and "\n" not in problem
    (run.path / name).unlink()
    if name in ("environment.json", "metrics.jsonl"):  # only records
        assert run.open(RECIPE).action == "resume"


def test_other_inputs_are_refused_by_key(run: RunDirectory) -> None:
    run.open(RECIPE, inputs=lambda: {"dataset_name": "1", "model_name_or_path": "a"})
    run.close()
    with pytest.raises(UserError) as caught:
        run.open(RECIPE, inputs=lambda: {"dataset_name": "2", "model_name_or_path": "a"})
    assert [line.split(":")[0] for line in caught.value.problems[1:]] == ["dataset_name"]
    same = {"dataset_name": "1", "model_name_or_path": "a"}
    assert run.open(RECIPE, inputs=lambda: same).action == "resume"


def test_a_secret_is_kept_nowhere_and_need_not_be_the_same(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_a_secret_of_this_test"
    monkeypatch.setattr(sys, "argv", ["grace-rl", "train", "r.yaml", "--hub_token", secret])
    rewards = [{"name": "judge", "api_key": secret}]
    run.open({**RECIPE, "hub_token": secret, "rewards": rewards})
    run.close()
    for file in tree(run.path):
        assert secret not in (run.path / file).read_text(), file
    rewards = [{"name": "judge", "api_key": "another"}]
    assert run.open({**RECIPE, "rewards": rewards}).action == "resume"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_no_run_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "recipe.yaml").write_text("method: grpo")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "status.json").write_text('{"status": "finished"}')
    before = tree(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        RunDirectory(tmp_path).open(RECIPE, overwrite=overwrite)
    assert tree(tmp_path) == before
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "recipe.yaml").open(RECIPE)


def test_a_directory_that_cannot_be_made_is_the_users_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        RunDirectory(tmp_path / "file" / "run").open(RECIPE)


HOLDER = """
import sys, time
from grace_rl.run.directory import RunDirectory
run = RunDirectory(sys.argv[1])
run.open({})
print("ready", flush=True)
time.sleep(900)
"""


def test_two_processes_never_train_in_one_directory_but_a_killed_one_does_not_block(
    run: RunDirectory,
) -> None:
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(
            UserError, match=rf"process {holder.pid} on .* is training in this directory"
        ):
            run.open({})
        holder.kill()
    assert run.open({}).action == "resume"


# -- kills ---------------------------------


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the process 'die' instead of making its `number`-th change to the file system."""
    left = [number]

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in [
        (os, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
    ]:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


def test_killed_at_any_point_of_publishing_there_is_a_whole_model(run: RunDirectory) -> None:
    run.open(RECIPE)
    for number in range(100):
        finish(run, "old")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, number)
            try:
                finish(run, "new")
                break
            except Killed:
                pass
        run._recover()
        assert (run.model / "model.safetensors").read_text() in ("old", "new")
        assert not list(run.path.glob(".model*"))
    assert number > 4
    assert (run.model / "model.safetensors").read_text() == "new"
    status = read_status(run.path)
    assert status is not None and status["status"] == "finished"


def test_killed_at_any_point_of_starting_over_the_next_start_is_clean(run: RunDirectory) -> None:
    for number in range(100):
        run.close()
        shutil.rmtree(run.path, ignore_errors=True)
        run.open(RECIPE)
        log(run, 1)
        checkpoint(run, 1)
        finish(run)
        run.close()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, number)
            try:
                run.open(RECIPE, overwrite=True)
                break
            except Killed:
                pass
        status = read_status(run.path)
        if status is not None and status["status"] == "finished":  # nothing removed yet
            assert run.model.exists() and list(rollout_files(run.path)) == [1]
            continue
        opened = run.open(RECIPE)
        assert opened.checkpoint is None and opened.step == 0
        assert (
            read_metrics(run.path) == [] and not rollout_files(run.path) and not run.model.exists()
        )
    assert number > 8


# -- writing ---------------------------------


def test_json_has_null_for_what_is_not_finite(run: RunDirectory) -> None:
    run.open(RECIPE)
    run.write_evaluation(
        {"rows": [{"name": "cold_start", "scores": {"a": float("nan"), "b": 0.5}}]}
    )
    run.record_summary({"train_loss": float("inf"), "train_runtime": 2.0})
    assert json.loads(run.evaluation.read_text())["rows"][0]["scores"] == {"a": None, "b": 0.5}
    status = read_status(run.path)
    assert status is not None and status["summary"] == {"train_loss": None, "train_runtime": 2.0}


class Processes:
    """Stands in for the state of a process that is not the main one."""

    is_main_process = False
    num_processes = 1

    def wait_for_everyone(self) -> None:
        pass


def test_other_processes_write_nothing(run: RunDirectory) -> None:
    run.open(RECIPE)
    before = tree(run.path)
    other = RunDirectory(run.path, Processes())
    other.open({"another": "recipe"})
    other.write_evaluation({})
    assert tree(run.path) == before
