"""A recipe's policy as it is before any training, as an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Reader
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.settings import encoder_roles
from grace_rl.rollout.generator import end_token_ids
from grace_rl.rollout.policy import load_policy, resolve_model
from grace_rl.rollout.prompts import PromptTemplate

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

MODEL_KEYS = ("dtype", "attn_implementation")
PROMPT_KEYS = ("instruction", "max_text_tokens", "chat_template_kwargs")


def untrained_encoder(
    recipe: Recipe, scratch: Path, reader: ReaderConfig | None = None
) -> RationaleEncoder:
    """The policy, prompted as the recipe prompts and read as it reads.

    Args:
        recipe: Of a method that rolls out, unless `reader` is given.
        scratch: Folder for a policy that is built with random weights.
        reader: Reads in place of the recipe's own.

    Raises:
        UserError: The policy cannot be loaded.
    """
    config = recipe.config
    path = resolve_model(recipe.model["model_name_or_path"], scratch, config.seed)
    loading = {key: recipe.model[key] for key in MODEL_KEYS if recipe.model.get(key)}
    model, tokenizer = load_policy(path, **{"dtype": "float32"} | loading)
    model.eval()
    told = {key: recipe.training[key] for key in PROMPT_KEYS if key in recipe.training}
    end_ids = end_token_ids(model.generation_config, tokenizer)
    return RationaleEncoder(
        model,
        tokenizer,
        PromptTemplate(tokenizer, **told),
        Reader(reader or config.reader, tokenizer, end_ids, model),
        end_ids,
        getattr(config, "max_completion_length", None) or 1,
        roles=encoder_roles(getattr(config, "roles", {}), {}),
    )
