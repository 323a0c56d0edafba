"""A recipe is typed and whole, or every mistake in it is named with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from grace_rl.errors import UserError
from grace_rl.recipe import Recipe, load_recipe
from grace_rl.recipe.fields import plain
from grace_rl.recipe.recipe import OWN_KEYS
from grace_rl.recipe.rows import DATA_KEYS
from grace_rl.recipe.stages import load

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ROOT / "recipes" / "accelerate"  # accelerate's files, no recipes
OTHERS = ("curate", "evaluate")  # their own kinds of file, tested with their commands
RECIPES = sorted(
    p
    for p in (ROOT / "recipes").rglob("*.yaml")
    if p.parent != LAUNCHERS and p.parent.name not in OTHERS
)
SMALL = """\
model_name_or_path: scenes
dataset_name: scenes
rewards:
  - {name: contrastive, temperature: 0.1}
  - name: length
    weight: 0.5
num_generations: 4
per_device_train_batch_size: 16
bf16: false
use_cpu: true
"""


ARITHMETIC = r"20 x 1 process x 1 .* = 20 .* 2 trained roles x 4 num_generations = 8: 16 or 24"


@pytest.fixture
def write(tmp_path):
    def _write(text: str, name: str = "mine.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return _write


@pytest.fixture
def small(write):
    return write(SMALL)


def problems_of(path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_a_recipe_is_typed(small):
    recipe = load_recipe(small)
    assert (recipe.method, recipe.name, recipe.training["output_dir"]) == (
        "grpo",
        "mine",
        "runs/mine",
    )
    assert [(r.name, r.weight, r.keywords) for r in recipe.rewards] == [
        ("contrastive", 1.0, {"temperature": 0.1}),
        ("length", 0.5, {}),
    ]
    assert recipe.training_arguments().num_generations == 4
    assert recipe.model_config().model_name_or_path == "scenes"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipes_are_valid(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    there = "grace_rl.recipe.requirements.find_spec"  # of the machine that a recipe is meant for
    monkeypatch.setattr(there, lambda name: True)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    yours = []  # rows of the user's own, and a model that a command makes
    if tree.get("dataset_name") == "rows.jsonl":
        row = {"query": "a dog", "positive": "dogs", "negative": "a tax", "rationale": "dog"}
        (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 64)
        yours = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--model_name_or_path", "scenes"]
    needs = [
        tree[key]
        for key in ("model_name_or_path", "dataset_name")
        if str(tree.get(key)).startswith("../shared")
    ]
    missing = [name for name in needs if not Path(name).exists()]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, which is not here")
    if "stages" in tree:
        assert load(path, yours) == load(path, yours)
        return
    recipe = load_recipe(path, yours)
    assert recipe == load_recipe(path, yours)
    assert recipe.name == (
        path.stem if path.parent.name == "recipes" else f"{path.parent.name}-{path.stem}"
    )


@pytest.mark.parametrize(
    "extra",
    [[], ["--dataset_rows", "9", "--evaluation", "{rows: 20}", "--rewards.1.label", "short"]],
)
def test_the_resolved_recipe_loads_to_an_equal_one(small, tmp_path, extra):
    recipe = load_recipe(small, extra)
    kept = tmp_path / "run" / "recipe.yaml"
    kept.parent.mkdir()
    kept.write_text(yaml.safe_dump(recipe.resolved(), sort_keys=False), encoding="utf-8")
    again = load_recipe(kept)
    assert again == recipe
    assert again.resolved() == recipe.resolved()
    assert again.name == "run"


def test_overrides(small):
    recipe = load_recipe(
        small,
        [
            *(
                "--learning_rate",
                "2e-4",
                "--beta=0.5",
                "--use_vllm",
                "--run_name",
                "a: b",
                "--max_steps=7",
            ),
            *("--reader.span", "context", "--reader.layers", "[-1]", "--roles.query.samples", "4"),
            *(
                "--roles.positive",
                "{}",
                "--rewards.0.temperature",
                "1",
                "--rewards.length.weight=2",
            ),
        ],
    )
    training = recipe.training
    assert (training["learning_rate"], training["beta"], training["max_steps"]) == (2e-4, 0.5, 7)
    assert (training["use_vllm"], training["run_name"]) == (True, "a: b")
    assert plain(training["reader"]) == {"span": "context", "layers": [-1]}
    assert plain(training["roles"]) == {"query": {"samples": 4}, "positive": {}}
    assert [r.keywords | {"weight": r.weight} for r in recipe.rewards] == [
        {"temperature": 1, "weight": 1.0},
        {"weight": 2},
    ]


def test_yaml_1_2_scalars(write):
    recipe = load_recipe(
        write(SMALL + "learning_rate: 1e-4\nsave_strategy: no\nmax_grad_norm: 1\nrun_name: '5'\n")
    )
    training = recipe.training
    assert training["learning_rate"] == 1e-4 and training["save_strategy"] == "no"
    assert training["max_grad_norm"] == 1 and training["run_name"] == "5"


def test_every_mistake_is_reported_with_its_line_and_the_nearest_key(write, tmp_path):
    path = write(
        """\
