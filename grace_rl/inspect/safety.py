"""Whether a model's folder is data: loading it may read numbers and text, and execute nothing.

transformers and sentence-transformers import what a folder names where they are trusted to. A run
may come from anybody, so what would need that trust is refused here, before anything is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError

MODULES = ("grace_rl.embed.", "sentence_transformers.")  # installed, whatever the folder holds
NAMES_CODE = {
    "config.json": "auto_map",
    "tokenizer_config.json": "auto_map",
    "processor_config.json": "auto_map",
    "adapter_config.json": "auto_mapping",
    "generation_config.json": "custom_generate",
}
"""Keys under which a file names code."""


def check_model(folder: Path, looked_at: frozenset[Path] = frozenset()) -> None:
    """Refuse a folder whose loading could execute something.

    Weights must be safetensors; no file may name code of its own; modules must be those of this
    package or of sentence-transformers. The base model of an adapter and a frozen reader are looked
    at in the same way where they are folders.

    Args:
        folder: The model.
        looked_at: Folders that led here, so that two that name each other end.

    Raises:
        UserError: With everything that is wrong.
    """
    problems: list[str] = []
    files = {name: _object(folder / name, problems) for name in NAMES_CODE}
    for name, key in NAMES_CODE.items():
        if files[name].get(key):
            problems.append(f"{folder / name}: {key} names code; it is not loaded from a run")
    pickled = [path for path in folder.rglob("*.bin") if path.name != "training_args.bin"]
    if pickled or not any(folder.rglob("*.safetensors")):
        problems.append(f"{folder}: weights must be safetensors; pickled ones are not loaded")
    modules = _read(folder / "modules.json", problems)
    for module in modules if isinstance(modules, list) else []:
        kind = module.get("type") if isinstance(module, dict) else None
        if not str(kind).startswith(MODULES):
            problems.append(f"{folder / 'modules.json'}: {kind!r} is not loaded from a run")
    reader = _object(folder / "grace.json", problems).get("reader")
    named = [files["adapter_config.json"].get("base_model_name_or_path")]
    named.append(reader.get("weights") if isinstance(reader, dict) else None)
    if problems:
        raise UserError(problems)
    for place in named:
        other = (
            Path(place) if isinstance(place, str) and place not in ("policy", "frozen") else None
        )
        if other is not None and other.is_dir() and other.resolve() not in looked_at:
            check_model(other, looked_at | {folder.resolve()})


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    content = _read(path, problems)
    return content if isinstance(content, dict) else {}


def _read(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: cannot be read: {str(error).partition(chr(10))[0]}")
        return None
