"""The fields of trainer configs and of TRL's ModelConfig: their types, ranges and rules.

A trainer config is TRL's dataclass and `TrainerConfig`. Our fields carry their ranges in their
annotations; TRL's get theirs here, since TRL and transformers accept most numbers and fail in the
middle of a run. Rules of several fields are functions in `TrainerConfig.rules`.

A recipe's values and a Python user's pass the same checks: `typed` for the values, then
`broken_rules`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, WrapValidator

from grace_rl.errors import UserError
from grace_rl.recipe.schema import (
    CHECKS,
    KeyPath,
    Section,
    dotted,
    exact,
    mistakes,
    section_in,
    shown,
)

Rule = Callable[[Any], Iterable[str]]
"""Takes a config, gives what is wrong with it, each as `key: what to do`."""

MOST = 2**31 - 1
"""No number of a config is larger: it would overflow somewhere in the libraries."""

_RANGES: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {"gt": 0},
        "adam_epsilon delta epsilon epsilon_high eval_steps logging_steps num_train_epochs "
        "repetition_penalty sapo_temperature_neg sapo_temperature_pos save_steps temperature "
        "vespo_k_neg vespo_k_pos vllm_importance_sampling_cap vllm_importance_sampling_clip_max "
        "vllm_importance_sampling_clip_min vllm_server_timeout",
    ),
    ({"gt": 0, "le": 10}, "learning_rate learning_rate_mapping"),
    (
        {"ge": 0},
        "beta entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target "
        "eval_delay max_grad_norm max_tool_calling_iterations neftune_noise_alpha "
        "off_policy_mask_threshold router_aux_loss_coef top_k vespo_lambda_neg vespo_lambda_pos "
        "warmup_steps weight_decay",
    ),
    ({"ge": 0, "le": 2**10}, "dataloader_num_workers"),
    ({"ge": 0, "lt": 2**32}, "data_seed seed"),
    ({"ge": 0, "le": 1}, "min_p ref_model_mixup_alpha warmup_ratio"),
    ({"ge": 0, "lt": 1}, "adam_beta1 adam_beta2 label_smoothing_factor lora_dropout"),
    ({"gt": 0, "le": 1}, "top_entropy_quantile top_p vllm_gpu_memory_utilization"),
    (
        {"ge": 1},
        "dataloader_prefetch_factor dataset_num_proc ddp_bucket_cap_mb ddp_timeout "
        "eval_accumulation_steps lora_alpha max_completion_length max_length "
        "num_completions_to_print num_generations_eval num_iterations pad_to_multiple_of "
        "ref_model_sync_steps save_total_limit torch_empty_cache_steps vllm_max_model_length",
    ),
    (
        {"ge": 1, "le": 2**20},  # the product of a few of them is a size in memory
        "generation_batch_size gradient_accumulation_steps lora_r per_device_eval_batch_size "
        "per_device_train_batch_size steps_per_generation vllm_tensor_parallel_size",
    ),
    ({"ge": 1, "lt": 2**16}, "vllm_group_port vllm_server_port"),
    ({"ge": 2, "le": 2**20}, "num_generations"),
    ({"ge": -1}, "local_rank max_steps"),
    ({"ge": -MOST}, "reward_weights"),
)
RANGES = {name: limits for limits, names in _RANGES for name in names.split()}

_LOGGERS = (
    "all", "none", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte",
    "kubeflow", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")
_IMPORTANCE = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LOSSES = {
    "GRPOConfig": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "SFTConfig": ("nll", "dft"),
}
"""What `loss_type` means to a class of TRL's."""

FILE_KEYS = ("deepspeed", "fsdp_config", "accelerator_config")
"""Mappings that may also be named: a text is a file."""

