"""An encoder as mteb wants one, for `mteb.evaluate`.

encoder = MtebEncoder.load("runs/quickstart/model")
results = mteb.evaluate(encoder, mteb.get_tasks(tasks=["STSBenchmark"]), cache=None)
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.types import PromptType

from grace_rl.embed.sentence_encoder import SentenceEncoder
from grace_rl.errors import UserError
from grace_rl.methods import named


@dataclass
class Usage:
    """What encoding took.

    Attributes:
        texts: How many were embedded.
        seconds: Of embedding them, writing included.
        rationale_tokens: Tokens that were written, end tokens included.
    """

    texts: int = 0
    seconds: float = 0.0
    rationale_tokens: int = 0


class MtebEncoder:
    """mteb's encoder protocol over an encoder of this package.

    Args:
        encoder: A `RationaleEncoder`, `SentenceEncoder`, or anything else whose `encode(texts,
            rationale)` gives `Encoded`.
        rationale: `greedy`, `sample` or `none`, for encoders that write.
        name: The model's name in mteb's results.
    """

    def __init__(self, encoder: Any, rationale: str = "greedy", name: str = "model") -> None:
        self.encoder = encoder
        self.rationale = rationale if encoder.writes_rationales else "none"
        self.usage = Usage()
        self._name = name

    @classmethod
    def load(cls, folder: str | Path, rationale: str = "greedy", **options: Any) -> MtebEncoder:
        """Of a model's folder; see `load_encoder`."""
        return cls(load_encoder(folder, **options), rationale, Path(folder).name)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        return ModelMeta.create_empty({"name": f"local/{self._name}", "revision": "local"})

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray[Any, Any]:
        """Unit vectors (N, H) float32 of all texts of the batches."""
        texts = [text for batch in inputs for text in batch["text"]]
        started = time.perf_counter()
        if isinstance(self.encoder, SentenceEncoder):
            encoded = self.encoder.encode(texts, role=_role(prompt_type))
        else:
            encoded = self.encoder.encode(texts, self.rationale)
        self.usage.seconds += time.perf_counter() - started
        self.usage.texts += len(texts)
        if self.rationale != "none":
            self.usage.rationale_tokens += sum(encoded.lengths)
        return np.asarray(encoded.vectors.float().numpy())

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines (N, M): the vectors have unit length."""
        from sentence_transformers.util import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines (N,)."""
        from sentence_transformers.util import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def _role(prompt_type: PromptType | None) -> str | None:
    return None if prompt_type is None else {"query": "query"}.get(prompt_type.value, "document")


def load_encoder(
    folder: str | Path, device: str = "cpu", engine: str = "transformers", cache: Any = None
) -> Any:
    """The encoder of a folder: of this package, a sentence-transformers model, or a bare policy.

    Args:
        folder: A run's model/, any sentence-transformers model, or a language model without either,
            which is then read by the bottleneck as `EncoderSettings()` says.
        device: Where it runs.
        engine, cache: Of `RationaleEncoder.from_pretrained`; for other models they must stay as
            they are.

    Raises:
        UserError: The folder is none of these.
    """
    folder = Path(folder)
    options = {"engine": engine, "cache": cache}
    if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
        raise UserError(f"{folder}: there is no model (no config.json and no modules.json)")
    module = _first_module(folder)
    if module.startswith("grace_rl."):
        place, _, name = module.rpartition(".")
        kind = named(f"{place}:{name}")
        if name != "RationaleEmbedding":
            _refuse(options, folder)
            return kind.load_encoder(folder, device)
        return kind.load_encoder(folder, device, **options)
    if not module:
        from transformers import AutoConfig

        from grace_rl.embed.encoder import RationaleEncoder
        from grace_rl.embed.settings import EncoderSettings

        names = AutoConfig.from_pretrained(folder).architectures or []
        if any(name.endswith("ForCausalLM") for name in names):
            known = (folder / "grace.json").exists()
            settings = None if known else EncoderSettings(instruction=None)
            return RationaleEncoder.from_pretrained(folder, device, settings=settings, **options)
    from sentence_transformers import SentenceTransformer

    _refuse(options, folder)
    try:
        return SentenceEncoder(SentenceTransformer(str(folder), device=device))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from error


def _refuse(options: dict[str, Any], folder: Path) -> None:
    if options["engine"] not in ("transformers", "auto") or options["cache"] is not None:
        raise UserError(f"{folder}: writes no rationales; leave out --engine vllm and --cache")


def _first_module(folder: Path) -> str:
    """Class of the first module of a sentence-transformers model; "" where there is none."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return str(modules[0]["type"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
