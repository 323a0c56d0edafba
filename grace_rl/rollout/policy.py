"""Loading a policy by the name a recipe gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

from grace_rl.data import scenes
from grace_rl.errors import UserError

SCENES_COLD_START = "scenes"
SCENES_UNTRAINED = "scenes/untrained"


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


def load_policy(
    path: str, **model_init_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a path or hub id, as TRL loads them.

    Raises:
        UserError: There is no such model, or it cannot be reached.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left")
        model = create_model_from_path(path, **model_init_kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model_name_or_path: cannot load {path!r}: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
