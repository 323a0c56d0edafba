"""The keys that a recipe may have, and their types: TRL's config classes and ours."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from grace_rl.recipe.methods import METHODS
from grace_rl.recipe.source import RecipeSource

# Keys that are no fields of TRL's or our trainer configs, and their types.
OWN_KEYS: dict[str, Any] = {
    "method": str,
    "dataset_name": str,
    "dataset_config": str | None,
    "dataset_train_split": str,
    "dataset_rows": int | None,
    "dataset_options": dict[str, Any],
    "dataset_columns": dict[str, str],
    "rewards": list[dict[str, Any]],
    "evaluation": dict[str, Any] | None,
}
# TRL looks at these only after the model has been loaded, or takes any other value for the default.
CHOICES: dict[str, tuple[str, ...]] = {
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
    "vllm_importance_sampling_mode": (
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
    ),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers"),
}
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "generation_batch_size": 1,
    "steps_per_generation": 1,
    "mini_batch_size": 1,
    "max_completion_length": 1,
    "max_text_tokens": 1,
    "seed": 0,
}
"""Smaller numbers fail deep in the libraries, after the model has been loaded."""


def trainer_hints(method: str) -> dict[str, Any]:
    """Field -> type of the trainer's config."""
    return _field_hints(METHODS[method].config_class())


def model_hints() -> dict[str, Any]:
    from trl import ModelConfig

    return _field_hints(ModelConfig)


def _field_hints(config: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config) if f.init}


def trainer_defaults(method: str) -> dict[str, Any]:
    """Our own fields of the trainer's config, with their defaults."""
    config = METHODS[method].config_class()
    libraries = [base for base in config.__mro__[:-1] if not base.__module__.startswith("grace_rl")]
    theirs = {f.name for base in libraries for f in dataclasses.fields(base)}
    return {f.name: default(f) for f in dataclasses.fields(config) if f.name not in theirs}


def default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def trainer_value(training: dict[str, Any], name: str) -> Any:
    """The value that GraceGRPOConfig would have."""
    fields = {f.name: f for f in dataclasses.fields(METHODS["grpo"].config_class())}
    return training.get(name, default(fields[name]))


def typed_values(source: RecipeSource, method: str) -> dict[str, Any]:
    """The values of known keys and right types; what is wrong goes to `source.problems`."""
    hints = model_hints() | trainer_hints(method) | OWN_KEYS
    values = {}
    for key, value in source.tree.items():
        if key not in hints:
            source.problems.append(
                source.problem(
                    (key,), f"unknown key{nearest(key, hints)}{_other_method(key, method)}"
                )
            )
            continue
        try:
            values[key] = convert(value, hints[key])
            if key in CHOICES and METHODS[method].rollouts and values[key] not in CHOICES[key]:
                raise TypeError(f"must be one of {', '.join(CHOICES[key])}, not {value!r}")
        except TypeError as error:
            source.problems.append(source.problem((key,), str(error)))
            values.pop(key, None)
            continue
        if problem := _too_small(key, values[key]):
            source.problems.append(source.problem((key,), problem))
    return values


def _too_small(key: str, value: Any) -> str | None:
    if key == "max_steps" and value == 0:
        return "must be at least 1, or -1 to count epochs (num_train_epochs), not 0"
    if key in LEAST and value is not None and value < LEAST[key]:
        return f"must be at least {LEAST[key]}, not {value}"
    return None


def _other_method(key: str, method: str) -> str:
    others = [other for other in METHODS if other != method and key in trainer_hints(other)]
    return f" (it belongs to method: {' or '.join(others)})" if others else ""


def unknown_keys(where: str, values: Mapping[str, Any], config: Any) -> list[str]:
    """A problem for each key of a recipe's mapping that is no field of its dataclass.

    >>> from grace_rl.train.reader_loss import ReaderLossConfig
    >>> unknown_keys("reader_loss", {"wieght": 1.0}, ReaderLossConfig)[0]
    'reader_loss.wieght: unknown key; did you mean weight?; there are weight, temperature'
    """
    known = [field.name for field in dataclasses.fields(config)]
    return [
        f"{where}.{key}: unknown key{nearest(key, known)}; there are {', '.join(known)}"
        for key in values
        if key not in known
    ]


def nearest(key: str, names: Any) -> str:
    close = difflib.get_close_matches(str(key), [str(name) for name in names], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def convert(value: Any, annotation: Any) -> Any:
    """A YAML value as the annotated type, by lossless conversions only.

    Raises:
        TypeError: With what it must be.

    >>> convert(1, float), convert([0, -1], list[int] | None), convert("1e-4", float)
    (1, [0, -1], 0.0001)
    >>> convert("yes", bool)
    Traceback (most recent call last):
    TypeError: must be true or false, not 'yes'
    """
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if isinstance(value, str) and any(_is_enum(option) for option in options):
        # TRL: the enumeration or its value.
        options = tuple(option for option in options if option is not str)
    for strict in (True, False):  # an exact match first: true stays a boolean for `bool | float`
        for option in options:
            fits, converted = _convert_one(value, option, strict)
            if fits:
                return converted
    raise TypeError(f"must be {' or '.join(_say(option) for option in options)}, not {value!r}")


def _convert_one(value: Any, kind: Any, strict: bool) -> tuple[bool, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True, value
    if kind is None or kind is type(None):
        return value is None, None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return not strict, value  # a whole number is a number
    if kind is float and isinstance(value, str) and not strict:
        try:
            return True, float(value)
        except ValueError:
            return False, None
    if origin is Literal:
        return value in arguments, value
    if _is_enum(kind):
        return value in [member.value for member in kind], value
    if origin in (list, tuple):
        if not isinstance(value, list):
            return False, None
        try:
            return True, [convert(item, arguments[0]) for item in value]
        except TypeError:
            return False, None
    if origin is dict:
        if not isinstance(value, dict):
            return False, None
        try:
            return True, {key: convert(item, arguments[1]) for key, item in value.items()}
        except TypeError:
            return False, None
    return type(value) is kind, value


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _say(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_enum(kind):
        return "one of " + ", ".join(str(member.value) for member in kind)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is list:
        return f"a list, each {_say(arguments[0])}" if arguments[0] is not Any else "a list"
    if origin is dict or kind is dict:
        return "a mapping (key: value)"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        type(None): "null",
    }
    return words.get(kind) or str(getattr(kind, "__name__", kind))
