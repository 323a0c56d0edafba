"""What encoders are: modules of sentence-transformers that take whole texts.

    model = SentenceTransformer("runs/quickstart/model", trust_remote_code=True)
    vectors = model.encode(texts)

Nothing of this package has to be imported for it: `modules.json` beside the model names the class
of the encoder, and sentence-transformers imports it if it is told to (since its version 6.0 also an
installed class only with that consent). transformers and vLLM go on loading the folder as a
language model.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grace_rl.embed.cache import ENCODER_FILES, model_fingerprint
from grace_rl.errors import UserError
from grace_rl.rollout.generator import OneAtATime
from grace_rl.run.files import write_text


@dataclass(frozen=True)
class Encoded:
    """Texts as an encoder sees them, in their order.

    Attributes:
        rationales: N strings; the texts themselves where none are written, empty for encoders that
            never write.
        vectors: (N, H) float32 on the CPU, unit length; zero for a blank text.
        lengths: N numbers of tokens, end tokens included.
    """

    rationales: list[str]
    vectors: Tensor
    lengths: list[int] = field(default_factory=list)


class Encoder(Protocol):
    """What every encoder can do, of this package or of another.

    Attributes:
        writes_rationales: Whether it writes something that can be read.
    """

    writes_rationales: bool

    def encode(
        self, texts: Sequence[str], rationale: Any = None, *, role: str | None = None
    ) -> Encoded:
        """Unit vectors of texts; the same text has the same vector, whatever it is encoded with.

        Args:
            texts: N texts.
            rationale: `greedy`, `sample` or `none`, for encoders that write.
            role: `query` or `document`, for encoders that tell them apart.
        """


class EncoderModule(InputModule):
    """The one module of a `SentenceTransformer`: an encoder that is handed whole texts.

    A subclass says how it is loaded (`from_pretrained`) and what it keeps beside the model
    (`save_beside`), and names in `forward_kwargs` what `SentenceTransformer.encode(texts, ...)` may
    pass on to its `encode`; `task`, of `encode_query` and `encode_document`, reaches it as `role`.
    A prompt of sentence-transformers (`prompt`, `prompt_name`, those of the two) reaches it as
    `instruction`.

    Several threads may use one encoder: it does one call after the other.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        folder: Where it was loaded from, if it was.
    """

    save_in_root = True
    encode: Callable[..., Encoded]

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
    ) -> None:
        super().__init__()
        self.model = model  # registered, so that `to(device)` moves it
        self.folder = folder
        self.lock = OneAtATime()
        self._tokenizer = tokenizer

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "cpu",
        *,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """The encoder of a local folder."""

    @abstractmethod
    def save_beside(self, folder: Path) -> None:
        """Write what the encoder needs besides the model's own files and the tokenizer's."""

    @abstractmethod
    def settings_told(self) -> dict[str, Any]:
        """What decides its vectors besides the files it was loaded from, as plain data."""

    # -- for sentence-transformers ---------------------------------

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
        return cls.from_pretrained(
            folder,
            model_kwargs=trust | (model_kwargs or {}),
            tokenizer_kwargs=trust | (processor_kwargs or {}),
        )

    def save(self, output_path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a folder that loads again: model, tokenizer and what is beside them."""
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise UserError(
                "the model has an adapter, which alone would be saved; merge it into the weights"
            )
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        self.save_beside(Path(output_path))

    def on_model_ready(self, model: Any) -> None:
        """Give the model a name and a digest of all that decides its vectors.

        mteb files results under both. Without them all models of a machine would share one entry.
        """
        card: Any = model.model_card_data
        if self.folder is not None and hasattr(card, "base_model_revision"):
            card.__class__ = _Card
            card.encoder = self
            card.model_name = model_name(self.folder)

    def preprocess(  # type: ignore[override]
        self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Texts go on as they are: prompts are rendered by the encoder."""
        if wrong := next((item for item in inputs if not isinstance(item, str)), None):
            raise UserError(f"this model embeds texts, not {type(wrong).__name__}")
        return {"texts": list(inputs), "instruction": prompt or None}

    @torch.no_grad()
    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Tensor | Any]:
        if self.training:
            raise UserError(
                "this encoder is not trained through sentence-transformers, which knows nothing of "
                "what it writes; grace-rl train does"
            )
        role = kwargs.pop("task", None)  # of encode_query and encode_document
        encoded = self.encode(
            features["texts"], instruction=features["instruction"], role=role, **kwargs
        )
        device = next(self.model.parameters()).device
        return _Features({**features, "sentence_embedding": encoded.vectors.to(device)})

    def get_sentence_features(self, *features: Any) -> dict[str, Tensor]:
        raise UserError(
            "texts are not tokenized before they are written for; there are no features"
        )

    def get_embedding_dimension(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def get_config_dict(self) -> dict[str, Any]:
        return self.settings_told()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # type: ignore[override]
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        raise UserError("the tokenizer belongs to the model that writes and cannot be replaced")

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    @abstractmethod
    def max_seq_length(self) -> int:
        """Texts are cut to this many tokens; can be set."""

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None: ...


class _Card(SentenceTransformerModelCardData):
    """A model card whose revision is the encoder's digest, made when it is asked for."""

    encoder: EncoderModule

    @property
    def base_model_revision(self) -> str:  # type: ignore[override]
        if self.encoder.folder is None:
            raise RuntimeError("encoder.folder must be there")
        told = json.dumps(self.encoder.settings_told(), sort_keys=True, default=str)
        files = model_fingerprint(self.encoder.folder, ENCODER_FILES)
        return hashlib.sha256((files + told).encode()).hexdigest()[:32]

    @base_model_revision.setter
    def base_model_revision(self, value: str | None) -> None:
        """It follows the encoder."""


class _Features(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        raise UserError(
            f"output_value: this model has no {key}: a vector is of the whole text and of what was "
            "written for it"
        )


def check_list(texts: Sequence[str]) -> None:
    """Raises UserError for a single text where a list is asked for."""
    if isinstance(texts, str):  # its characters would be taken for texts
        raise UserError(f"give a list of texts, not one text: [{texts[:40]!r}]")


def model_name(folder: Path) -> str:
    """What results call a model: `local/<run>` for `runs/<run>/model`."""
    path = folder.resolve()
    name = path.parent.name if path.name == "model" and path.parent.name else path.name
    return f"local/{name}"


def write_modules(
    folder: Path, module: type[EncoderModule], prompts: Mapping[str, str] | None = None
) -> None:
    """Write `modules.json` and `config_sentence_transformers.json` beside a model.

    Args:
        folder: The model's folder.
        module: The encoder's class.
        prompts: Instructions by name; `query` and `document` are those of `encode_query` and
            `encode_document`. An empty one keeps the instruction that the model was trained with.
    """
    name = f"{module.__module__}.{module.__qualname__}"
    modules = [{"idx": 0, "name": "0", "path": "", "type": name}]
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
