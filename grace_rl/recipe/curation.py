"""A curation recipe: YAML and overrides -> one typed section a step, all mistakes together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from grace_rl.errors import UserError, missing
from grace_rl.recipe.rows import DATA_KEYS, DataConfig, looks_like_path, read_data
from grace_rl.recipe.schema import FilePath, Items, Section, unknown_key, validated
from grace_rl.recipe.source import read_source

STEPS = ("generate", "rate", "filter", "guide")
JUDGES = ("digits", "likelihood", "encoder")


def _model(name: str) -> str:
    if looks_like_path(name):
        name = str(Path(name).expanduser())
        if not Path(name).is_dir():
            raise ValueError(missing(f"folder {name}"))
    return name


ModelName = Annotated[str, Field(min_length=1), AfterValidator(_model)]
Engine = Literal["vllm", "transformers"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Rating = Annotated[float, Field(ge=0, le=5)]


class GenerateStep(Section):
    """How entailments and contradictions are written.

    Args:
        model_name_or_path: The language model; `scenes` is the cold start of the scenes world.
        engine: `vllm` for large batches, or `transformers`.
        prompts: `instructions` (a pool of instructions in the chat template, for models that follow
            them), `completion` (examples and a sentence to complete, for base models) or `describe`
            (the text alone in the chat template: an entailment is what the model writes about the
            text, a contradiction what it writes about the text in `opposite_column`).
        opposite_column: For `describe`: the column with a text that means something else.
        candidates: Sampled candidates of each side, 0 to 1024; `greedy` adds one.
        greedy: Also the most likely one.
        temperature: Of the sampled candidates, above 0.
        top_p: Nucleus of the sampled candidates, in (0, 1].
        max_tokens: Longest candidate in tokens, at least 1; one that is cut off is dropped.
        max_text_tokens: Longer texts are cut here, at least 1.
        omega: Contrastive decoding, in [0, 1): logits of the intended instruction minus omega times
            those of the opposite one. 0 is off; 0.3 is usual. Engine transformers only.
        length_ratio: Shortest and longest candidate in words, over those of the text.
        max_overlap: A positive that shares more of its words with the text is a copy, in (0, 1].
        chat_template_kwargs: Keywords for the chat template, such as `{enable_thinking: false}`.
        dtype: Of the weights; `auto` is the model's own.
        batch_size: Prompts per batch of the transformers engine, at least 1.
    """

    recipe_key = "generate"

    model_name_or_path: ModelName
    engine: Engine = "vllm"
    prompts: Literal["instructions", "completion", "describe"] = "instructions"
    opposite_column: str | None = None
    candidates: int = Field(4, ge=0, le=1024)
    greedy: bool = True
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(64, ge=1)
    max_text_tokens: int = Field(256, ge=1)
    omega: float = Field(0.0, ge=0, lt=1)
    length_ratio: Items[float] = (0.4, 2.5)
    max_overlap: float = Field(0.9, gt=0, le=1)
    chat_template_kwargs: dict[str, Any] = {}
    dtype: Dtype = "auto"
    batch_size: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        problems = []
        if self.engine == "vllm" and self.omega:
            problems.append(
                "omega: vLLM cannot do contrastive decoding: a logits processor sees the logits of "
                "one step, and nothing keeps a request and its opposite in the same step; use "
                "engine: transformers, or leave it out and let the filter choose among more "
                "candidates"
            )
        if not (self.greedy or self.candidates):
            problems.append("candidates: must be at least 1 without greedy")
        ratio = self.length_ratio
        if len(ratio) != 2 or not 0 <= ratio[0] < ratio[1]:
            problems.append(f"length_ratio: must be two numbers, low and high, not {list(ratio)}")
        if (self.prompts == "describe") != (self.opposite_column is not None):
            problems.append("opposite_column: belongs to prompts: describe, which needs it")
        if problems:
            raise UserError(problems)
        return self


class RateStep(Section):
    """How alike two texts are, from 0 to 5.

    Args:
        judge: `digits` (the expected value over the log-probabilities of the digits 0 to 5, both
            orders averaged), `likelihood` (5 plus the mean log-probability of a candidate's tokens
            given the text, at least 0; for models that can only continue), `encoder` (5 times the
            cosine of a sentence encoder), or `package.module:Name` or `path/to/file.py:Name` of a
            judge of your own.
        model_name_or_path: The judge's model; null is the generator's.
        engine: As for generate.
        prompts: `instructions` or `completion`, for `digits`.
        options: Keywords of a judge of your own.
        max_text_tokens, chat_template_kwargs, dtype, batch_size: As for generate.
    """

    recipe_key = "rate"

    judge: str = "digits"
    model_name_or_path: ModelName | None = None
    engine: Engine = "vllm"
    prompts: Literal["instructions", "completion"] = "instructions"
    options: dict[str, Any] = {}
    max_text_tokens: int = Field(256, ge=1)
    chat_template_kwargs: dict[str, Any] = {}
    dtype: Dtype = "auto"
    batch_size: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.is_own and self.judge not in JUDGES:
            raise UserError(
                f"judge: must be one of {', '.join(JUDGES)}, or package.module:Name or "
                f"path/to/file.py:Name, not {self.judge!r}"
            )
        if self.options and not self.is_own:
            raise UserError("options: are for a judge of your own; remove it")
        if self.judge == "encoder" and self.model_name_or_path is None:
            raise UserError("model_name_or_path: is missing; the judge encoder needs one")
        return self

    @property
    def is_own(self) -> bool:
        """Whether the judge is the user's."""
        return ":" in self.judge


