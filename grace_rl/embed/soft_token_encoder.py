"""Texts to vectors through soft tokens: what soft-token refinement leaves behind.

The embedding after k steps is the mean of the first k steps' states, L2-normalised (arXiv
2509.24291), so that one run gives those of all smaller k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from grace_rl.embed.encoder_module import Encoded, EncoderModule, check_list, write_modules
from grace_rl.embed.settings import load_settings
from grace_rl.embed.soft_tokens import SoftTokens, running_mean, soft_tokens
from grace_rl.errors import UserError
from grace_rl.recipe.schema import Section
from grace_rl.rollout.generator import left_padded, like_lengths
from grace_rl.rollout.policy import load_outlined
from grace_rl.run.files import write_text

SETTINGS_FILE = "gircse.json"
CALM_STEPS = 2  # steps in a row that must change little before a text is done


class SoftTokenSettings(Section):
    """What the encoder must know besides the weights; `gircse.json` beside them.

    Attributes:
        gircse_steps: Soft tokens after each text, at least 0; 0 takes the state of the text's
            last token.
        soft_temperature: Of the soft tokens' softmax, above 0.
        max_text_tokens: Texts, what comes before them included, are cut here.
        instruction: What comes before a text unless a call says otherwise.
        query_instruction: The same for queries.
    """

    gircse_steps: int = Field(default=5, ge=0)
    soft_temperature: float = Field(default=1.0, gt=0)
    max_text_tokens: int = Field(default=512, ge=1)
    instruction: str = ""
    query_instruction: str = ""


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


class SoftTokenEncoder(EncoderModule):
    """Embeds texts by soft tokens, as many as one likes.

        model = SentenceTransformer("runs/<name>/model", trust_remote_code=True)
        model.encode(texts)                      # as many steps as the model was saved with
        model.encode(texts, gircse_steps=20)     # more, without training again
        model.encode(texts, gircse_steps=20, stop_above=0.999)    # until it stops changing

    Attributes:
        writes_rationales: False: its tokens are mixtures of words, which cannot be read as a text.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        settings: See there.
        batch_size: Texts per forward.
        folder: Where the model was loaded from, if it was.
    """

    writes_rationales = False
    forward_kwargs = {"gircse_steps", "stop_above"}

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: SoftTokenSettings | None = None,
        batch_size: int = 128,
        folder: Path | None = None,
    ) -> None:
        super().__init__(model, tokenizer, folder)
        self.settings = settings or SoftTokenSettings()
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "cpu",
        *,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> SoftTokenEncoder:
        """Load what training left in `runs/<name>/model`.

        Raises:
            UserError: The folder is no such model.
        """
        folder = Path(folder)
        if not (folder / SETTINGS_FILE).exists():
            raise UserError(f"{folder}: has no {SETTINGS_FILE}; give the model/ of a gircse run")
        settings = load_settings(SoftTokenSettings, folder / SETTINGS_FILE)
        model, tokenizer = load_outlined(folder, model_kwargs or {}, tokenizer_kwargs or {})
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the types
        return cls(model, tokenizer, settings, folder=folder).eval()

    def save_beside(self, folder: Path) -> None:
        """Write what `from_pretrained` and sentence-transformers need besides the model's files."""
        text = json.dumps(self.settings_told(), indent=2, ensure_ascii=False)
        write_text(folder / SETTINGS_FILE, text + "\n")
        write_modules(folder, SoftTokenEncoder, {"query": self.settings.query_instruction})

    def settings_told(self) -> dict[str, Any]:
        """What decides its vectors besides the files it was loaded from."""
        return self.settings.model_dump(mode="json")

    @property
    def max_seq_length(self) -> int:
        """Texts, what comes before them included, are cut to this many tokens; can be set."""
        return self.settings.max_text_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.settings = self.settings.changed(max_text_tokens=value)

    def encode(
        self,
        texts: Sequence[str],
        rationale: str | None = None,
        *,
        instruction: str | None = None,
        gircse_steps: int | None = None,
        stop_above: float | None = None,
        role: str | None = None,
    ) -> Encoded:
        """Unit vectors of texts; `lengths` says how many steps each text took.

        Args:
            texts: N texts.
            rationale: Nothing is written, whatever is said here.
            instruction: What comes before each text; None takes the settings'.
            role: `query` takes the settings' `query_instruction`.
            gircse_steps: Instead of the settings'.
            stop_above: A text is done once cos(z_k, z_(k-1)) has been above this for two steps in a
                row, -1 to 1; a batch runs until all of its texts are.

        Raises:
            UserError: A setting is wrong.
        """
        check_list(texts)
        if role == "query" and instruction is None:
            instruction = self.settings.query_instruction
        vectors = torch.zeros(len(texts), self.model.config.get_text_config().hidden_size)
        steps = torch.zeros(len(texts), dtype=torch.long)
        for places, found in self._runs(texts, gircse_steps, instruction, stop_above=stop_above):
            every = found.vectors().cpu()
            taken = torch.full((len(places),), found.states.size(1))
            if stop_above is not None and found.states.size(1):
                taken = stopping_steps(every, stop_above)[0]
            steps[places] = taken
            last = every[torch.arange(len(places)), (taken - 1).clamp(min=0)]
            vectors[places] = normalize(last, dim=-1)
        vectors[[place for place, text in enumerate(texts) if not text.strip()]] = 0.0
        return Encoded([], vectors, steps.tolist())

    def every_step(
        self, texts: Sequence[str], steps: int, *, instruction: str | None = None
    ) -> Tensor:
        """(N, K, H) unit vectors, [:, k - 1] after k steps; one run for all of them."""
        width = self.model.config.get_text_config().hidden_size
        vectors = torch.zeros(len(texts), max(steps, 1), width)
        for places, found in self._runs(texts, steps, instruction):
            vectors[places] = normalize(found.vectors(), dim=-1).cpu()
        return vectors

    def step_words(
        self,
        texts: Sequence[str],
        *,
        steps: int | None = None,
        count: int = 5,
        instruction: str | None = None,
    ) -> list[StepWords]:
        """The `count` most likely words of each soft token of each text."""
        results: dict[int, StepWords] = {}
        for places, found in self._runs(texts, steps, instruction, words=count):
            vectors = found.vectors()
            near = cosine_similarity(vectors[:, 1:], vectors[:, :-1], dim=-1).tolist()
            for row, place in enumerate(places):
                shares, ids = found.word_shares[row].tolist(), found.word_ids[row].tolist()
                words = [[str(self.tokenizer.decode([token])) for token in step] for step in ids]
                results[place] = StepWords(
                    text=texts[place],
                    words=[
                        list(zip(*pair, strict=True)) for pair in zip(words, shares, strict=True)
                    ],
                    entropy=found.entropy[row].tolist(),
                    cosine=[None, *near[row]][: len(ids)],
                )
        return [results[place] for place in range(len(texts))]

    @torch.no_grad()
    def _runs(
        self,
        texts: Sequence[str],
        steps: int | None,
        instruction: str | None,
        *,
        words: int = 0,
        stop_above: float | None = None,
    ) -> Iterator[tuple[list[int], SoftTokens]]:
        """Batches of texts of similar length, by their places."""
        check_list(texts)
        before = self.settings.instruction if instruction is None else instruction
        steps = self.settings.gircse_steps if steps is None else steps
        if steps < 0:
            raise UserError(f"gircse_steps: must be at least 0, not {steps}")

        def calm(states: Tensor) -> bool:
            if stop_above is None:
                raise RuntimeError("stop_above must be there")
            return bool(stopping_steps(running_mean(states), stop_above)[1].all())

        was_training = self.model.training
        self.model.eval()
        for places in like_lengths(texts, self.batch_size):
            whole = [before + texts[i] for i in places]
            with self.lock:
                tokens = tokenize_texts(self.tokenizer, whole, self.settings.max_text_tokens)
                found = soft_tokens(
                    self.model,
                    tokens["input_ids"].to(self.model.device),
                    tokens["attention_mask"].to(self.model.device),
                    steps,
                    temperature=self.settings.soft_temperature,
                    words=words,
                    until=None if stop_above is None else calm,
                )
            yield places, found
        self.model.train(was_training)


def tokenize_texts(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, T), padded on the left; no token is added.

    A text without any token becomes the tokenizer's end token.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows = [ids[:max_tokens] or [tokenizer.eos_token_id] for ids in encoded]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = left_padded(rows, pad)
    return {"input_ids": ids, "attention_mask": mask}


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
