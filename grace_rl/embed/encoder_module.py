"""What the encoders of this package have in common as sentence-transformers modules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from grace_rl.errors import UserError


class EncoderModule(InputModule):
    """The one module of a `SentenceTransformer` that hands whole texts to an encoder.

    A subclass says how its encoder is loaded and saved, names in `forward_kwargs` what
    `SentenceTransformer.encode(texts, ...)` may pass on to it, and is named in `modules.json`
    (`grace_rl.embed.modules_json.write_modules`). A prompt of sentence-transformers (`prompt`,
    `prompt_name`, those of `encode_query` and `encode_document`) reaches the encoder as
    `instruction`.

    Args:
        encoder: Has `model` (a transformers model), `tokenizer`, and an `encode(texts,
            instruction=..., **kwargs)` whose `.vectors` are (N, H) unit vectors.
    """

    save_in_root = True

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.model = encoder.model  # registered, so that `to(device)` moves it
        self.tokenizer = encoder.tokenizer

    @classmethod
    @abstractmethod
    def load_encoder(cls, folder: Path, device: str, **kwargs: Any) -> Any:
        """The encoder of a local folder.

        Args:
            folder: Where the model is.
            device: `cpu`; sentence-transformers moves the module afterwards.
            kwargs: `model_kwargs` and `tokenizer_kwargs`, for transformers.
        """

    @abstractmethod
    def save_encoder(self, folder: Path) -> None:
        """Write what the encoder needs besides model and tokenizer."""

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load from a folder or the hub; called by sentence-transformers."""
        folder = cls.load_dir_path(
            model_name_or_path,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        if folder is None:
            raise UserError(f"{model_name_or_path}: there is no such model")
        trust = {"trust_remote_code": trust_remote_code}
        encoder = cls.load_encoder(
            Path(folder),
            "cpu",
            model_kwargs=trust | (model_kwargs or {}),
            tokenizer_kwargs=trust | (processor_kwargs or {}),
        )
        return cls(encoder)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write model, tokenizer and the encoder's own files; called by sentence-transformers."""
        self.model.save_pretrained(output_path)
        self.encoder.tokenizer.save_pretrained(output_path)
        self.save_encoder(Path(output_path))

    def preprocess(  # type: ignore[override]
        self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Texts go on as they are: prompts are rendered by the encoder."""
        if wrong := next((item for item in inputs if not isinstance(item, str)), None):
            raise ValueError(f"this model embeds texts, not {type(wrong).__name__}")
        return {"texts": list(inputs), "instruction": prompt or None}

    @torch.no_grad()
    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Tensor | Any]:
        encoded = self.encoder.encode(
            features["texts"], instruction=features["instruction"], **kwargs
        )
        vectors = encoded.vectors.to(self.model.device)
        return {**features, "sentence_embedding": vectors}

    def get_embedding_dimension(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def get_config_dict(self) -> dict[str, Any]:
        return {}
