"""Every scalar field of every method's config and of TRL's ModelConfig, at values that end a run.

A value is refused with its key by the loader, or the configs can be made of it.
"""

from __future__ import annotations

import functools
import typing
from pathlib import Path
from typing import Any

import pytest

from grace_rl.errors import UserError
from grace_rl.recipe import load_recipe
from grace_rl.recipe.fields import RANGES, keys_of, own_defaults
from grace_rl.recipe.methods import METHODS
from grace_rl.recipe.recipe import model_class

BASE = "model_name_or_path: scenes\ndataset_name: scenes\nuse_cpu: true\nbf16: false\n"
REWARDS = "rewards: [{name: contrastive}]\nnum_generations: 2\nper_device_train_batch_size: 4\n"
EXTREMES = ("-1", "0", "99999999999999999999", "1e300", ".nan", ".inf", "-.inf")
# Of a machine or a network, or of what the trainer works out.
NOT_BUILT = {"deepspeed", "fsdp_config", "resume_from_checkpoint", "tf32", "torch_compile", "fsdp"}
MEANT = {"-1": {"max_steps", "local_rank"}}
"""Numbers that mean something although they are outside of what a number of this kind is."""


def kinds(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) in (list, dict):
        return {typing.get_origin(annotation)}
    members = {annotation} if not typing.get_args(annotation) else set()
    for inner in typing.get_args(annotation):
        members |= kinds(inner)
    return members


@functools.cache
def fields_of(method: str) -> dict[str, set[Any]]:
    config = model_class() if method == "model" else METHODS[method].config_class()
    return {
        name: kinds(hint)
        for name, hint in keys_of(config).items()
        if kinds(hint) & {int, float, bool, str} and not kinds(hint) & {list, dict}
    }


def is_number(method: str, name: str) -> bool:
    return bool(fields_of(method)[name] & {int, float}) and not fields_of(method)[name] & {str}


@pytest.fixture
def refused(tmp_path: Path) -> Any:
    """Whether the loader or the configs refuse a value, with the key."""

    def _refused(method: str, key: str, value: str) -> bool:
        name = "grpo" if method == "model" else method
        text = f"method: {name}\n{BASE}{REWARDS if METHODS[name].rollouts else ''}"
        text += "dataset_rows: 64\n" if key == "roles" else ""
        text += "use_peft: true\n" if method == "model" and key != "use_peft" else ""
        file = tmp_path / "mine.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            recipe = load_recipe(file, [f"--{key}={value}"])
            if key not in NOT_BUILT:
                recipe.training_arguments()
                recipe.model_config()
        except UserError as error:
            assert any(f"--{key}" in problem for problem in error.problems), error.problems
            assert sum(f"--{key}:" in problem for problem in error.problems) == 1
            return True
        return False

    return _refused


@pytest.mark.parametrize("method", [*METHODS, "model"])
def test_every_number_is_in_its_range_or_a_named_mistake(method: str, refused: Any) -> None:
    seen = {key for other in METHODS if other < method for key in fields_of(other)}
    for key in fields_of(method):
        if key in seen - RANGES.keys() or not is_number(method, key):
            continue
        for value in EXTREMES:
            was_refused = refused(method, key, value)
            if value not in ("-1", "0"):
                assert was_refused, (key, value)
        assert refused(method, key, "-1") != (key in MEANT["-1"]), key


@pytest.mark.parametrize("method", [*METHODS, "model"])
def test_a_wrong_type_is_a_named_mistake(method: str, refused: Any) -> None:
    for key, known in fields_of(method).items():
        if typing.Any in known:
            continue
        assert refused(method, key, "{a: 1}"), key
        if not known & {str}:
            assert refused(method, key, "word"), key