class FilterStep(Section):
    """Which triplets stay: with a the rating of the positive, b of the negative.

    Args:
        alpha: Keep a >= alpha, 0 to 5.
        beta: Keep b <= beta, 0 to 5.
        gamma: Keep a >= b + gamma, 0 to 5. Rule `paper` only.
        rule: `paper`, or `published-code`: what the released code does, ratings to one decimal, no
            text above 4.0 for a negative, and a != b in place of the gap.
        swap: Where the contradiction rates higher it becomes the positive. False drops such rows.
            Rule `paper` only.
    """

    recipe_key = "filter"

    alpha: Rating = 3.0
    beta: Rating = 3.0
    gamma: Rating = 1.0
    rule: Literal["paper", "published-code"] = "paper"
    swap: bool = True

    @model_validator(mode="after")
    def _rules(self) -> Self:
        given = [key for key in ("gamma", "swap") if key in self.model_fields_set]
        if self.rule == "published-code" and given:
            raise UserError(
                [f"{k}: the published code has no such setting; remove it" for k in given]
            )
        return self


class GuideStep(Section):
    """The frozen encoder behind the false-negative mask.

    Args:
        model_name_or_path: See `grace_rl.data.guide.load_encoder`.
    """

    recipe_key = "guide"

    model_name_or_path: str = Field(min_length=1)


class CurationFile(Section):
    """What the file says beside `dataset_*`. A step that it does not name is None and not done.

    Args:
        output_dir: Folder of the result; None is `curated/<name of the file>`.
        chunk_rows: Rows that are worked on, and written, together.
        seed: Of the samples.
        generate, rate, filter, guide: The steps; an empty `filter:` is one with its defaults.
    """

    output_dir: FilePath | None = None
    chunk_rows: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)
    generate: GenerateStep | None = None
    rate: RateStep | None = None
    filter: FilterStep | None = None
    guide: GuideStep | None = None

    @field_validator("filter", mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not any(getattr(self, name) for name in STEPS):
            raise UserError(f"names no step; there are {', '.join(STEPS)}")
        if self.filter is not None and self.rate is None:
            raise UserError("filter: needs ratings: add a rate step")
        rate = self.rate
        if rate and not (rate.is_own or rate.model_name_or_path or self.generate):
            raise UserError(
                f"rate.model_name_or_path: is missing; the judge {rate.judge} needs one"
            )
        return self


class CurationRecipe(CurationFile):
    """One curation recipe, checked.

    Args:
        data: Where rows come from: `text` to generate for, or query, positive and negative.
        path: The file.
        output_dir: Folder of the result.
    """

    data: DataConfig
    path: Path
    output_dir: FilePath


def load_curation(path: str | Path, overrides: Sequence[str] = ()) -> CurationRecipe:
    """Read, override and check a curation recipe.

    Args:
        path: A YAML file.
        overrides: `--key value`, dots go deeper: `--generate.temperature 0.9`.

    Raises:
        UserError: With every mistake: where, the key, what to do.
    """
    source = read_source(path, overrides)
    data = read_data(source)
    keys, known = CurationFile.model_fields, [*DATA_KEYS, *CurationFile.model_fields]
    source.problems += [
        source.problem((key,), unknown_key(key, known)) for key in source.tree if key not in known
    ]
    steps = {key: value for key, value in source.tree.items() if key in keys}
    file = validated(CurationFile, steps, source)
    data = source.settled(data)
    values = {key: getattr(file, key) for key in file.model_fields_set}
    values["output_dir"] = file.output_dir or Path("curated") / source.path.stem
    return CurationRecipe(**values, data=data, path=source.path)
