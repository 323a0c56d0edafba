"""The encoder that soft-token refinement leaves behind: a sentence-transformers module.

    model = SentenceTransformer("runs/<name>/model")
    model.encode(texts)                          # as many steps as the model was saved with
    model.encode(texts, refinement_steps=20)     # more, without training again
    model.encode(texts, refinement_steps=20, stop_above=0.999)    # where it stops changing

The embedding after k steps is the mean of the first k steps' states, L2-normalised (arXiv
2509.24291), so one run gives those of all smaller k: `every_step`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl.embed.soft_tokens import SoftTokens, running_mean, soft_tokens
from grace_rl.files import write_text

CALM_STEPS = 2  # steps in a row that must change little before a text is done


@dataclass(frozen=True)
class StepWords:
    """What a text's steps say.

    Attributes:
        text: The text.
        words: For each step the most likely vocabulary items and their shares, best first.
        entropy: Of each step's whole distribution, in nats.
        cosine: Between the embeddings after this step and the one before; None for the first.
    """

    text: str
    words: list[list[tuple[str, float]]]
    entropy: list[float]
    cosine: list[float | None]


class SoftTokenEmbedding(InputModule):
    """Texts to unit vectors through soft tokens.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        refinement_steps: Soft tokens after each text, at least 0; 0 takes the state of the text's
            last token.
        temperature: Of the soft tokens' softmax, above 0.
        max_text_tokens: Texts, prompt included, are cut here.
    """

    config_file_name = "soft_token_embedding.json"
    config_keys = ["refinement_steps", "temperature", "max_text_tokens"]  # noqa: RUF012
    forward_kwargs = {"refinement_steps", "stop_above"}  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        refinement_steps: int = 5,
        temperature: float = 1.0,
        max_text_tokens: int = 512,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.refinement_steps = refinement_steps
        self.temperature = temperature
        self.max_text_tokens = max_text_tokens

    # -- what sentence-transformers calls ---------------------------------

    @property
    def max_seq_length(self) -> int:
        return self.max_text_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.max_text_tokens = value

    def get_embedding_dimension(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Token ids and attention mask (B, T) of `prompt + text`, padded on the left."""
        texts = [(prompt or "") + text for text in inputs]
        return tokenize_texts(self.tokenizer, texts, self.max_text_tokens)

    def forward(
        self,
        features: dict[str, Any],
        refinement_steps: int | None = None,
        stop_above: float | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, H) and `steps` (B), how many steps each text took.

        Args:
            features: From `preprocess`.
            refinement_steps: Instead of the module's own.
            stop_above: A text is done once cos(z_k, z_(k-1)) has been above this for two steps in a
                row, -1 to 1; a batch runs until all of its texts are.
        """
        steps = self.refinement_steps if refinement_steps is None else refinement_steps

        def calm(states: Tensor) -> bool:
            assert stop_above is not None
            return bool(stopping_steps(running_mean(states), stop_above)[1].all())

        found = soft_tokens(
            self.model,
            features["input_ids"],
            features["attention_mask"],
            steps,
            temperature=self.temperature,
            until=None if stop_above is None else calm,
        )
        vectors = found.vectors()
        taken = torch.full((len(vectors),), found.states.size(1), device=vectors.device)
        if stop_above is not None and steps:
            taken = stopping_steps(vectors, stop_above)[0]
        last = vectors[torch.arange(len(vectors), device=taken.device), (taken - 1).clamp(min=0)]
        features["sentence_embedding"] = normalize(last, dim=-1)
        features["steps"] = taken
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.model.save_pretrained(output_path)
        self.save_tokenizer(output_path)
        self.save_config(output_path)

    @classmethod
    def load(  # type: ignore[override]  # the rest goes on by name
        cls, model_name_or_path: str, *, model_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> SoftTokenEmbedding:
        """As sentence-transformers calls it; `model_kwargs` go to `from_pretrained`."""
        names = ("token", "cache_folder", "revision", "local_files_only")
        hub = {name: kwargs[name] for name in names if name in kwargs}
        settings = cls.load_config(model_name_or_path, **hub)
        hub["cache_dir"] = hub.pop("cache_folder", None)
        keywords = hub | (model_kwargs or {})
        model = AutoModelForCausalLM.from_pretrained(model_name_or_path, **keywords)
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **hub)
        return cls(model, tokenizer, **settings)

    # -- what the steps give ---------------------------------

    def every_step(
        self, texts: Sequence[str], steps: int, *, prompt: str = "", batch_size: int = 128
    ) -> Tensor:
        """(N, K, H) unit vectors on the CPU, [:, k - 1] after k steps; one run for all of them."""
        vectors = torch.zeros(len(texts), max(steps, 1), self.get_embedding_dimension())
        for places, found in self._runs(texts, steps, prompt, batch_size):
            vectors[places] = normalize(found.vectors(), dim=-1).cpu()
        return vectors

    def step_words(
        self, texts: Sequence[str], *, steps: int | None = None, count: int = 5, prompt: str = ""
    ) -> list[StepWords]:
        """The most likely words of each soft token of each text."""
        steps = self.refinement_steps if steps is None else steps
        results: dict[int, StepWords] = {}
        for places, found in self._runs(texts, steps, prompt, 128, count):
            vectors = found.vectors()
            near = cosine_similarity(vectors[:, 1:], vectors[:, :-1], dim=-1).tolist()
            for row, place in enumerate(places):
                shares = found.word_shares[row].tolist()
                ids = found.word_ids[row].tolist()
                results[place] = StepWords(
                    text=texts[place],
                    words=[
                        [(str(self.tokenizer.decode([i])), s) for i, s in zip(*step, strict=True)]
                        for step in zip(ids, shares, strict=True)
                    ],
                    entropy=found.entropy[row].tolist(),
                    cosine=[None, *near[row]][: len(ids)],
                )
        return [results[place] for place in range(len(texts))]

    @torch.no_grad()
    def _runs(
        self, texts: Sequence[str], steps: int, prompt: str, batch_size: int, words: int = 0
    ) -> Iterator[tuple[list[int], SoftTokens]]:
        """Batches of texts of similar length, by their places."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        was_training = self.model.training
        self.model.eval()
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            features = self.preprocess([texts[i] for i in places], prompt)
            found = soft_tokens(
                self.model,
                features["input_ids"].to(self.model.device),
                features["attention_mask"].to(self.model.device),
                steps,
                temperature=self.temperature,
                words=words,
            )
            yield places, found
        self.model.train(was_training)


