"""`grace-rl check`: one screen, and at most three suggestions."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from grace_rl.cli import main
from grace_rl.commands.check import SUGGESTIONS, suggestions
from grace_rl.data import scenes
from grace_rl.errors import Finding
from grace_rl.launch import machine_looks, preflight, subject
from grace_rl.launch.memory import GIB, MemoryPlan, ModelShape, remedies
from grace_rl.launch.subject import Machine
from grace_rl.run import versions

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
method: grpo
model_name_or_path: scenes
dtype: float32
dataset_name: scenes
dataset_rows: 64
dataset_options: {form: triplet}
instruction: null
roles: {query: {samples: 2}, positive: {samples: 2}, negative: {train: false}}
rewards: [{name: contrastive}, {name: stepwise}]
num_generations: 2
per_device_train_batch_size: 4
max_completion_length: 8
max_steps: 4
use_cpu: true
bf16: false
gradient_checkpointing: false
report_to: none
"""


@pytest.fixture
def check(tmp_path, capsys):
    """Runs `grace-rl check` on the recipe with changes; returns exit code and what was said."""
    path = tmp_path / "recipe.yaml"

    def run(*options: str) -> tuple[int, str]:
        path.write_text(RECIPE)
        code = main(["check", str(path), "--output_dir", str(tmp_path / "run"), *options])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return run


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Pretend to have GPUs of so many GiB; a CPU with enough free memory unless a test says so."""

    def pretend(gpus: int, gib: float = 80.0) -> None:
        made = Machine(("H100",) * gpus, int(gib * GIB), 16, 100 * GIB)
        monkeypatch.setattr(preflight, "this_machine", lambda processes, use_cpu: made)

    pretend(0)
    return pretend


def test_this_machine_has_something_to_run_on(monkeypatch):
    monkeypatch.undo()
    alone, shared = (subject.this_machine(processes, use_cpu=True) for processes in (1, 4))
    assert alone.gpus == () and alone.cores >= 1
    assert 0 < alone.memory <= alone.ram
    assert shared.memory < alone.memory


def test_a_good_recipe_fits_on_one_screen(check, capsys):
    code, said = check()
    assert code == 0
    for part in ("weights", "optimizer", "activations", "disk", "versions", "on 4 rollouts"):
        assert part in said
    assert "what helps most" not in said
    assert main(["check", str(ROOT / "recipes" / "quickstart.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


def test_the_batch_is_that_of_all_processes(check):
    _, said = check("--launch", "zero2", "--num_processes", "4")
    assert "= 16 rollouts per generation batch" in said
    code, said = check("--num_processes", "3", "--per_device_train_batch_size", "5")
    assert code == 2 and "5 x 3 processes" in said


def test_what_does_not_fit_gets_at_most_three_suggestions(check, machine):
    machine(8, gib=1.21)
    code, said = check("--num_processes", "8", "--max_completion_length", "400")
    assert code == 2
    assert "no memory" in said
    advice = said.split("what helps most:")[1].split(" - ")[1:]
    assert 1 <= len(advice) <= SUGGESTIONS and all("GiB less" in line for line in advice)


def test_where_nothing_helps_that_is_said(check, machine):
    machine(8, gib=0.1)
    code, said = check("--num_processes", "8")
    assert code == 2 and "a smaller model, or more memory" in said


def test_more_processes_than_gpus(check, machine):
    machine(2)
    code, said = check("--launch", "zero3", "--num_processes", "8")
    assert code == 2 and "for 8 processes" in said and "--num_processes 2" in said


@pytest.mark.parametrize(
    ("flags", "gpus", "warned"),
    [
        ({"avx2"}, 0, True),
        ({"avx2", "amx_bf16"}, 0, False),
        (set(), 0, False),
        ({"avx2"}, 1, False),
    ],
)
def test_bfloat16_without_a_unit_for_it(check, machine, monkeypatch, flags, gpus, warned):
    machine(gpus)
    monkeypatch.setattr(machine_looks, "cpu_flags", lambda: flags)
    code, said = check("--dtype", "bfloat16")
    assert code == 0
    assert ("--bf16 false --dtype float32" in said) == warned


def test_no_process_is_no_number_of_processes(check):
    code, said = check("--num_processes", "0")
    assert code == 2 and "--num_processes: must be at least 1, not 0" in said


def test_tensor_parallelism_must_divide_the_processes(check):
    options = ["--use_vllm", "true", "--vllm_tensor_parallel_size", "4", "--num_processes", "6"]
    code, said = check(*options)
    assert code == 2 and "4 does not divide 6 processes" in said
    assert "vllm_tensor_parallel_size: 3" in said
    assert check(*options[:-1], "4", "--vllm_enable_sleep_mode", "true")[0] == 0


def test_a_share_too_small_for_vllm(check, machine):
    machine(1, gib=2)
    options = ["--use_vllm", "true", "--vllm_gpu_memory_utilization"]
    code, said = check(*options, "0.0001")
    assert code == 2 and "higher vllm_gpu_memory_utilization" in said
    code, said = check(*options, "0.2")
    assert code == 0 and "sequences of" in said


def test_a_missing_server_and_a_taken_port(check):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = check(
            "--use_vllm", "true", "--vllm_mode", "server", "--vllm_group_port", str(port),
            "--vllm_server_base_url", "http://127.0.0.1:9",
        )  # fmt: skip
    assert code == 2
    assert "no vLLM server answers at http://127.0.0.1:9" in said
    assert f"{port} (weight push) is taken" in said


def test_a_full_disk(check, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(machine_looks.shutil, "disk_usage", lambda place: usage)
    code, said = check()
    assert code == 2 and "save_total_limit" in said


def test_untested_versions_are_named(check, monkeypatch):
    monkeypatch.setattr(machine_looks, "installed_versions", lambda: {"trl": "1.18.0"})
    code, said = check()
    assert code == 0 and "trl 1.18.0 is installed, tested is >=1.16,<1.17" in said


def test_a_reward_that_fails_is_found_with_its_line(check, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(batch):\n    return [len(r.split()[0]) for r in batch.rationales]\n"
    )
    code, said = check("--rewards", "[{name: mine.py:mine}]")
    assert code == 2 and "mine.py" in said and "IndexError" in said


def test_the_rows_columns_reach_the_rewards(check, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(completions, source, **_):\n    return [float(len(s)) for s in source]\n"
    )
    code, said = check("--rewards", "[{name: mine.py:mine}]")
    assert ("mine" in said and code == 0) or "needs the columns source" in said


def test_a_recipe_for_gpus_can_be_looked_at_without_one(check):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, said = check("--bf16", "true", "--use_cpu", "false")
    assert code == 2 and "precision" in said and "--bf16 false" in said and "memory" in said


WRONG = (  # key, value: of the loader, of rules across fields, of rows, of the model, of a package
    ("temperature", "0"), ("generation_batch_size", "6"), ("report_to", "comet_ml"),
    ("use_peft", "true"), ("lora_modules_to_save", "[lm_headd]"), ("reader.layers", "[77]"),
    ("chat_template_kwargs", "{foo: 1}"), ("model_revision", "main"),
    ("max_completion_length", "100000"),
)  # fmt: skip


@pytest.mark.parametrize("verb", [["check"], ["train", "--dry-run"]])
def test_all_mistakes_are_told_together_each_with_its_line(verb, tmp_path, capsys):
    lines = [f"{key}: {value}" for key, value in WRONG if "." not in key]
    path = tmp_path / "recipe.yaml"
    kept = [x for x in RECIPE.splitlines() if x.split(":")[0] not in dict(WRONG)]
    path.write_text("\n".join([*kept, *lines, "reader:", "  layers: [77]"]))
    assert main([verb[0], str(path), *verb[1:]]) == 2
    told = capsys.readouterr().err
    for key in [key for key, _ in WRONG if key != "use_peft"]:
        number = 1 + path.read_text().splitlines().index(
            "  layers: [77]" if "." in key else f"{key}: {dict(WRONG)[key]}"
        )
        assert told.count(f"{path}:{number}: {key}: ") == 1, (key, told)


def test_what_a_tokenizer_lacks_is_told_before_a_run(check, tmp_path):
    folder = shutil.copytree(scenes.COLD_START, tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    code, said = check("--model_name_or_path", str(folder))
    assert code == 0 and "the chat template prints today's date" in said
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in settings.items() if key not in ("eos_token", "pad_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    (folder / "generation_config.json").write_text("{}")
    code, said = check("--model_name_or_path", str(folder))
    assert code == 2 and "the tokenizer has no end token" in said


def test_what_reads_a_wrong_value_says_nothing(check):
    code, said = check("--max_completion_length", "x", "--use_vllm", "true")
    assert code == 2 and "vllm_max_model_length" not in said


def test_rows_without_the_texts_of_the_method(check):
    code, said = check("--dataset_options", "{form: pair}", "--temperature", "0")
    assert code == 2 and "has no 'query'" in said and "--temperature" in said


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--use_vllm", "true", "--vllm_max_model_length", "9"], "vllm_max_model_length"),
        (["--model_init_kwargs", "{foo: 1}"], "model_init_kwargs"),
        (["--model_init_kwargs", "{hidden_size: 3}"], "model_init_kwargs"),
        (["--rewards", "[{name: grace_published}]"], "rewards"),
    ],
)
def test_what_the_model_or_a_reward_cannot_do_is_named(tmp_path, capsys, options, key):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert main(["train", str(path), "--dry-run", *options]) == 2
    (problem,) = capsys.readouterr().err.splitlines()
    assert problem.startswith(f"--{key}: ")


@pytest.mark.parametrize("command", [["check"], ["train", "--dry-run"]])
def test_mistakes_of_all_stages_are_told_together_whoever_finds_them(tmp_path, capsys, command):
    recipe = yaml.safe_load(RECIPE)
    grpo = {key: recipe.pop(key) for key in ("method", "roles", "rewards", "num_generations")}
    wrong = {"use_peft": True, "lora_target_modules": ["q_prj"]}  # the model's look finds it
    sft = {"method": "sft", "learning_rate": -1}  # the loader does
    del recipe["max_completion_length"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"stages": [sft, grpo | wrong]}))
    assert main([*command, str(path), "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3  # and the rows have no rationales
    for stage, key in (("1 (sft)", "learning_rate"), ("2 (grpo)", "lora_target_modules")):
        assert any(line.startswith(f"stage {stage}: ") and f" {key}: " in line for line in said)


HELD = {"max_text_tokens": 24, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("method", "changes", "held"),
    [
        ("gircse", {"gircse_steps": 5}, "12 rows of 29 tokens"),  # 4 x (q, d, negative)
        ("gircse", {"gircse_steps": 5, "mini_batch_size": 2}, "2 rows of 29 tokens"),
        ("infonce", {}, "12 rows of 24 tokens"),
        ("infonce", {"mini_batch_size": 3}, "3 rows of 24 tokens"),
        # 8 texts read, 8 rebuilt, 1 written
        ("reconstruction", {"instruction": None}, "17 rows of 25 tokens"),
    ],
)
def test_memory_counts_what_a_method_holds_at_once(capsys, tmp_path, method, changes, held):
    path = tmp_path / "recipe.yaml"
    tree = {"method": method, "model_name_or_path": "scenes", "dataset_name": "scenes"}
    more = {"dataset_rows": 64, "use_cpu": True, "bf16": False, "output_dir": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(tree | more | HELD | changes))
    assert main(["check", str(path)]) == 0
    assert f"at {held}" in " ".join(capsys.readouterr().out.split())


def test_smaller_parts_are_the_advice_where_a_batch_is_cut_into_them():
    shape = ModelShape(10**9, 10**9, 10**9, 2048, 8192, 24, 2048, 2048, 32000)
    plan = MemoryPlan(rows=512, tokens=512, in_parts=True)
    assert any(line.startswith("mini_batch_size: 256") for line in remedies(shape, plan, GIB))


def test_reading_again_with_a_gradient_is_counted(check):
    def tokens(*overrides):
        return int(re.search(r"rows of (\d+) tokens", " ".join(check(*overrides)[1].split()))[1])

    loss = ("--reader_loss.weight", "0.1")
    longest = 8  # max_completion_length of the recipe
    assert tokens(*loss) == tokens() + longest
    in_context = ("--reader", "{span: context}")  # from the policy's own forward
    assert tokens(*loss, *in_context) == tokens(*in_context)


def test_an_adapter_that_fits_nowhere_is_named(check):
    code, said = check("--use_peft", "true", "--lora_target_modules", "[nope]")
    assert code == 2 and "lora_target_modules: the model has no module nope" in said


def test_the_recipes_own_deepspeed_counts(check):
    config = '{"zero_optimization": {"stage": 3}}'
    _, said = check("--num_processes", "2", "--deepspeed", config)
    assert "gathered weights" in said


def test_every_stage_of_a_chain_is_looked_at(capsys):
    code = main(["check", str(ROOT / "recipes" / "scenes" / "stages.yaml")])
    said = capsys.readouterr()
    assert code == 0, said.err
    stages = said.out.count("# stage ")
    assert stages > 1 and said.out.count("disk") >= stages - 1


def test_suggestions_put_problems_first():
    findings = [
        Finding("a", "", "warning", ["later"]),
        Finding("b", "", "problem", ["first", "second"]),
        Finding("c", "", "problem", ["first", "third"]),
    ]
    assert suggestions(findings) == ["first", "second", "third"]


def test_the_docs_have_the_tested_versions():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tested = versions.tested_versions()
    for name in ("torch", "trl", "transformers", "accelerate", "peft", "datasets", "vllm"):
        assert f"| {name} | {tested[name]} |" in text
