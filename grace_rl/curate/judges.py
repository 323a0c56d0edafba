"""Judges: how alike two texts are, from 0 to 5.

A judge is called with pairs of texts (what was given, a candidate) and returns as many ratings:
numbers, or `Rating`s. A judge of your own is such a function, or a class that builds one; NaN is
"cannot say".

The released code of MultiCSR (arXiv 2310.10962) lets the model write "3.5" and drops what does not
parse; here the rating is the expected value over the log-probabilities of the six digits, in one
pass and without parsing, and both orders of a pair are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grace_rl.curate.models import LanguageModel, Models
from grace_rl.curate.prompts import RatingPrompts
from grace_rl.data.guide import Encode, load_encoder, unit_vectors
from grace_rl.errors import UserError
from grace_rl.plugins import Plugin, argument_problems, find
from grace_rl.recipe.curation import RateStep
from grace_rl.rollout.prompts import PromptTemplate

HIGHEST = 5.0
Pair = tuple[str, str]


class Rating(NamedTuple):
    """A rating in [0, 5], and the digit that a judge of digits would have written.

    The digit is that of the order (text, candidate).
    """

    score: float
    greedy: int | None = None


Judge = Callable[[Sequence[Pair]], Sequence[Any]]


class DigitJudge:
    """A language model that is asked for a digit.

    Args:
        model: The language model.
        prompts: How it is asked.
    """

    def __init__(self, model: LanguageModel, prompts: RatingPrompts) -> None:
        self.model, self.prompts = model, prompts

    def __call__(self, pairs: Sequence[Pair]) -> list[Rating]:
        asked = [self.prompts.tokens(a, b) for a, b in pairs]
        asked += [self.prompts.tokens(b, a) for a, b in pairs]
        logprobs = self.model.next_logprobs(asked, self.prompts.digits)
        expected = logprobs.softmax(-1) @ torch.arange(6.0)
        there, back = expected.split(len(pairs))
        greedy = logprobs[: len(pairs)].argmax(-1)
        return [
            Rating(float(score), int(digit))
            for score, digit in zip((there + back) / 2, greedy, strict=True)
        ]


class LikelihoodJudge:
    """5 plus the mean log-probability, in nats, of a candidate's tokens after the text, at least 0.

    For models that follow no instruction and only continue: what they would hardly write about the
    text, they take to be false of it. Texts that nobody wrote score lower than samples; alpha and
    beta lie lower than for other judges.

    Args:
        model: The language model.
        template: The prompt of a text.
    """

    def __init__(self, model: LanguageModel, template: PromptTemplate) -> None:
        self.model, self.template = model, template

    def __call__(self, pairs: Sequence[Pair]) -> list[Rating]:
        prompts = [self.template.render(text).token_ids for text, _ in pairs]
        tokenizer = self.template.tokenizer
        written = [tokenizer(c, add_special_tokens=False)["input_ids"] for _, c in pairs]
        logprobs = self.model.mean_logprobs(prompts, written)
        return [Rating(max(0.0, HIGHEST + logprob)) for logprob in logprobs]


class EncoderJudge:
    """5 times the cosine of a sentence encoder, at least 0: the judge of last resort.

    A contradiction shares most of its words with the text, and an encoder hardly tells it from a
    paraphrase; it sees random pairs and swapped sides well.

    Args:
        encode: See `grace_rl.data.guide.load_encoder`.

    >>> judge = EncoderJudge(lambda texts: [[1.0, float(len(text))] for text in texts])
    >>> judge([("abc", "xyz")])
    [Rating(score=5.0, greedy=None)]
    """

    def __init__(self, encode: Encode) -> None:
        self.encode = encode

    def __call__(self, pairs: Sequence[Pair]) -> list[Rating]:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        place = {text: i for i, text in enumerate(texts)}
        vectors = unit_vectors(self.encode, texts)
        first, second = (
            vectors[[place[text] for text in side]] for side in zip(*pairs, strict=True)
        )
        cosine = (first * second).sum(1)
        return [Rating(round(float(c) * HIGHEST, 6)) for c in cosine.clamp(0, 1)]


def load_judge(step: RateStep, generator: str | None, models: Models) -> Judge:
    """The judge of a recipe.

    Args:
        step: The recipe's `rate`.
        generator: The generator's model, where the judge has none of its own.
        models: Loads language models.

    Raises:
        UserError: It cannot be loaded.
    """
    if step.is_own:
        judge: Judge = own_judge(step).object
        return judge
    name = str(step.model_name_or_path or generator)
    if step.judge == "encoder":
        return EncoderJudge(load_encoder(name, step.batch_size))
    model = models.load(name, step.engine, step.dtype, step.batch_size)
    if step.judge == "likelihood":
        template = PromptTemplate(
            model.tokenizer, None, step.max_text_tokens, step.chat_template_kwargs
        )
        return LikelihoodJudge(model, template)
    return DigitJudge(
        model,
        RatingPrompts(
            model.tokenizer, step.prompts, step.max_text_tokens, step.chat_template_kwargs
        ),
    )


def own_judge(step: RateStep) -> Plugin:
    """The user's judge, found and its options checked; it is built when it is first asked for.

    Raises:
        UserError: There is none, or it does not take the options.
    """
    try:
        target = find(step.judge, Path.cwd())
    except UserError as error:
        raise UserError([f"rate.judge: {problem}" for problem in error.problems]) from error
    problems = [
        f"rate.options.{key}: {problem}" if key else f"rate.options: {problem}"
        for key, problem in argument_problems(target, step.options)
    ]
    if problems:
        raise UserError(problems)
    return Plugin(step.judge, target, step.options)


def checked(ratings: Sequence[Any], count: int, judge: str) -> list[Rating]:
    """Ratings of a judge as `Rating`s.

    Raises:
        UserError: They are too few, too many, or outside 0 to 5.
    """
    found = [
        r if isinstance(r, Rating) else Rating(math.nan if r is None else float(r)) for r in ratings
    ]
    if len(found) != count:
        raise UserError(f"rate.judge: {judge} gave {len(found)} ratings for {count} pairs")
    for rating in found:
        if not (math.isnan(rating.score) or 0 <= rating.score <= HIGHEST):
            raise UserError(f"rate.judge: {judge} gave {rating.score}; a rating is from 0 to 5")
    return found