@pytest.mark.parametrize("method", [*METHODS, "model"])
def test_every_number_of_the_libraries_has_a_range(method: str) -> None:
    config = model_class() if method == "model" else METHODS[method].config_class()
    own = own_defaults(config) if method != "model" else {}
    numbers = {name for name in fields_of(method) if is_number(method, name) and name not in own}
    assert numbers <= RANGES.keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "0"), ("top_p", "1.5"), ("top_k", "-1"), ("min_p", "2"),
        ("learning_rate", "0"), ("adam_beta1", "1"), ("epsilon", "0"), ("seed", "4294967296"),
        ("lora_r", "0"), ("lora_dropout", "1"), ("num_iterations", "0"), ("beta", ".nan"),
        ("dataloader_num_workers", "-1"), ("warmup_steps", "-1"), ("report_to", "wandbb"),
        ("eval_strategy", "steps"), ("save_strategy", "best"), ("remove_unused_columns", "true"),
        ("sync_ref_model", "true"), ("lr_scheduler_kwargs", "{num_cycle: 2}"),
        ("generation_kwargs", "{top_kk: 2}"), ("accelerator_config", "{split_batch: true}"),
        ("gradient_checkpointing_kwargs", "{use_reentrent: false}"), ("lora_alpha", "8"),
        ("attn_implementation", "nonsense"), ("model_init_kwargs", "{dtype: float33}"),
        ("model_init_kwargs", "{attn_implementation: nonsense}"), ("push_to_hub", "true"),
        ("hub_model_id", "x"), ("fsdp_config", "{version: 2}"), ("optim_args", "momentum=1"),
        ("optim_target_modules", "[x]"), ("metric_for_best_model", "loss"),
        ("include_for_metrics", "[loss]"), ("resume_from_checkpoint", "x"),
        ("trust_remote_code", "true"), ("max_completion_length", "null"),
        ("load_in_4bit", "true"), ("use_liger_kernel", "true"),
        ("attn_implementation", "flash_attention_2"), ("report_to", "comet_ml"),
        ("model", "x"), ("torch_dtype", "bfloat16"), ("max_prompt_length", "3"),
        ("rewards", "[{name: contrastive, weight: 0}]"), ("dataset_rows", "1000000000000"),
        ("loss_type", "nll"), ("reward_weights", "[]"), ("generation_kwargs", "zz"),
        ("accelerator_config", ""), ("cache_implementation", "quantized"),
        ("dataloader_multiprocessing_context", "fork"), ("save_only_model", "true"),
        ("dataloader_persistent_workers", "true"), ("auto_find_batch_size", "true"),
    ],
)  # fmt: skip
def test_what_would_end_a_run_late(
    key: str, value: str, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grace_rl.recipe.requirements.find_spec", lambda name: None)
    assert refused("grpo", key, value)


def test_a_number_is_a_float_where_the_libraries_want_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{BASE}{REWARDS}temperature: 2\nrepetition_penalty: 1\nsave_steps: 2\n")
    args = load_recipe(file).training_arguments()
    assert [type(args.temperature), type(args.repetition_penalty)] == [float, float]
    assert load_recipe(file).resolved()["save_steps"] == 2


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--fsdp=true", "--fsdp_config={versoin: 2}"], "fsdp_config"),
        (["--optim=sgd", "--optim_args=momentun=0.9"], "optim_args"),
        (["--optim=sgd", "--optim_args=momentum=x"], "optim_args"),
        (["--use_vllm=true", "--generation_kwargs={top_kk: 2}"], "generation_kwargs"),
    ],
)
def test_keys_of_mappings_that_depend_on_another_key(
    options: list[str], key: str, tmp_path: Path
) -> None:
    if key == "generation_kwargs":
        pytest.importorskip("vllm.version")
    file = tmp_path / "mine.yaml"
    file.write_text(f"{BASE}{REWARDS}", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(file, options)
    assert [problem.partition(":")[0] for problem in error.value.problems] == [f"--{key}"]
    load_recipe(file, ["--optim=sgd", "--optim_args=momentum=0.9,nesterov=true"])


@pytest.mark.parametrize("roles", ["{}", "{query: {train: false}}", "{qeury: {}}"])
def test_a_rule_does_not_read_what_another_has_refused(roles: str, refused: Any) -> None:
    assert refused("grpo", "roles", roles)


def test_all_linear_as_trl_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = f"{BASE}{REWARDS}use_peft: true\nlora_target_modules: all-linear\n"
    file.write_text(text, encoding="utf-8")
    model = load_recipe(file).model_config()
    assert (model.lora_target_modules, model.lora_dropout) == ("all-linear", 0.0)


@pytest.mark.parametrize(
    ("key", "name"),
    [("torch_dtype", "dtype"), ("model", "model_name_or_path"),
     ("max_prompt_length", "max_text_tokens"), ("lr", "learning_rate")],
)  # fmt: skip
def test_what_others_call_a_key(key: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{BASE}{REWARDS}", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(file, [f"--{key}", "x"])
    assert [name in problem for problem in error.value.problems] == [True]