CHOICES: dict[str, tuple[str, ...]] = {
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "quantized"),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "ddp_backend": ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "importance_sampling_level": ("token", "sequence"),
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "lora_task_type": ("CAUSAL_LM",),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "pad_to_multiple_of": ("auto",),
    "report_to": _LOGGERS,
    "scale_rewards": ("group", "batch", "none"),
    "torch_compile_backend": ("inductor", "eager", "aot_eager", "cudagraphs", "openxla", "tvm"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "truncation_mode": ("keep_start", "keep_end"),
    "vllm_importance_sampling_mode": _IMPORTANCE,
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers"),
}
"""Texts that the libraries take for the default, or look at after the model has been loaded."""


class TrainerConfig:
    """Mixin of every trainer config: values and rules are checked when it is made.

    Raises:
        UserError: With every mistake in our fields, in the ranges of TRL's, and in the rules.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    takes_encoders: ClassVar[bool] = False  # sentence encoders that write nothing, too

    def held(self, batch: int, text: int, rows: Sequence[Mapping[str, Any]]) -> Any:
        """What one process holds in a forward with gradients, a `grace_rl.train.held.Held`.

        Args:
            batch: Examples of it.
            text: Tokens of the longest text.
            rows: Of the data.
        """
        raise NotImplementedError

    def __post_init__(self) -> None:
        values = {
            name: getattr(self, name)
            for name in keys_of(type(self))
            if name in own_defaults(type(self)) or type(getattr(self, name)) in (int, float)
        }
        right, wrong = typed(type(self), values)
        vars(self).update(right)
        found = [f"{dotted(path)}: {message}" for path, message in wrong]
        found += broken_rules(self, {str(path[0]) for path, _ in wrong})
        if found:
            raise UserError(found)
        super().__post_init__()  # type: ignore[misc]  # transformers'

    def to_dict(self) -> dict[str, Any]:
        """For loggers, as plain data."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {name: plain(value) for name, value in values.items()}


def keys_of(config: type) -> dict[str, Any]:
    """Field -> annotation of a config class: the recipe keys that it takes."""
    return _hints(config)


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(config) if f.init}


