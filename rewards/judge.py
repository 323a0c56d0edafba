"""A language model behind an HTTP endpoint grades each rationale."""

from __future__ import annotations

import asyncio
import os
import re
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import torch

from grace_rl.reward import RewardBatch, RewardOutput

_NUMBER = re.compile(r"\d+")


class Judge:
    """The grade, 0 to 1, that a judge gives a rationale for its text.

    In plain words: each rollout is one question to a chat model; the first whole number of the
    answer, divided by `best_grade`, is the reward. Rollouts with the same text and rationale are
    asked once. Calls run `concurrency` at a time, each has a time limit, and calls that fail for a
    passing reason (no connection, time-out, HTTP 408, 409, 429, 5xx) are tried again with
    exponential backoff; all that is OpenAI's client library.

    Args:
        model: the judge's name at the endpoint.
        base_url: an endpoint that speaks OpenAI's chat protocol, such as `vllm serve`.
        api_key_variable: the environment variable that holds the key; None needs no key. The key
            itself never stands in a recipe, because runs keep their recipe.
        concurrency: calls at a time, at least 1; 8 to 64 is usual.
        call_timeout: seconds for one question; the recipe's `timeout` is for the whole batch.
        retries: tries after the first, 0 to 10.
        skip_failures: True leaves a rollout whose call failed for good unscored; False ends the run
            (or, with `on_error: abstain`, leaves the whole batch unscored). If every call of a
            batch fails, the reward fails either way.
        best_grade: the best grade; grades above it count as it.
        max_answer_tokens: of an answer.
        price_per_million: price of a million tokens, [prompt, answer], in any currency.
        max_cost: the reward fails when this process has spent so much; None never.

    Attributes:
        spent: what this process's calls have cost so far, in the currency of the prices.

    Requirements: `pip install 'grace-rl[judge]'`, and an endpoint. No columns.

    Recommendations: a weight of 0.1 to 0.5 beside `contrastive`, `temperature` of the policy high
    enough that grades differ inside groups. A judge can be talked to by the rationale it grades;
    look at what wins.

    Relations: the remote reward among the shipped ones; `format` and `length` are free.

    Components: `prompt_tokens`, `answer_tokens`, `cost` of each rollout's call, and `failed`.
    """

    instruction = (
        "You grade short notes that were written about a text. Answer with one whole number from 0 "
        "(useless or wrong) to 10 (names everything that matters in the text, and nothing else)."
    )

    def __init__(
        self,
        model: str,
        base_url: str = "http://127.0.0.1:8000/v1",
        api_key_variable: str | None = None,
        concurrency: int = 8,
        call_timeout: float = 30.0,
        retries: int = 3,
        skip_failures: bool = False,
        best_grade: int = 10,
        max_answer_tokens: int = 16,
        price_per_million: list[float] | None = None,
        max_cost: float | None = None,
    ) -> None:
        self.check(
            base_url=base_url,
            api_key_variable=api_key_variable,
            concurrency=concurrency,
            call_timeout=call_timeout,
            retries=retries,
            best_grade=best_grade,
            max_answer_tokens=max_answer_tokens,
            price_per_million=price_per_million,
            max_cost=max_cost,
        )
        import openai

        key = os.environ[api_key_variable] if api_key_variable is not None else "none"
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=key, timeout=call_timeout, max_retries=retries
        )
        self._slots = asyncio.Semaphore(concurrency)
        self.model = model
        self.skip_failures = skip_failures
        self.best_grade = best_grade
        self.max_answer_tokens = max_answer_tokens
        self.prices = price_per_million or [0.0, 0.0]
        self.max_cost = max_cost
        self.spent = 0.0

    @staticmethod
    def check(
        base_url: str,
        api_key_variable: str | None,
        concurrency: int,
        call_timeout: float,
        retries: int,
        best_grade: int,
        max_answer_tokens: int,
        price_per_million: list[float] | None,
        max_cost: float | None,
        **others: Any,
    ) -> None:
        problems = []
        if urlsplit(base_url).scheme not in ("http", "https"):
            problems.append(f"base_url must begin with http:// or https://, not {base_url!r}")
        if concurrency < 1 or best_grade < 1 or max_answer_tokens < 1:
            problems.append("concurrency, best_grade and max_answer_tokens must be at least 1")
        if not call_timeout > 0 or not 0 <= retries <= 10:
            problems.append("call_timeout must be above 0, and retries from 0 to 10")
        prices = price_per_million or [0.0, 0.0]
        if len(prices) != 2 or min(prices) < 0:
            problems.append("price_per_million must be [prompt, answer], neither below 0")
        if max_cost is not None and not any(prices):
            problems.append("max_cost needs price_per_million")
        if api_key_variable is not None and not os.environ.get(api_key_variable):
            problems.append(f"the environment variable {api_key_variable} is not set")
        if find_spec("openai") is None:
            problems.append("it needs the package openai: pip install 'grace-rl[judge]'")
        if problems:
            raise ValueError("\n".join(problems))

    def messages(self, text: str, rationale: str) -> list[dict[str, str]]:
        """What the judge is asked."""
        question = f"Text:\n{text}\n\nNote:\n{rationale}\n\nGrade:"
        return [
            {"role": "system", "content": self.instruction},
            {"role": "user", "content": question},
        ]

    def grade(self, answer: str) -> float | None:
        """0 to 1 from an answer; None where it has no number."""
        found = _NUMBER.search(answer)
        return min(int(found[0]), self.best_grade) / self.best_grade if found else None

    async def __call__(self, batch: RewardBatch) -> RewardOutput:
        if self.max_cost is not None and self.spent >= self.max_cost:
            raise RuntimeError(f"the judge has cost {self.spent:.4g}, and max_cost is reached")
        keys = list(zip(batch.texts, batch.rationales, strict=True))
        asked = list(dict.fromkeys(keys))
        # Every call ends by itself, so none goes on unseen behind a failed sibling.
        answers = await asyncio.gather(*(self._ask(*key) for key in asked), return_exceptions=True)
        results: dict[tuple[str, str], tuple[float | None, int, int]] = {}
        failures: list[BaseException] = []
        for key, answer in zip(asked, answers, strict=True):
            if isinstance(answer, BaseException):
                failures.append(answer)
                results[key] = (None, 0, 0)
            else:
                results[key] = answer
        first = {key: i for i, key in reversed(list(enumerate(keys)))}  # who pays for a call
        paid = [results[key][1:] if first[key] == i else (0, 0) for i, key in enumerate(keys)]
        tokens = batch.embeddings.new_tensor(paid)  # (B, 2) prompt, answer
        cost = (tokens * tokens.new_tensor(self.prices)).sum(1) / 1e6
        self.spent += float(cost.sum())
        if failures and (not self.skip_failures or len(failures) == len(asked)):
            raise RuntimeError(
                f"{len(failures)} of {len(asked)} calls to {self._client.base_url} failed; "
                f"the first: {type(failures[0]).__name__}: {failures[0]}"
            ) from failures[0]
        failed = {
            key
            for key, answer in zip(asked, answers, strict=True)
            if isinstance(answer, BaseException)
        }
        return RewardOutput(
            values=[results[key][0] for key in keys],
            components={
                "prompt_tokens": tokens[:, 0],
                "answer_tokens": tokens[:, 1],
                "cost": cost,
                "failed": torch.tensor([float(key in failed) for key in keys]),
            },
        )

    async def _ask(self, text: str, rationale: str) -> tuple[float | None, int, int]:
        """Grade, prompt tokens and answer tokens of one call."""
        messages: Any = self.messages(text, rationale)
        async with self._slots:
            answer = await self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                max_completion_tokens=self.max_answer_tokens,
                temperature=0.0,
            )
        usage = answer.usage
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (0, 0)
        return self.grade(answer.choices[0].message.content or ""), *counts