method: grpo
model_name_or_path: ./nowhere
dataset_name: nowhere.jsonl
lerning_rate: 1e-4
learning_rate: fast
save_strategy: never
loss_type: dpo
use_vllm: yes
deepspeed: zero9.json
roles: {query: {samples: 8}, positive: {samples: 4}, negativ: {train: false}}
reader: {span: bottle, layer: 3}
rewards:
  - {name: contrastive, temprature: 0.1}
  - {name: lenght}
  - {temperature: 3}
  - {name: length, weight: heavy, on_error: ignore}
max_steps: 3
max_steps: 4
"""
    )
    problems = problems_of(path, "--max_lenght", "3", "stray")
    for place, words in {
        f"{path}:2: model_name_or_path": "config.json",
        f"{path}:3: dataset_name": "there is no file nowhere.jsonl",
        f"{path}:4: lerning_rate": "did you mean learning_rate?",
        f"{path}:5: learning_rate": "must be a number, not 'fast'",
        f"{path}:6: save_strategy": "no, steps, epoch, best",
        f"{path}:7: loss_type": "dapo",
        f"{path}:8: use_vllm": "true or false",
        f"{path}:9: deepspeed": "there is no zero9.json",
        f"{path}:10: roles.positive.samples": "num_generations = 8",
        f"{path}:10: roles.negativ": "did you mean negative?",
        f"{path}:11: reader.span": "bottleneck",
        f"{path}:11: reader.layer": "did you mean layers?",
        f"{path}:13: rewards.0": "did you mean temperature?",
        f"{path}:14: rewards.1": "did you mean length?",
        f"{path}:15: rewards.2": "is missing",
        f"{path}:16: rewards.3": "weight: must be a number",
        f"{path}:18: max_steps": f"first in {path}:17",
        "--max_lenght": "unknown key",
        "'stray'": "expected --key value",
    }.items():
        assert any(p.startswith(place) and words in p for p in problems), (place, words, problems)
    assert sum("on_error" in problem for problem in problems) == 1
    assert len(problems) == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has none"),
        ("just a text", "has none"),
        ("- a\n- b", "has none"),
        ("a: [1, 2\nb: 3", "is not valid YAML"),
        ("a: 1\n\tb: 3", "is not valid YAML"),
        ("a: &x [*x]", "contains itself"),
    ],
)
def test_text_that_is_no_recipe(write, text, words):
    (problem,) = problems_of(write(text))
    assert words in problem


def test_a_method_that_is_no_word(write):
    (first, *_) = problems_of(write("method: [sft]\nmodel_name_or_path: scenes\n"))
    assert "method: must be one of grpo, ppo, sft" in first


def test_missing_file_and_wrong_encoding(tmp_path, small):
    (problem,) = problems_of(tmp_path / "mini.yaml")
    assert "there is no such recipe" in problem and str(small) in problem
    (tmp_path / "latin.yaml").write_bytes("a: 1\nb: é".encode("latin-1"))
    assert "latin.yaml:2: is not UTF-8" in problems_of(tmp_path / "latin.yaml")[0]


def test_tags_cannot_run_code(write):
    problems = problems_of(write(SMALL + "run_name: !!python/object/apply:os.getcwd []\n"))
    assert any("run_name" in problem for problem in problems)


@pytest.mark.parametrize(
    ("overrides", "place", "words"),
    [
        (["--per_device_train_batch_size", "20"], "--per_device_train_batch_size", ARITHMETIC),
        (
            ["--generation_batch_size", "12"],
            "--generation_batch_size",
            "multiple of 2 trained roles",
        ),
        (["--generation_batch_size", "8"], "--generation_batch_size", "16 x 1 = 16"),
        (
            ["--generation_batch_size", "16", "--steps_per_generation", "1"],
            "--generation_batch_size",
            "keep one",
        ),
        (["--dataset_rows", "1"], "--dataset_rows", "= 2 rows, but there are 1"),
        (["--num_generations", "1"], "--num_generations", "at least 2"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size", "at least 1"),
        (["--roles", "{query: {train: false}}"], "--roles", "no role is trained"),
        (["--roles", "{query: {write: false}}"], "--roles", "no role is trained"),
        (["--roles.negative", "{write: false, train: true}"], "--roles.negative", "to learn from"),
        (["--roles.negative", "{write: false, samples: 2}"], "--roles.negative", "has no effect"),
        (["--instruction", "{user: no place}"], "--instruction", "{text} in it once"),
        (["--roles", "{query: {}, text: {}}"], "--roles", "cannot be mixed"),
        (["--roles", "{query: 4}"], "--roles", "must be a mapping"),
        (["--roles.query", "4"], "--roles.query", "must be a mapping"),
        (
            ["--reader.weights", "some/encoder", "--reader.span", "rationale"],
            "--reader.span",
            "sentence encoder",
        ),
        (["--rewards", "[]"], "--rewards", "is missing"),
        (["--reward_weights", "[1]"], "--reward_weights", "1 numbers for 2 rewards"),
        (
            ["--rewards.5.weight", "1"],
            "--rewards.5.weight",
            "there is: 0 (contrastive), 1 (length)",
        ),
        (["--bf16.x", "1"], "--bf16.x", "bf16 is False and holds no keys"),
        (["--dataset_options.form", "octet"], "--dataset_options.form", "triplet"),
        (["--dataset_options.from", "quad"], "--dataset_options.from", "did you mean form?"),
        (["--dataset_options.count", "3"], "--dataset_options.count", "dataset_rows"),
        (["--dataset_train_split", "dev"], "--dataset_train_split", "validation"),
        (["--dataset_rows", "0"], "--dataset_rows", "at least 1"),
        (["--evaluation.dataset_splits", "[dev]"], "--evaluation.dataset_splits", "validation"),
        (["--evaluation.row", "3"], "--evaluation.row", "did you mean rows?"),
        (
            ["--dataset_name", "a/b", "--dataset_options", "{form: quad}"],
            "--dataset_options",
            "only scenes",
        ),
        (["--method", "sft"], "", "method: grpo"),
        (["--method", "dpo"], "--method", "one of grpo, ppo, sft"),
        (["--lam", "0.9"], "--lam", "method: ppo"),
        (["--method", "ppo", "--lam", "2"], "--lam", "at most 1"),
        (["--method", "ppo", "--critic", "mine"], "--critic", "shared, detached, separate"),
        (["--method", "ppo", "--scale_rewards", "batch"], "--scale_rewards", "critic"),
        (["--model_name_or_path", "null"], "--model_name_or_path", "is missing"),
        (["--parallelism_config", "{}"], "--parallelism_config", "null"),
        (["--max_steps", "1.5"], "--max_steps", "a whole number"),
        (["--max_steps"], "--max_steps", "a whole number"),
        (["--reader.layers", "[1, {"], "--reader.layers", "not valid YAML"),
    ],
)  # fmt: skip
def test_impossible_settings(small, overrides, place, words):
    problems = problems_of(small, *overrides)
    found = [problem for problem in problems if place in problem]
    assert any(words in problem or re.search(words, problem) for problem in found), problems


def test_gates_cannot_be_normalised_first(small):
    problems = problems_of(
        small, "--rewards.1.name", "format", "--multi_objective_aggregation", "normalize_then_sum"
    )
    assert any("--multi_objective_aggregation" in p and "gate" in p for p in problems), problems


def test_batches_count_every_process(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_recipe(small, ["--per_device_train_batch_size", "12"])
    assert "2 processes" in problems_of(small, "--per_device_train_batch_size", "10")[0]


def test_a_reward_file_is_found_beside_the_recipe_and_from_its_copy(small, tmp_path):
    (tmp_path / "own.py").write_text(
        "class Own:\n    def __init__(self, k: int = 1): ...\n    def __call__(self, batch): ...\n"
    )
    recipe = load_recipe(small, ["--rewards", "[{name: 'own.py:Own', k: 3}]"])
    assert recipe.rewards[0].keywords == {"k": 3}
    kept = tmp_path / "run" / "recipe.yaml"
    kept.parent.mkdir()
    kept.write_text(yaml.safe_dump(recipe.resolved()), encoding="utf-8")
    assert load_recipe(kept) == recipe
    assert any(
        "rewards.0.k: must be a whole number" in p
        for p in problems_of(small, "--rewards", "[{name: 'own.py:Own', k: x}]")
    )


def test_what_trl_refuses_is_a_problem_of_the_recipe(small):
    recipe = load_recipe(small, ["--log_completions_hub_repo", "a/b"])
    with pytest.raises(UserError, match="^--log_completions_hub_repo: "):
        recipe.training_arguments()


@pytest.mark.parametrize("method", ["sft", "infonce", "gircse", "reconstruction"])
def test_numbers_that_libraries_would_stumble_over(write, method):
    text = f"method: {method}\nmodel_name_or_path: scenes\ndataset_name: scenes\n"
    path = write(text)
    wrong = ["--per_device_train_batch_size=0", "--max_text_tokens=0", "--seed=-1", "--max_steps=0"]
    found = problems_of(path, *wrong)
    for option in wrong:
        key, _, number = option.partition("=")
        assert sum(p.startswith(f"{key}: must be at least") for p in found) == 1
        assert any(p.startswith(key) and p.endswith(f"not {number}") for p in found)
    assert load_recipe(path, ["--max_steps=-1", "--seed=0"]).training["max_steps"] == -1


def test_an_empty_output_dir_is_the_default(write):
    path = write("method: sft\nmodel_name_or_path: scenes\ndataset_name: scenes\noutput_dir:\n")
    assert load_recipe(path).training["output_dir"] == "runs/mine"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{bad", "is not JSON"),
        ('{"zero_optimization": 3}', "zero_optimization must be"),
        ("FILE", "mine.json: is not JSON"),
    ],
)
def test_a_wrong_deepspeed_is_found_with_the_recipe(write, given, words):
    given = given.replace("FILE", str(write("no", "mine.json")))
    (problem,) = problems_of(write(f"{SMALL}deepspeed: '{given}'\n"))
    assert ".yaml:11: deepspeed: " in problem and words in problem


def test_the_package_of_an_optimizer_is_named(small, monkeypatch):
    monkeypatch.setattr("grace_rl.recipe.requirements.find_spec", lambda name: None)
    (problem,) = problems_of(small, "--optim", "paged_adamw_32bit")
    assert problem.startswith("--optim: paged_adamw_32bit needs the package bitsandbytes")


def test_missing_engine_packages_are_named(small, monkeypatch):
    monkeypatch.setattr("grace_rl.recipe.requirements.find_spec", lambda name: None)
    (problem,) = problems_of(small, "--use_vllm", "true")
    assert problem.startswith("--use_vllm: ") and "grace-rl[vllm]" in problem


def test_sft_takes_the_prompt_and_no_rewards(write):
    path = write(
        "method: sft\nmodel_name_or_path: scenes\ndataset_name: scenes\n"
        "dataset_options: {form: sft}\n"
    )
    recipe = load_recipe(
        path, ["--max_text_tokens", "64", "--use_cpu", "--bf16", "false", "--packing", "false"]
    )
    assert recipe.training["max_text_tokens"] == 64 and recipe.training["instruction"]
    assert recipe.training_arguments().packing is False
    assert any(
        "nothing that could be rewarded" in problem
        for problem in problems_of(path, "--rewards", "[{name: length}]")
    )


def test_the_examples_of_the_docs_are_recipes(write):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    example, *parts = re.findall(r"```yaml\n(.+?)```", text, flags=re.S)
    assert load_recipe(write(example)).training["learning_rate"] == 1e-4
    for part in parts:
        assert load_recipe(write(example + part)).resolved().keys() >= yaml.safe_load(part).keys()


def test_numbers_with_leading_zeros_are_decimal(write):
    assert load_recipe(write(SMALL + "max_steps: 010\n")).training["max_steps"] == 10


def test_docs_list_every_key_of_ours_with_its_default():
    from dataclasses import MISSING, fields

    from trl import GRPOConfig

    from grace_rl.train.ppo_config import GracePPOConfig  # has all of GraceGRPOConfig's

    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, flags=re.M))
    trl = {f.name for f in fields(GRPOConfig)}
    ours = [f for f in fields(GracePPOConfig) if f.name not in trl]
    assert set(OWN_KEYS) | {f.name for f in ours} == set(rows) - {
        "model_name_or_path",
        "output_dir",
    }
    for f in ours:
        if f.name == "instruction":
            continue  # a sentence
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        assert yaml.safe_load(rows[f.name].strip("`")) == plain(default), f.name


def test_every_key_of_ours_arrives_in_the_recipe():
    assert {"method", "rewards", "evaluation"} <= set(Recipe.__dataclass_fields__)
    assert set(OWN_KEYS) == {"method", "rewards", "evaluation", *DATA_KEYS}
