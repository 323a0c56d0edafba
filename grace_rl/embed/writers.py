"""Who continues the prompts: transformers, or vLLM. Both take tokens and give tokens.

A sample is a function of its prompt and of the seed alone: each row draws from a generator of its
own, so that neither the batch nor the order of the texts changes what is written. The two engines
draw differently, so that their samples differ; their greedy rationales are the same up to ties
within rounding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from grace_rl.errors import UserError
from grace_rl.rollout.engines import CPU_DEFAULTS, vllm_runs_on_cpu

RationaleMode = Literal["none", "greedy", "sample"]
Engine = Literal["auto", "transformers", "vllm"]
VLLM_SPARE_TOKENS = 1024  # room in the engine for rationales longer than it was built for
VLLM_GPU_SHARE = 0.5  # the reader's copy of the policy is on the same GPU


@dataclass(frozen=True)
class Writing:
    """What is written for a text.

    Args:
        rationale: `greedy`, `sample`, or `none`: the text is read in the rationale's place.
        max_rationale_tokens: Longest rationale, at least 1.
        temperature: Of `sample`, above 0.
        seed: Of `sample`.
        instruction: System message in place of the one the policy was trained with; None keeps it.

    Raises:
        UserError: With every mistake in the values.
    """

    rationale: RationaleMode
    max_rationale_tokens: int
    temperature: float = 1.0
    seed: int = 0
    instruction: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.rationale not in get_args(RationaleMode):
            known = ", ".join(get_args(RationaleMode))
            problems.append(f"rationale: must be one of {known}, not {self.rationale!r}")
        if self.max_rationale_tokens < 1:
            problems.append(
                f"max_rationale_tokens: must be at least 1, not {self.max_rationale_tokens}"
            )
        if not self.temperature > 0:
            problems.append(
                f"temperature: must be above 0, not {self.temperature}; greedy needs none"
            )
        if problems:
            raise UserError(problems)


class Writer(Protocol):
    """Continues prompts."""

    name: str

    def write(self, prompts: Sequence[list[int]], how: Writing) -> list[list[int]]:
        """Continuations in the order of the prompts, each up to and including its end token."""


class TransformersWriter:
    """`generate` of transformers, prompts of like length together.

    Args:
        model: The policy.
        pad_id: Token id that fills up rows.
        end_ids: Token ids that end a rationale.
        batch_size: Prompts per batch.
    """

    name = "transformers"

    def __init__(
        self, model: PreTrainedModel, pad_id: int, end_ids: Sequence[int], batch_size: int = 256
    ) -> None:
        self.model = model
        self.pad_id = pad_id
        self.end_ids = list(end_ids)
        self.batch_size = batch_size

    @torch.no_grad()
    def write(self, prompts: Sequence[list[int]], how: Writing) -> list[list[int]]:
        written: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        was_training = self.model.training
        self.model.eval()
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for i, ids in zip(
                chosen, self._continue([prompts[i] for i in chosen], how), strict=True
            ):
                written[i] = ids
        self.model.train(was_training)
        return written

    def _continue(self, prompts: list[list[int]], how: Writing) -> list[list[int]]:
        width = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        attention = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        processors = LogitsProcessorList()
        if how.rationale == "sample":
            processors.append(_OwnNoise([prompt_seed(how.seed, p) for p in prompts], how, device))
        generated = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=attention,
            max_new_tokens=how.max_rationale_tokens,
            logits_processor=processors,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self.end_ids,
            pad_token_id=self.pad_id,
        )
        return [until_end(row, self.end_ids) for row in generated[:, width:].tolist()]


class _OwnNoise(LogitsProcessor):
    """Gumbel noise of its own for each row: the argmax of the sum is a sample of the softmax."""

    def __init__(self, seeds: Sequence[int], how: Writing, device: torch.device) -> None:
        self.temperature = how.temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log()


class VLLMWriter:
    """One vLLM engine, started at the first write; all prompts of a call go to it at once.

    Args:
        folder: The model's folder.
        end_ids: Token ids that end a rationale.
        longest: Tokens of the longest prompt and rationale together.
        dtype: Of the weights.

    Raises:
        UserError: vLLM is not installed.
    """

    name = "vllm"

    def __init__(
        self, folder: Path, end_ids: Sequence[int], longest: int, dtype: torch.dtype
    ) -> None:
        self.folder = folder
        self.end_ids = list(end_ids)
        self.longest = longest
        self.dtype = dtype
        self._engine: Any = None
        if not vllm_is_installed():
            raise UserError("engine: vllm is not installed; pip install grace-rl[vllm]")

    def write(self, prompts: Sequence[list[int]], how: Writing) -> list[list[int]]:
        engine = self._started()
        from vllm import SamplingParams, TokensPrompt

        settings: dict[str, Any] = {
            "max_tokens": how.max_rationale_tokens,
            "stop_token_ids": self.end_ids,
            "detokenize": False,
            "temperature": how.temperature if how.rationale == "sample" else 0.0,
        }
        params: Any = SamplingParams(**settings)
        if how.rationale == "sample":
            params = [SamplingParams(**settings, seed=prompt_seed(how.seed, p)) for p in prompts]
        done = engine.generate(
            [TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False
        )
        return [until_end(list(output.outputs[0].token_ids), self.end_ids) for output in done]

    def _started(self) -> Any:
        if self._engine is not None:
            return self._engine
        keywords: dict[str, Any] = {"gpu_memory_utilization": VLLM_GPU_SHARE}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if vllm_runs_on_cpu():
            for name, value in CPU_DEFAULTS.items():
                os.environ.setdefault(name, value)
            keywords = {"enforce_eager": True}
        from transformers import AutoConfig
        from vllm import LLM

        limit = AutoConfig.from_pretrained(self.folder).max_position_embeddings
        dtype: Any = str(self.dtype).removeprefix("torch.")
        self._engine = LLM(
            str(self.folder),
            runner="generate",
            dtype=dtype,
            max_model_len=min(limit, self.longest + VLLM_SPARE_TOKENS),
            generation_config="vllm",  # no temperature of the model's own
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **keywords,
        )
        return self._engine


def vllm_is_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("vllm") is not None


def prompt_seed(seed: int, prompt: Sequence[int]) -> int:
    """The seed of one prompt's own draws, 0 to 2^63 - 1."""
    digest = blake2b(repr((seed, list(prompt))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens up to and including the first end token.

    >>> until_end([5, 6, 2, 0, 0], [2])
    [5, 6, 2]
    """
    ends = [i for i, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0] + 1] if ends else ids