def own_defaults(config: type) -> dict[str, Any]:
    """Our own fields of a config class, with their defaults."""
    libraries = [base for base in config.__mro__[:-1] if not base.__module__.startswith("grace_rl")]
    theirs = {f.name for base in libraries for f in dataclasses.fields(base)}
    return {f.name: _default(f) for f in dataclasses.fields(config) if f.name not in theirs}


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def typed(
    config: type, values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    """Values as the fields of a config class have them.

    Args:
        config: The class.
        values: Field -> what the user gave.

    Returns:
        The right ones, and for the others (path of the key, what to do).
    """
    right: dict[str, Any] = {}
    wrong: list[tuple[KeyPath, str]] = []
    for name, value in values.items():
        try:
            right[name] = _adapter(config, name).validate_python(value)
        except ValidationError as error:
            section = section_in(keys_of(config)[name])
            several = mistakes(error, value, section)
            wrong += [((name, *path), message) for path, message in several]
    return right, wrong


def draft(config: type, values: Mapping[str, Any]) -> Any:
    """A config with typed values, before transformers works the rest out (devices, processes)."""
    made: Any = object.__new__(config)
    for f in dataclasses.fields(config):
        if f.init:
            vars(made)[f.name] = values[f.name] if f.name in values else _default(f)
    return made


def broken_rules(
    config: Any, wrong: Iterable[str] = (), rules: Iterable[Rule] | None = None
) -> list[str]:
    """What the rules of a config say, each as `key: what to do`.

    Args:
        config: Made, or a draft.
        wrong: Fields that have been reported; a rule that reads one of them has no say.
        rules: Others than the config's own.
    """
    view = View(config, wrong)
    found: list[str] = []
    for rule in config.rules if rules is None else rules:
        try:
            found += rule(view)
        except Wrong:
            continue
    return found


class Wrong(Exception):
    """A field was asked for whose value has been reported."""


class View:
    """A config whose wrong fields cannot be read: whatever needs one of them has no say.

    Args:
        config: Made, or a draft.
        wrong: Fields that have been reported; reading one raises `Wrong`.
    """

    def __init__(self, config: Any, wrong: Iterable[str]) -> None:
        self._config, self._wrong = config, frozenset(wrong)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that isinstance sees the config's
        return type(self._config)

    def __getattr__(self, name: str) -> Any:
        if name in self._wrong:
            raise Wrong(name)
        try:
            return getattr(self._config, name)
        except AttributeError:
            if hasattr(type(self._config), name):  # a property of what has been made
                raise Wrong(name) from None
            raise


def plain(value: Any) -> Any:
    """A typed value as YAML has it: what was given of a section."""
    if isinstance(value, Section):
        return value.given()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


# --- annotations ------------------------------------------------------------------------------


@functools.cache
def _adapter(config: type, name: str) -> TypeAdapter[Any]:
    kind: Any = keys_of(config)[name]
    if name not in own_defaults(config):
        if name == "loss_type":
            kind = Literal[next(LOSSES[c.__name__] for c in config.__mro__ if c.__name__ in LOSSES)]
        kind = _checked(kind, name)
        if name == "fsdp":  # annotated as a text, and documented as true
            kind = kind | bool
    elif section_in(kind) is None:
        kind = Annotated[kind, BeforeValidator(exact)]
    section = isinstance(kind, type) and issubclass(kind, Section)
    return TypeAdapter(kind) if section else TypeAdapter(kind, config=CHECKS)


def _checked(kind: Any, name: str) -> Any:
    """TRL's annotation as pydantic is to check it."""
    if kind in (int, float):
        limits: dict[str, Any] = {"ge": -MOST, "le": MOST} | RANGES.get(name, {})
        if "gt" in limits:
            del limits["ge"]
        if "lt" in limits:
            del limits["le"]
        # transformers' generation takes no whole number for a temperature, say
        how = WrapValidator(_keep) if name.endswith("_steps") else BeforeValidator(exact)
        more = (how, BeforeValidator(_not_zero)) if name == "max_steps" else (how,)
        return functools.reduce(
            lambda inner, extra: Annotated[inner, extra], [Field(**limits), *more], kind
        )
    if kind is str and name in CHOICES:
        return Literal[CHOICES[name]]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        members = [one for one in arguments if one is Any or not _only_python(one)]
        if any(_is_enum(one) for one in members):
            members = [one for one in members if one is not str]
        mapping = name.endswith(("_kwargs", "_config")) and name not in FILE_KEYS
        if mapping:
            members = [one for one in members if one is not str]
        union = functools.reduce(lambda a, b: a | b, [_checked(one, name) for one in members])
        return Annotated[union, BeforeValidator(_mapping)] if mapping else union
    if _is_enum(kind):
        return Literal[tuple(member.value for member in kind)]
    if origin is list:
        several = types.GenericAlias(list, (_checked(arguments[0], name),))
        # As on TRL's command line, where one text is a list of one.
        one = BeforeValidator(
            lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=several | str
        )
        return Annotated[several, one]
    if origin is dict and name in RANGES:
        return types.GenericAlias(dict, (arguments[0], _checked(arguments[1], name)))
    return kind


def _keep(value: Any, check: Callable[[Any], Any]) -> Any:
    """A whole number of steps stays one, although a share of them may stand there too."""
    checked = check(exact(value))
    return value if checked == value else checked


def _mapping(value: Any) -> Any:
    """A mapping may be written as JSON, as on TRL's command line."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"must be a mapping (key: value), not {shown(value)}")
    return found


def _not_zero(value: Any) -> Any:
    if value == 0 and type(value) is int:
        raise ValueError(
            f"must be at least 1, or -1 to count epochs (num_train_epochs), not {shown(value)}"
        )
    return value


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _only_python(kind: Any) -> bool:
    """What YAML cannot write: objects and functions."""
    plain_types = (int, float, bool, str, dict, list, type(None))
    return not (
        kind in plain_types
        or typing.get_origin(kind) in (list, dict, Literal, typing.Union, types.UnionType)
        or _is_enum(kind)
    )
