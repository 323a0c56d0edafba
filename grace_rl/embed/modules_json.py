"""The two files by which sentence-transformers knows which module loads a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from grace_rl.run.files import write_text


def write_modules(folder: Path, module: str, prompts: Mapping[str, str] | None = None) -> None:
    """Write `modules.json` and `config_sentence_transformers.json` beside a model.

    `SentenceTransformer(folder, trust_remote_code=True)` then loads `folder` with the one module
    that is named: it imports an installed class outside of its own package only with that consent
    (since its version 6.0). transformers and vLLM go on loading the folder as a language model.

    Args:
        folder: The model's folder.
        module: Dotted path of a `grace_rl.embed.encoder_module.EncoderModule`, such as
            `grace_rl.embed.rationale_embedding.RationaleEmbedding`.
        prompts: Instructions by name; `query` and `document` are those of `encode_query` and
            `encode_document`. An empty one keeps the instruction that the model was trained with.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_modules(folder, "package.module.Name")
    >>> json.loads((folder / "modules.json").read_text())
    [{'idx': 0, 'name': '0', 'path': '', 'type': 'package.module.Name'}]
    """
    modules = [{"idx": 0, "name": "0", "path": "", "type": module}]
    config = {
        "model_type": "SentenceTransformer",
        "__version__": {
            "sentence_transformers": version("sentence-transformers"),
            "transformers": version("transformers"),
            "pytorch": version("torch"),
        },
        "prompts": {"query": "", "document": ""} | dict(prompts or {}),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_text(folder / "modules.json", json.dumps(modules, indent=2) + "\n")
    write_text(
        folder / "config_sentence_transformers.json",
        json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
    )
