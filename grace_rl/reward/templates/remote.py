"""A reward that asks a service: a language model as a judge of each rationale."""

from __future__ import annotations

from grace_rl_rewards.judge import Judge


class MyReward(Judge):
    """How well a rationale says what matters about its text, by a judge behind an HTTP endpoint.

    The endpoint speaks OpenAI's chat protocol (vLLM, llama.cpp and most providers do). `Judge` has
    the concurrency, time limits, retries, costs and what happens on a failure.

    Args:
        model: the judge's name at the endpoint.
        base_url: where the endpoint is.
        options: keywords of `Judge`, such as `concurrency: 4` or `skip_failures: true`.
    """

    instruction = (
        "You grade notes that were written about a text. Answer with one whole number from 0 "
        "(useless or wrong) to 10 (names everything that matters, nothing else)."
    )

    def __init__(
        self,
        model: str = "judge",
        base_url: str = "http://127.0.0.1:8000/v1",
        options: dict | None = None,
    ) -> None:
        super().__init__(model=model, base_url=base_url, **(options or {}))