def tokenize_texts(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    """Token ids and attention mask (B, T), padded on the left; no token is added.

    A text without any token becomes the tokenizer's end token.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows = [ids[:max_tokens] or [tokenizer.eos_token_id] for ids in encoded]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


def stopping_steps(vectors: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Where each text's embedding has stopped changing.

    Args:
        vectors: (B, K, H) the embeddings after each step.
        threshold: cos(z_k, z_(k-1)) must be above it for two steps in a row.

    Returns:
        (B) the step, K where it never does, and (B) whether it does.

    >>> angles = torch.tensor([[0.0, 1.0, 1.01, 1.02, 2.0]])
    >>> stopping_steps(torch.stack([angles.cos(), angles.sin()], -1), 0.99)
    (tensor([4]), tensor([True]))
    """
    near = cosine_similarity(vectors[:, 1:], vectors[:, :-1], dim=-1) > threshold  # steps 2 .. K
    if near.size(1) < CALM_STEPS:
        never = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        return torch.full_like(never, vectors.size(1), dtype=torch.long), never
    calm = near[:, 1:] & near[:, :-1]  # steps 3 .. K
    stopped = calm.any(1)
    return torch.where(stopped, calm.int().argmax(1) + 3, vectors.size(1)), stopped


def sentence_transformer(
    module: SoftTokenEmbedding, prompts: dict[str, str] | None = None
) -> SentenceTransformer:
    """The module as a model; `prompts` has `query` and `document`.

    `encode` puts a prompt first by itself where both are the same.
    """
    return SentenceTransformer(
        modules=[module],
        prompts=prompts,
        default_prompt_name=_default_prompt(prompts or {}),
        device=str(module.model.device),
    )


def _default_prompt(prompts: dict[str, str]) -> str | None:
    return "query" if len(set(prompts.values())) == 1 else None


def write_module_files(module: SoftTokenEmbedding, folder: Path, prompts: dict[str, str]) -> None:
    """Write what `SentenceTransformer(folder)` needs beside the model and the tokenizer."""
    module.save_config(str(folder))
    kind = f"{SoftTokenEmbedding.__module__}.{SoftTokenEmbedding.__qualname__}"
    modules = [{"idx": 0, "name": "0", "path": "", "type": kind}]
    write_text(folder / "modules.json", json.dumps(modules, indent=2) + "\n")
    config = {
        "model_type": "SentenceTransformer",
        "prompts": prompts,
        "default_prompt_name": _default_prompt(prompts),
        "similarity_fn_name": "cosine",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_text(folder / "config_sentence_transformers.json", text + "\n")
