"""A sentence-transformers model as an encoder that writes no rationale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grace_rl.embed.encoder_module import Encoded


class SentenceEncoder:
    """Embeds texts as they are, so that it can be scored where a `RationaleEncoder` is.

    Args:
        model: A `SentenceTransformer`.
        batch_size: Texts per forward.
    """

    writes_rationales = False

    def __init__(self, model: Any, batch_size: int = 128) -> None:
        self.model = model
        self.batch_size = batch_size

    def encode(
        self, texts: Sequence[str], rationale: Any = None, *, role: str | None = None
    ) -> Encoded:
        """Unit vectors of texts.

        Args:
            texts: N texts.
            rationale: Nothing is written, whatever is said here.
            role: `query` or `document`, for models that have a prompt for each.
        """
        roles = {"query": self.model.encode_query, "document": self.model.encode_document}
        encode = self.model.encode if role is None else roles[role]
        vectors = encode(
            list(texts),
            batch_size=self.batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return Encoded([], torch.as_tensor(vectors, dtype=torch.float32).cpu())
