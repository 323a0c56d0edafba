"""The encoder of a model's folder, whatever kind of model it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.encoder_module import Encoder
from grace_rl.embed.hidden_states import decoder_blocks, decoder_stack, layer_numbers
from grace_rl.embed.sentence_encoder import SentenceEncoder
from grace_rl.embed.settings import SETTINGS_FILE, EncoderSettings
from grace_rl.embed.soft_token_encoder import SoftTokenEncoder
from grace_rl.errors import UserError, first_line, reading
from grace_rl.rollout.generator import Engine
from grace_rl.rollout.policy import is_language_model, outline_policy, read_config


def load_encoder(
    folder: str | Path,
    device: str | None = "cpu",
    engine: Engine = "transformers",
    cache: Any = None,
) -> Encoder:
    """The encoder of a folder: of this package, a sentence-transformers model, or a bare policy.

    Args:
        folder: A run's model/, any sentence-transformers model, or a language model without either,
            which is then read by the bottleneck as `EncoderSettings()` says.
        device: Where it runs; None: on a GPU if this machine has one.
        engine, cache: Of `RationaleEncoder.from_pretrained`; for other models they must stay as
            they are.

    Raises:
        UserError: The folder is none of these, or damaged.
    """
    kind = encoder_kind(folder)
    device = device or usable_device(None)
    if kind.module is RationaleEncoder:
        settings = None if kind.saved else kind.settings
        return RationaleEncoder.from_pretrained(
            folder, device, settings=settings, engine=engine, cache=cache
        )
    if engine not in ("transformers", "auto") or cache is not None:
        raise UserError(f"{folder}: writes no rationales; leave out --engine vllm and --cache")
    if kind.module is SoftTokenEncoder:
        return SoftTokenEncoder.from_pretrained(folder, device)
    with reading(folder, "the model"):
        return SentenceEncoder(SentenceTransformer(str(folder), device=device))


@dataclass(frozen=True)
class EncoderKind:
    """What a folder holds, known without loading its weights.

    Attributes:
        module: `RationaleEncoder`, `SoftTokenEncoder` or `SentenceEncoder`.
        settings: Of a `RationaleEncoder`; None for others.
        saved: Whether these settings lie beside the model, or are those of a bare policy.
    """

    module: type[RationaleEncoder] | type[SoftTokenEncoder] | type[SentenceEncoder]
    settings: EncoderSettings | None = None
    saved: bool = False


def encoder_kind(folder: str | Path) -> EncoderKind:
    """What `load_encoder` will make of a folder.

    Raises:
        UserError: The folder is no model, or damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
        raise UserError(f"{folder}: there is no model (no config.json and no modules.json)")
    module = _first_module(folder)
    if module.startswith("grace_rl."):
        module = module.rpartition(".")[2]
        if module not in (RationaleEncoder.__name__, SoftTokenEncoder.__name__):
            raise UserError(f"{folder}/modules.json: grace_rl has no encoder {module}")
        if module == SoftTokenEncoder.__name__:
            return EncoderKind(SoftTokenEncoder)
        return EncoderKind(RationaleEncoder, EncoderSettings.load(folder), saved=True)
    if not module and is_language_model(read_config(folder)):
        if (folder / SETTINGS_FILE).exists():
            return EncoderKind(RationaleEncoder, EncoderSettings.load(folder), saved=True)
        return EncoderKind(RationaleEncoder, EncoderSettings(instruction=None))
    return EncoderKind(SentenceEncoder)


def look_before(folder: str | Path, kind: EncoderKind) -> None:
    """Find what is wrong with a language model's folder before its weights load.

    Args:
        folder: Of the encoder.
        kind: From `encoder_kind`.

    Raises:
        UserError: It is damaged.
    """
    if (own := kind.settings) is None:
        return
    policy = outline_policy(folder)
    own.template(policy.tokenizer)
    if own.reader.reads_with_language_model:
        layer_numbers(own.reader.layers, len(decoder_blocks(decoder_stack(policy.model))))


def usable_device(told: str | None) -> str:
    """The device of a command line; a GPU if there is one and nothing was told.

    Raises:
        UserError: It cannot be used.
    """
    if told is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=told)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch without it
        raise UserError(f"--device: {told!r} cannot be used: {first_line(error)}") from error
    return told


def _first_module(folder: Path) -> str:
    """Class of the first module of a sentence-transformers model; "" where there is none."""
    file = folder / "modules.json"
    if not file.exists():
        return ""
    with reading(folder, "modules.json"):
        return str(json.loads(file.read_text(encoding="utf-8"))[0]["type"])
