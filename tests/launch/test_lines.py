"""Launch lines: what accelerate itself makes of them, and real runs of two processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from grace_rl.cli import main
from grace_rl.errors import UserError
from grace_rl.launch.lines import CONFIGS, counted, launch_names, launched, read_launch, run_launch

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
PROMISED = ["single", "ddp", "zero1", "zero2", "zero3", "zero3-offload"]
PROMISED += ["cpu-zero2", "cpu-zero3", "multi-node"]
LINE = re.compile(r"(?:accelerate launch|torchrun|deepspeed|grace-rl train) .*")

RECIPE = """
method: grpo
model_name_or_path: scenes
dtype: float32
dataset_name: scenes
dataset_rows: 64
dataset_options: {form: triplet}
instruction: null
roles: {query: {samples: 2}, positive: {samples: 2}, negative: {train: false}}
rewards: [{name: contrastive}]
num_generations: 2
per_device_train_batch_size: 4
max_completion_length: 8
max_steps: 4
use_cpu: true
bf16: false
gradient_checkpointing: false
logging_steps: 1
save_strategy: "no"
print_rollouts_steps: 0
report_to: none
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


# -- the files ---------------------------------


def test_the_package_carries_what_the_recipes_folder_shows():
    assert sorted(PROMISED) == launch_names() == sorted(path.stem for path in FILES)
    assert CONFIGS.is_relative_to(Path(sys.modules["grace_rl"].__file__).parent)
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "launch/accelerate/*.yaml" in setup


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path):
    config = load_config_from_file(str(path))
    kind = str(config.distributed_type.value)
    stage = re.search(r"zero(\d)", path.stem)
    if path.stem in ("single", "ddp"):
        assert kind == {"single": "NO", "ddp": "MULTI_GPU"}[path.stem]
    else:
        assert kind == "DEEPSPEED"
        assert config.deepspeed_config["zero_stage"] == (int(stage[1]) if stage else 3)
    assert config.use_cpu is False  # with it accelerate starts one process only
    assert config.mixed_precision is None  # the recipe's bf16 decides


@pytest.mark.parametrize("name", [name for name in PROMISED if name != "multi-node"])
def test_the_line_is_one_that_accelerate_takes(name):
    processes = 1 if name == "single" else 4
    launch = read_launch(name, processes)
    words = launch.line(["train", "r.yaml", "--learning_rate", "1e-4"])
    assert words[:2] == ["accelerate", "launch"]
    options = launch_command_parser().parse_args(words[2:])
    options, _, _ = _validate_launch_command(options)
    assert options.num_processes == processes
    assert options.use_deepspeed == ("zero" in name)
    assert options.module and options.training_script == "grace_rl"
    assert options.training_script_args == ["train", "r.yaml", "--learning_rate", "1e-4"]


def documented_lines() -> list[str]:
    """Every launch line of the docs and of the files' comments."""
    texts = [path.read_text(encoding="utf-8") for path in [*FILES, ROOT / "docs" / "recipes.md"]]
    lines = []
    for text in texts:
        for line in re.findall(r"^(?:#|    )(.*)$", text, re.MULTILINE):
            if (found := LINE.search(line)) and "-m" in found[0] + " --module":
                lines.append(found[0].split("  #")[0].strip().rstrip("`"))
    return lines


def test_documented_lines_parse_with_their_own_launchers(monkeypatch):
    from torch.distributed.run import get_args_parser

    monkeypatch.chdir(ROOT)
    lines = documented_lines()
    launchers = {line.split()[0] for line in lines}
    assert launchers == {"accelerate", "torchrun", "deepspeed", "grace-rl"}
    for line in lines:
        words = shlex.split(line)
        if words[0] == "accelerate":
            options = launch_command_parser().parse_args(words[2:])
            _validate_launch_command(options)
            rest, module = options.training_script_args, options.training_script
        elif words[0] == "torchrun":
            options = get_args_parser().parse_args(words[1:])
            assert options.module
            rest, module = options.training_script_args, options.training_script
        elif words[0] == "deepspeed":
            runner = pytest.importorskip("deepspeed.launcher.runner")
            options = runner.parse_args(words[1:])
            assert options.module
            rest, module = options.user_args, options.user_script
        else:
            rest, module = words[1:], "grace_rl"
        assert module == "grace_rl" and rest[0] == "train", line


# -- mistakes ---------------------------------


