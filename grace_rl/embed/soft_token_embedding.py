"""The encoder that soft-token refinement leaves behind, as a sentence-transformers module.

model = SentenceTransformer("runs/<name>/model", trust_remote_code=True)
model.encode(texts)                          # as many steps as the model was saved with
model.encode(texts, gircse_steps=20)     # more, without training again
model.encode(texts, gircse_steps=20, stop_above=0.999)    # until it stops changing
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grace_rl.embed.encoder_module import EncoderModule
from grace_rl.embed.soft_token_encoder import SoftTokenEncoder


class SoftTokenEmbedding(EncoderModule):
    """Texts to unit vectors through soft tokens.

    What `SoftTokenEncoder` can do is at `model[0].encoder`: `encode` tells how many steps each text
    took, `every_step` gives the vectors after each, `step_words` says what they mean.
    """

    forward_kwargs = {"gircse_steps", "stop_above"}
    encoder: SoftTokenEncoder

    @classmethod
    def load_encoder(cls, folder: Path, device: str, **kwargs: Any) -> SoftTokenEncoder:
        return SoftTokenEncoder.from_pretrained(folder, device, **kwargs)

    def save_encoder(self, folder: Path) -> None:
        self.encoder.save(folder)
