"""Language models that write candidates and give log-probabilities: transformers, or vLLM.

Candidates come from `grace_rl.rollout.generator`: what a prompt gets depends on the prompt and the
seed alone, so that a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import gc
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LogitsProcessor

from grace_rl.data import scenes
from grace_rl.errors import UserError, first_line
from grace_rl.recipe.curation import GenerateStep
from grace_rl.rollout.generator import (
    Continuation,
    Generator,
    Sampling,
    TransformersGenerator,
    VLLMGenerator,
    end_token_ids,
    left_padded,
    like_lengths,
)
from grace_rl.rollout.policy import SCENES_COLD_START, load_policy

Tokens = Sequence[int]


class Candidate(NamedTuple):
    """What was written: its text, and whether it came to an end of its own."""

    text: str
    ended: bool


class LanguageModel(ABC):
    """Writes candidates and gives log-probabilities.

    Args:
        tokenizer: Of the model.
        generator: Continues prompts.

    Attributes:
        sentence_ends: Tokens with a line break in them, or a full stop, exclamation or question
            mark at the end.
    """

    def __init__(self, tokenizer: Any, generator: Generator) -> None:
        self.tokenizer, self.generator = tokenizer, generator
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.sentence_ends = tuple(
            token
            for token, text in enumerate(texts)
            if "\n" in text or text.rstrip("\"'\u201d\u2019)").endswith((".", "!", "?"))
        )

    def write(
        self,
        prompts: Sequence[Tokens],
        step: GenerateStep,
        seed: int = 0,
        opposites: Sequence[Tokens] = (),
    ) -> list[list[Candidate]]:
        """The candidates of each prompt, the greedy one first.

        Args:
            prompts: Token ids.
            step: How. With `prompts: completion` a candidate ends with its sentence or line: base
                models go on and on.
            seed: Of the samples.
            opposites: The prompts of the opposite instruction, for `omega`.
        """
        stop_ids = self.sentence_ends if step.prompts == "completion" else ()
        ways = [Sampling(step.max_tokens, stop_ids=stop_ids)] if step.greedy else []
        if step.candidates:
            more = (step.temperature, step.top_p, seed, step.candidates, stop_ids)
            ways.append(Sampling(step.max_tokens, *more))
        written: list[list[Candidate]] = [[] for _ in prompts]
        for how in ways:
            continued = self._continue(prompts, how, opposites if step.omega else (), step.omega)
            for candidates, found in zip(written, continued, strict=True):
                for ids, ended in found:
                    text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                    candidates.append(Candidate(text, ended))
        return written

    def _continue(
        self, prompts: Sequence[Tokens], how: Sampling, opposites: Sequence[Tokens], omega: float
    ) -> list[list[Continuation]]:
        return self.generator.generate(prompts, how)

    @abstractmethod
    def next_logprobs(self, prompts: Sequence[Tokens], tokens: Tokens) -> Tensor:
        """(N, K) log-probabilities of K tokens, each as the next one of N prompts."""

    @abstractmethod
    def mean_logprobs(
        self, prompts: Sequence[Tokens], continuations: Sequence[Tokens]
    ) -> list[float]:
        """Mean log-probability of a continuation's tokens after its prompt, in nats."""