@pytest.mark.parametrize(
    ("name", "processes", "words"),
    [
        ("zero4", None, "did you mean zero"),
        ("multi-node", None, "comments of"),
        ("single", 2, "use ddp"),
        ("ddp", 1, "--launch single"),
        ("zero2", 0, "at least 1"),
        ("no-such.yaml", 2, "there are cpu-zero2"),
    ],
)
def test_mistakes_are_explained(name, processes, words):
    with pytest.raises(UserError, match=words):
        read_launch(name, processes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no distributed_type"),
        (b"a: [1", "is no YAML"),
        (b"\xff\xfe", "is no YAML"),
        (b"distributed_type: NO\nnum_processes: two", "num_processes must be a number, not 'two'"),
        (b"distributed_type: NO\ndeepspeed_config: 3", "deepspeed_config must be a mapping"),
    ],
)
def test_a_file_of_ones_own_is_looked_at(tmp_path, content, words):
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_launch(str(tmp_path / "own.yaml"))


def test_a_recipe_is_checked_once_before_anything_is_started(recipe, capsys):
    options = ["--launch", "cpu-zero2", "--num_processes", "3"]
    assert main(["train", str(recipe), *options, "--per_device_train_batch_size", "5"]) == 2
    said = capsys.readouterr()
    assert "5 x 3 processes" in said.err and "accelerate launch" not in said.out
    assert main(["train", str(recipe), "--num_processes", "3"]) == 2
    assert "needs --launch" in capsys.readouterr().err


def test_zero_comes_from_one_place(recipe, capsys):
    config = '{"zero_optimization": {"stage": 2}}'
    words = ["train", str(recipe), "--num_processes", "2", "--dry-run", "--deepspeed", config]
    assert main([*words, "--launch", "zero3"]) == 2
    assert "use --launch ddp" in capsys.readouterr().err
    assert main([*words, "--launch", "ddp"]) == 0


def test_a_dry_run_shows_the_line_and_the_batch_of_all_processes(recipe, capsys):
    before = dict(os.environ)
    options = ["--launch", "zero3", "--num_processes", "4", "--dry-run"]
    assert main(["train", str(recipe), *options]) == 0
    said = capsys.readouterr().out
    assert "--num_processes 4 -m grace_rl train" in said
    assert "= 16 rollouts per generation batch" in said
    assert dict(os.environ) == before


def test_deepspeeds_own_argument_is_taken(recipe, capsys):
    assert main(["--local_rank=0", "train", str(recipe), "--dry-run"]) == 0
    assert "rollouts per generation batch" in capsys.readouterr().out


# -- exit codes, with a launcher that is quick ---------------------------------


def test_the_outcome_of_the_training_processes_comes_through(tmp_path, monkeypatch):
    place = tmp_path / "outcome"
    monkeypatch.setenv("GRACE_RL_OUTCOME", str(place))
    usual = signal.getsignal(signal.SIGINT)
    try:
        with launched() as tell:
            assert tell(130) == 0 and place.read_text() == "130"
            assert tell(75) == 75
        with pytest.raises(UserError), launched():
            raise UserError("wrong")
        assert place.read_text() == "2"
    finally:
        signal.signal(signal.SIGINT, usual)
    monkeypatch.delenv("GRACE_RL_OUTCOME")
    with launched() as tell:
        assert tell(130) == 130


def test_processes_are_counted_only_inside(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with counted(8):
        assert os.environ["WORLD_SIZE"] == "8"
    assert "WORLD_SIZE" not in os.environ


# -- real runs ---------------------------------

needs_deepspeed = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


def grace_rl(*words: str, **more: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "grace_rl", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more,
    )  # fmt: skip


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.usefixtures("cold_python")
def test_a_launched_run_trains_on_two_processes(recipe, tmp_path):
    run = tmp_path / "run"
    words = ["train", str(recipe), "--launch", "cpu-zero2", "--num_processes", "2"]
    process = grace_rl(*words, "--output_dir", str(run))
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    line = "accelerate launch --config_file recipes/accelerate/cpu-zero2.yaml --num_processes 2"
    assert said.startswith(f"{line} -m grace_rl train {recipe}")
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert (run / "model" / "model.safetensors").is_file()


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.usefixtures("cold_python")
def test_interrupting_a_launched_run_saves_a_checkpoint(recipe, tmp_path):
    run = tmp_path / "run"
    words = ["train", str(recipe), "--launch", "cpu-zero2", "--num_processes", "2"]
    process = grace_rl(*words, "--max_steps", "2000", "--output_dir", str(run))
    while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert f"grace-rl train {recipe} --launch cpu-zero2 --num_processes 2" in said
    assert list((run / "checkpoints").glob("checkpoint-*/COMPLETE"))


@pytest.mark.slow
def test_a_launched_mistake_exits_with_2(tmp_path, recipe):
    """One that only the processes can find: the run directory is taken by something else."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letters.txt").write_text("not a run")
    launch = read_launch("single")
    words = ["train", str(recipe), "--output_dir", str(tmp_path / "run")]
    assert run_launch(launch, words, ["grace-rl", *words]) == 2
