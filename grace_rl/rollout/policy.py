"""Loading a policy by the name a recipe gives it: the one place that reads a model's folder.

Whatever the libraries raise for a damaged folder becomes a UserError, and what can be found without
the weights is found before they load, everything together (`outline_policy`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging
from trl.trainer.utils import create_model_from_path

from grace_rl.data import scenes
from grace_rl.errors import UserError, reading
from grace_rl.run.zero import outside_zero3

SCENES_COLD_START = "scenes"
SCENES_UNTRAINED = "scenes/untrained"


@dataclass(frozen=True)
class Outline:
    """A policy without its weights.

    Attributes:
        config: transformers' config.
        tokenizer: As `read_tokenizer` gives it.
        model: The model on the meta device: modules and shapes, no numbers.
    """

    config: Any
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel


def resolve_model(name: str, scratch: Path, seed: int = 0) -> str:
    """The path or hub id behind a recipe's `model_name_or_path`.

    `scenes` is the cold start that ships with the package. `scenes/untrained` is built with random
    weights under `scratch`, the same for the same seed.
    """
    if name == SCENES_COLD_START:
        return str(scenes.COLD_START)
    if name == SCENES_UNTRAINED:
        folder = scratch / "untrained"
        if not (folder / "config.json").exists():
            writing = scratch / ".untrained.writing"
            scenes.save_untrained(writing, seed)
            writing.rename(folder)
        return str(folder)
    return name


def read_config(path: str | Path, **keywords: Any) -> Any:
    """transformers' config of a model.

    Raises:
        UserError: There is none, or none that transformers knows.
    """
    base = base_of(path)
    with reading(path, "config.json" if base == path else f"config.json of its base model {base}"):
        return AutoConfig.from_pretrained(base, **keywords)


def base_of(path: str | Path) -> str | Path:
    """The model that a folder's adapter was trained on; whatever holds no adapter alone, as it is.

    Raises:
        UserError: The adapter's config cannot be read or names none.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return path
    with reading(path, file.name):
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])


def is_language_model(config: Any) -> bool:
    """Whether a config is that of a causal language model, and not of an encoder or a backbone."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if causal is None or causal not in (config.architectures or [causal]):
        return False
    # BERT and its kin have a causal class, too, which sees the whole text unless told otherwise.
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_decoder


def read_tokenizer(path: str | Path, **keywords: Any) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    An end token that only the model's generation_config.json declares becomes the tokenizer's; it
    also pads where there is no padding token.

    Raises:
        UserError: There is none, or it knows no tokens.
    """
    with reading(path, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, **keywords)
        knows = tokenizer("a b c", add_special_tokens=False)["input_ids"]
    if not knows:  # what transformers makes of a folder without one
        raise UserError(f"{path}: there is no tokenizer (no tokenizer.json)")
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _declared_end(path, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _declared_end(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        declared = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # it has no such file
        return None
    first = declared[0] if isinstance(declared, list) and declared else declared
    return {number: token for token, number in tokenizer.get_vocab().items()}.get(first)


def outline_policy(
    path: str | Path, model_init_kwargs: Mapping[str, Any] | None = None, **keywords: Any
) -> Outline:
    """Look at a policy without loading its weights; of a folder, their names and shapes are read.

    Args:
        path: A folder or hub id.
        model_init_kwargs: More for the model alone.
        **keywords: For transformers, such as `revision`.

    Raises:
        UserError: With everything that is wrong with the folder.
    """
    config = read_config(path, **keywords)
    if not is_language_model(config):
        names = ", ".join(config.architectures or [config.model_type])
        raise UserError(f"{path}: {names} is no causal language model; give one that writes")
    problems: list[str] = []
    tokenizer = model = None
    try:
        tokenizer = read_tokenizer(path, **keywords)
    except UserError as error:
        problems += error.problems
    try:
        model = _without_weights(base_of(path), config, {**keywords, **(model_init_kwargs or {})})
    except UserError as error:
        problems += error.problems
    if problems or tokenizer is None or model is None:
        raise UserError(problems)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, index]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"{path}: the tokenizer has tokens up to {largest}, but the model's vocabulary ends at "
            f"{rows - 1}; take the model's own tokenizer"
        )
    return Outline(config, tokenizer, model)


def _without_weights(path: str | Path, config: Any, keywords: dict[str, Any]) -> PreTrainedModel:
    if not Path(path).is_dir() or getattr(config, "quantization_config", None) is not None:
        with reading(path, "config.json"), outside_zero3(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    told = "the weights" + (f" with {', '.join(sorted(keywords))}" if keywords else "")
    with reading(path, told), outside_zero3(), _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, each with its shapes
            **keywords,
        )
    model, found = loaded
    wrong = [
        f"{name} is {list(stored)} in its file and {list(built)} by config.json"
        for name, stored, built in sorted(found["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(found["missing_keys"])]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{path}: the weights are not those of config.json: {wrong[0]}{more}")
    return model  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers and torch neither report nor show progress."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_policy(
    path: str, **model_init_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, padding on the left, from a path or hub id, as TRL loads them.

    Raises:
        UserError: There is no such model, or it cannot be loaded.
    """
    tokenizer = read_tokenizer(path, padding_side="left", truncation_side="left")
    with reading(path, "the model"):
        return create_model_from_path(path, **model_init_kwargs), tokenizer


def load_outlined(
    path: str | Path, model_kwargs: dict[str, Any], tokenizer_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder as transformers loads them, after a look at it; an adapter is
    merged into its base.

    Raises:
        UserError: With everything that is wrong with the folder.
    """
    outline_policy(path)
    tokenizer = read_tokenizer(path, **tokenizer_kwargs)
    base = base_of(path)
    with reading(path, "the model"):
        model = AutoModelForCausalLM.from_pretrained(base, **model_kwargs)
        if base != path:
            model = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
        return model, tokenizer
