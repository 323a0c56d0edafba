"""An encoder as mteb wants one, with what encoding took.

encoder = MtebEncoder.load("runs/quickstart/model")
results = mteb.evaluate(encoder, mteb.get_tasks(tasks=["STSBenchmark"]), cache=None)

`mteb.evaluate(SentenceTransformer("runs/quickstart/model", trust_remote_code=True), ...)` gives the
same scores through mteb's own wrapper; this one also counts texts, seconds and tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.types import PromptType
from sentence_transformers.util import cos_sim, pairwise_cos_sim

from grace_rl.embed.cache import ENCODER_FILES, model_fingerprint
from grace_rl.embed.corpus import embed_many
from grace_rl.embed.encoder_module import Encoded, Encoder, model_name
from grace_rl.embed.loading import load_encoder
from grace_rl.run.workers import Cluster


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
    """mteb's encoder protocol over an encoder.

    Args:
        encoder: What `load_encoder` gives.
        rationale: `greedy`, `sample` or `none`, for encoders that write.
        name: The model's name in mteb's results.
        revision: What tells it from other models of the name; mteb keeps results by both.
    """

    def __init__(
        self,
        encoder: Encoder,
        rationale: str = "greedy",
        name: str = "local/model",
        revision: str = "local",
    ) -> None:
        self.encoder = encoder
        self.rationale = rationale if encoder.writes_rationales else "none"
        self.usage = Usage()
        self.revision = revision
        self._name = name
        self._many: tuple[int, Callable[..., Encoded]] | None = None

    @classmethod
    def load(cls, folder: str | Path, rationale: str = "greedy", **options: Any) -> MtebEncoder:
        """Of a model's folder; see `load_encoder`."""
        encoder = load_encoder(folder, **options)
        revision = model_fingerprint(Path(folder), ENCODER_FILES)
        return cls(encoder, rationale, model_name(Path(folder)), revision)

    def share(
        self, cluster: Cluster, load: Callable[[], Encoder], model: Path, beside: Path, chunk: int
    ) -> None:
        """Have more than `chunk` texts at once embedded by a cluster: see `embed_many`."""

        def many(texts: Sequence[str], rationale: str, role: str | None) -> Encoded:
            how = {"rationale": rationale, "role": role}
            return embed_many(load, texts, model, cluster, beside, chunk, **how)

        self._many = (chunk, many)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        revision = f"{self.revision}-{self.rationale}"
        return ModelMeta.create_empty({"name": self._name, "revision": revision})

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
        role = None if prompt_type is None else prompt_type.value
        started = time.perf_counter()
        encode: Callable[..., Encoded] = self.encoder.encode
        if self._many is not None and len(texts) > self._many[0]:
            encode = self._many[1]
        encoded = encode(texts, self.rationale, role=role)
        self.usage.seconds += time.perf_counter() - started
        self.usage.texts += len(texts)
        if self.rationale != "none":
            self.usage.rationale_tokens += sum(encoded.lengths)
        return np.asarray(encoded.vectors.float().numpy())

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines (N, M): the vectors have unit length."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines (N,)."""
        return pairwise_cos_sim(embeddings1, embeddings2)