class TransformersModel(LanguageModel):
    """transformers' own generation.

    Args:
        path: Folder or hub id.
        dtype: `auto` or the name of one of torch's.
        batch_size: Sequences per forward.

    Raises:
        UserError: There is no such model.
    """

    generator: TransformersGenerator

    def __init__(self, path: str, dtype: str = "auto", batch_size: int = 64) -> None:
        self.model, tokenizer = load_policy(path, dtype=dtype)
        self.model.eval()
        if torch.cuda.is_available():
            self.model.to("cuda")  # type: ignore[arg-type]  # transformers' own annotation
        ends = end_token_ids(self.model.generation_config, tokenizer)
        pad = int(tokenizer.pad_token_id)
        super().__init__(tokenizer, TransformersGenerator(self.model, pad, ends, batch_size))

    def _continue(
        self, prompts: Sequence[Tokens], how: Sampling, opposites: Sequence[Tokens], omega: float
    ) -> list[list[Continuation]]:
        def opposed(rows: list[int]) -> list[LogitsProcessor]:
            ids, mask = self._padded([opposites[i] for i in rows])
            return [_Contrast(self.model, ids, mask, omega)]

        return self.generator.generate(prompts, how, opposed if opposites else None)

    @torch.no_grad()
    def next_logprobs(self, prompts: Sequence[Tokens], tokens: Tokens) -> Tensor:
        logprobs = torch.zeros(len(prompts), len(tokens))
        for rows in like_lengths(prompts, self.generator.batch_size):
            ids, mask = self._padded([prompts[i] for i in rows])
            logits = _forward(self.model, ids, mask, logits_to_keep=1).logits[:, -1]
            logprobs[rows] = logits.float().log_softmax(-1)[:, list(tokens)].cpu()
        return logprobs

    @torch.no_grad()
    def mean_logprobs(
        self, prompts: Sequence[Tokens], continuations: Sequence[Tokens]
    ) -> list[float]:
        whole = [[*prompt, *more] for prompt, more in zip(prompts, continuations, strict=True)]
        means = [0.0] * len(whole)
        for rows in like_lengths(whole, self.generator.batch_size):
            ids, mask = self._padded([whole[i] for i in rows])
            keep = max(len(continuations[i]) for i in rows) + 1
            logits = _forward(self.model, ids, mask, logits_to_keep=keep).logits[:, :-1]
            logprobs = logits.float().log_softmax(-1)
            picked = logprobs.gather(2, ids[:, -logprobs.size(1) :, None])[:, :, 0].cpu()
            for row, i in zip(picked, rows, strict=True):
                means[i] = float(row[len(row) - len(continuations[i]) :].mean())
        return means

    def _padded(self, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        ids, mask = left_padded(rows, self.generator.pad_id)
        return ids.to(self.model.device), mask.to(self.model.device)


class _Contrast(LogitsProcessor):
    """log p - omega log q, with q the chances (B, V) after the opposite prompts."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, omega: float) -> None:
        self.model, self.ids, self.mask, self.omega = model, ids, mask, omega
        self.past: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self.past is not None:
            self.ids = input_ids[:, -1:]
            self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)
        done = _forward(self.model, self.ids, self.mask, past_key_values=self.past, use_cache=True)
        self.past = done.past_key_values
        return scores.log_softmax(-1) - self.omega * done.logits[:, -1].float().log_softmax(-1)


def _forward(model: Any, ids: Tensor, mask: Tensor, **keywords: Any) -> Any:
    """The model on rows that are padded left: every text's positions begin with 0."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        keywords["position_ids"] = positions[:, -ids.size(1) :]
    return model(input_ids=ids, attention_mask=mask, **keywords)


class VLLMModel(LanguageModel):
    """One vLLM engine; all prompts of a call go to it at once.

    Args:
        path: Folder or hub id.
        dtype: `auto` or the name of one of torch's.
        batch_size: Not used; vLLM makes its own batches.

    Raises:
        UserError: vLLM is not installed, or there is no such model.
    """

    generator: VLLMGenerator

    def __init__(self, path: str, dtype: str = "auto", batch_size: int = 0) -> None:
        try:
            config = AutoConfig.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"model_name_or_path: cannot load {path!r}: {reason}") from error
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
        ends = end_token_ids(generation, tokenizer)
        prefixes = {"enable_prefix_caching": True}
        super().__init__(tokenizer, VLLMGenerator(path, ends, dtype=dtype, **prefixes))

    def next_logprobs(self, prompts: Sequence[Tokens], tokens: Tokens) -> Tensor:
        done = self._read(prompts, logprob_token_ids=list(tokens))
        return torch.tensor(
            [[output.outputs[0].logprobs[0][t].logprob for t in tokens] for output in done]
        )

    def mean_logprobs(
        self, prompts: Sequence[Tokens], continuations: Sequence[Tokens]
    ) -> list[float]:
        whole = [[*prompt, *more] for prompt, more in zip(prompts, continuations, strict=True)]
        means = []
        for output, prompt, ids in zip(
            self._read(whole, prompt_logprobs=0), prompts, whole, strict=True
        ):
            logprobs = [
                output.prompt_logprobs[n][ids[n]].logprob for n in range(len(prompt), len(ids))
            ]
            means.append(sum(logprobs) / len(logprobs))
        return means

    def _read(self, prompts: Sequence[Tokens], **settings: Any) -> list[Any]:
        settings |= {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        return self.generator.run(prompts, [settings] * len(prompts))


class Models:
    """Loads a model when it is asked for, and lets go of the last one."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._model: LanguageModel | None = None

    def load(self, name: str, engine: str, dtype: str, batch_size: int) -> LanguageModel:
        """The model, the one that is loaded if it is the same.

        Raises:
            UserError: There is no such model or engine.
        """
        key = (name, engine, dtype, batch_size)
        if self._model is None or key != self._key:
            self._model = None
            gc.collect()
            self._key = key
            kind = VLLMModel if engine == "vllm" else TransformersModel
            path = str(scenes.COLD_START) if name == SCENES_COLD_START else name
            self._model = kind(path, dtype, batch_size)
        return self._model
