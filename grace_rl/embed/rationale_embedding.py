"""A trained policy as a sentence-transformers module.

    model = SentenceTransformer("runs/quickstart/model", trust_remote_code=True)
    vectors = model.encode(texts)

Nothing of this package has to be imported for it: `modules.json` beside the model names this
class, and sentence-transformers imports it if it is told to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.encoder_module import EncoderModule


class RationaleEmbedding(EncoderModule):
    """Writes a rationale for each text and reads it into a vector.

    What `RationaleEncoder` can do is at `model[0].encoder`; the most used is repeated here.
    `SentenceTransformer.encode` itself takes `rationale`, `max_rationale_tokens`, `temperature` and
    `seed` for one call:

        model.encode(texts, rationale="none")
        model[0].rationales(texts)
        model[0].encode_rationales(["a robber steals a lamp at dawn"])
    """

    forward_kwargs = {"rationale", "max_rationale_tokens", "temperature", "seed"}
    encoder: RationaleEncoder

    def __init__(self, encoder: RationaleEncoder) -> None:
        super().__init__(encoder)
        beside = [encoder.reader.frozen_policy, encoder.reader.sentence_encoder]
        # Registered, so that `to(device)` moves them too.
        self.readers = nn.ModuleList([model for model in beside if model is not None])

    @classmethod
    def load_encoder(cls, folder: Path, device: str, **kwargs: Any) -> RationaleEncoder:
        return RationaleEncoder.from_pretrained(folder, device, **kwargs)

    def save_encoder(self, folder: Path) -> None:
        self.encoder.save(folder)

    def rationales(self, texts: list[str], **settings: Any) -> list[str]:
        """What is written for texts; takes what `encode` takes."""
        return [item.rationale for item in self.encoder.write(texts, **settings)]

    def encode_rationales(self, rationales: list[str], texts: list[str] | None = None) -> Tensor:
        """Vectors (N, H) of given rationales; see `RationaleEncoder.encode_rationales`."""
        return self.encoder.encode_rationales(rationales, texts)

    def get_embedding_dimension(self) -> int:
        reader = self.encoder.reader.sentence_encoder
        if reader is not None:
            return int(reader.get_embedding_dimension())
        return super().get_embedding_dimension()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)
        self.encoder.reader.device = torch.device(self.model.device)
        return moved
